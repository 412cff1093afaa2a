"""Result tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rlmeta.errors import printable
from rlmeta.functional import statistics

FEW_SEEDS = 3
"""Up to this many seeds are shown one by one, as an interval of so few is meaningless."""

TEXTS = ("agent", "task", "setting")
TRANSFER = ("BWT", "FWT", "forgetting")
"""Columns of runs on a stream: backward transfer, forward transfer, forgetting."""
EQUAL_TASKS = "The score is the mean over the tasks, each of which counts the same."
UNDEFINED = "-: not defined. FWT needs scores before a task's classes are added, all three need a second task."
"""Captions of a table of runs on a stream."""
TITLE_WIDTH = 72


def result_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Table of results, from the rows of `Run.summary()`; values that all rows share are moved to the title.

    Args:
        rows: at least one, with `agent`, `task`, `setting`, `score` (its name), `seeds`, `scores` (one a learner),
            `iqm`, `low`, `high`, `episodes` and `steps` (of each learner), `seconds` and `steps_per_second` (of all
            learners of the run); on a stream `BWT`, `FWT` and `forgetting` with their `_low` and `_high`, and `orders`
            where every seed meets the tasks in several.
    """
    score = _score_header(rows)
    trials = "episodes" if any(row["score"] == "return" for row in rows) else "evaluations"
    cells = [_cells(row, score, trials) for row in rows]
    shared = [name for name in cells[0] if name != score and len({row[name] for row in cells}) == 1]
    if len(rows) == 1:
        on_stream = TRANSFER[0] in rows[0]
        shared = [name for name in cells[0] if (name not in (score, *TRANSFER) if on_stream else name in TEXTS)]
    title = _title({name: cells[0][name] for name in shared})
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=Text(printable(title)),
        title_justify="left",
        caption=_caption(rows),
        caption_justify="left",
        min_width=min(TITLE_WIDTH, max(map(len, title.splitlines()), default=0)),
    )
    names = [name for name in cells[0] if name not in shared]
    for name in names:
        text = name in TEXTS
        table.add_column(Text(name), justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for row in cells:
        table.add_row(*(Text(printable(row[name])) for name in names))
    return table


def _caption(rows: Sequence[dict[str, Any]]) -> Text | None:
    """Notes on the columns of a stream; None for other runs."""
    of_streams = [row for row in rows if TRANSFER[0] in row]
    if not of_streams:
        return None
    undefined = any(math.isnan(row[name]) for row in of_streams for name in TRANSFER)
    return Text("\n".join([EQUAL_TASKS, *([UNDEFINED] if undefined else [])]))


def _cells(row: dict[str, Any], score: str, trials: str) -> dict[str, str]:
    """Cells of a row by column; `score` and `trials` are the headers of the score and the number of episodes."""
    return {
        "agent": row["agent"],
        "task": row["task"],
        "setting": row["setting"].replace(", ", "\n"),
        "seeds": str(row["seeds"]),
        **({"orders": str(row["orders"])} if "orders" in row else {}),
        score: _score(row),
        trials: f"{row['episodes']:,}",
        "steps": f"{row['steps']:,}",
        **{name: _transfer(row, name) for name in TRANSFER if name in row},
        "seconds": f"{row['seconds']:,.1f}",
        "steps/s": f"{row['steps_per_second']:,}",
    }


def _score_header(rows: Sequence[dict[str, Any]]) -> str:
    counts = [len(row["scores"]) for row in rows]
    names = {row["score"] for row in rows}
    name = names.pop() if len(names) == 1 else "score"
    if not any(count > FEW_SEEDS for count in counts):
        return name if max(counts, default=1) == 1 else f"mean {name} (each seed)"
    between = "\n" if any(TRANSFER[0] in row for row in rows) else " "
    return f"IQM {name}{between}[95 % interval]" + ("" if min(counts) > FEW_SEEDS else " or mean (each seed)")


def _score(row: dict[str, Any]) -> str:
    digits = 1 if row["score"] == "return" else 3
    iqm, low, high = (f"{row[name]:,.{digits}f}" for name in ("iqm", "low", "high"))
    between = "\n" if TRANSFER[0] in row else " "
    rest = [score for score in row["scores"] if math.isfinite(score)]
    broken = len(row["scores"]) - len(rest)
    if len(row["scores"]) > FEW_SEEDS and broken:
        others = f"; IQM of the others {statistics.iqm(rest):,.{digits}f}" if rest else ""
        return f"{iqm}{between}({broken} of {len(row['scores'])} not finite{others})"
    if len(row["scores"]) > FEW_SEEDS:
        return f"{iqm}{between}[{low}, {high}]"
    return iqm if len(row["scores"]) == 1 else f"{iqm} ({', '.join(f'{score:,.{digits}f}' for score in row['scores'])})"


def _transfer(row: dict[str, Any], name: str) -> str:
    """Cell of a transfer metric: the mean over learners, and its interval below; - if it is not defined."""
    if math.isnan(row[name]):
        return "-"
    if len(row["scores"]) <= FEW_SEEDS:
        return f"{row[name]:+.3g}"
    return f"{row[name]:+.3g}\n[{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]"


def _title(shared: dict[str, str]) -> str:
    """Title from the shared cells: texts in the first line, numbers with their column's name in the second."""
    what = " on ".join(shared[name] for name in ("agent", "task") if name in shared)
    texts = [text for text in (what, shared.get("setting", "").replace("\n", ", ")) if text]
    numbers = [f"{cell} {name}".replace("\n", " ") for name, cell in shared.items() if name not in TEXTS]
    return "\n".join(line for line in (", ".join(texts), ", ".join(numbers)) if line)
