"""The interfaces of other libraries, on rlmeta."""
