"""Training runs: the experiment, its folder and checkpoints, and the training loop."""

__all__ = ["experiment", "folder", "listeners", "loop", "presets", "record_demonstrations", "run", "stages", "train"]
