"""rlmeta."""
