"""Shared parts of all learners: the state, the gradient step with its hooks, and the protocols."""

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
    "prioritised",
    "replay",
    "settings",
    "state",
    "step",
]
