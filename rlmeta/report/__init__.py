"""Reports: progress bar, tables, learning curves, score matrices, adaptation, trackers; listeners of the loop."""

__all__ = ["adaptation", "curves", "listeners", "matrices", "progress", "tables", "trackers"]
