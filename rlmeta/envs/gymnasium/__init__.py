"""Gymnasium adapter: environments as a world, in this process or in worker processes."""

__all__ = ["rows", "world"]
