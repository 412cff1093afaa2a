"""Benchmarks, `rlmeta bench NAME`, and the peers beside them."""
