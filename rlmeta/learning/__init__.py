"""What every learner shares: the state, the gradient step that runs the hooks, and the protocols."""
