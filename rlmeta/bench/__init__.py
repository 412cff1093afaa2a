"""Benchmarks, `rlmeta bench NAME`, with other libraries as baselines."""

__all__: list[str] = []
