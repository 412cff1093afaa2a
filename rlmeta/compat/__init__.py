"""The interfaces of other libraries, on rlmeta."""

__all__ = ["learn2learn", "torch"]
