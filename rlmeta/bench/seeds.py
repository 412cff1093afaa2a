"""Which seeds a benchmark's tables have, and on which its settings were chosen: never the same."""

from __future__ import annotations

FIRST_SEED = 100
"""Of every published table; settings are chosen on seeds below."""

SELECTION_SEEDS = (0, 1, 2, 3, 4)
"""On which a benchmark chooses a rate by itself, among those that its table names."""

BY_HAND_SEEDS = tuple(range(10))
"""Among which are those on which the strengths and rates that stand in the benchmarks' code were tried."""


def table_seeds(count: int) -> list[int]:
    """The seeds of a table's learners, from `FIRST_SEED` on."""
    return list(range(FIRST_SEED, FIRST_SEED + count))
