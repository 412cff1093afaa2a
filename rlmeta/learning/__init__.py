"""What every learner shares: the state, the gradient step that runs the hooks, and the protocols."""

__all__ = [
    "average",
    "collect",
    "evaluate",
    "gradients",
    "learner",
    "method",
    "minibatch",
    "optimizer_state",
    "owners",
    "phases",
    "populations",
    "predictive",
    "replay",
    "settings",
    "state",
    "step",
]
