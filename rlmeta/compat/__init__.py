"""Interfaces of other libraries: learn2learn, and plain PyTorch training loops."""

__all__ = ["learn2learn", "torch"]
