"""The Gymnasium adapter: many environments of one kind as a world, in this process or in workers."""

__all__ = ["rows", "world"]
