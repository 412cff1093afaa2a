"""What a run is, where it is kept, and the loop that drives it."""

__all__ = ["experiment", "folder", "listeners", "loop", "presets", "record", "run", "stages", "train"]
