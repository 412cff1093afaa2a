"""What people look at: progress, tables, curves, matrices, adaptation, trackers. Listeners of the loop in `runs`."""

__all__ = ["adaptation", "curves", "listeners", "matrices", "progress", "tables", "trackers"]
