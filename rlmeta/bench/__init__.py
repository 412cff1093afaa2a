"""Benchmarks, `rlmeta bench NAME`, and the peers beside them."""

__all__: list[str] = []
