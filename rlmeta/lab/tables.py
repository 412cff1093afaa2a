"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

FEW_SEEDS = 3
"""Up to as many seeds an interval means nothing: they are shown one by one."""


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The results of runs, as `Run.summary()` gives them.

    Args:
        rows: with `agent`, `task`, `setting`, `seeds`, `scores` (one a seed), `iqm`, `low`, `high`, `episodes` (of each
            seed), `steps` (of each seed), `seconds` and `steps_per_second` (of all learners of the run together).
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("agent")
    table.add_column("task")
    settings = any(row["setting"] for row in rows)
    if settings:
        table.add_column("setting")
    table.add_column("seeds", justify="right")
    table.add_column(_return_header(rows), justify="right")
    for name in ("episodes", "steps", "seconds", "steps/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["agent"],
            row["task"],
            *([row["setting"]] if settings else []),
            str(row["seeds"]),
            _return(row),
            f"{row['episodes']:,}",
            f"{row['steps']:,}",
            f"{row['seconds']:,.1f}",
            f"{row['steps_per_second']:,}",
        )
    return table


def _return_header(rows: Sequence[dict[str, Any]]) -> str:
    counts = [row["seeds"] for row in rows]
    interval, few = any(count > FEW_SEEDS for count in counts), any(1 < count <= FEW_SEEDS for count in counts)
    if interval:
        return "return: IQM [95 % interval]" + (", or mean (each seed)" if few else "")
    return "return: mean (each seed)" if few else "return"


def _return(row: dict[str, Any]) -> str:
    iqm = f"{row['iqm']:,.1f}"
    if row["seeds"] > FEW_SEEDS:
        return f"{iqm} [{row['low']:,.1f}, {row['high']:,.1f}]"
    return iqm if row["seeds"] == 1 else f"{iqm} ({', '.join(f'{score:,.1f}' for score in row['scores'])})"
