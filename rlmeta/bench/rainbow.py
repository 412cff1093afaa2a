"""Ablation of Rainbow: what each of its six parts is worth on MinAtar's Breakout.

`rlmeta bench rainbow` trains Rainbow, Rainbow without each part, and DQN, which has none, with the same seeds, network,
budget and settings of `agents/rainbow.toml`. Differences are paired: a variant's score minus Rainbow's, seed by seed.
Each row is written when it is there, so that `--only` may add rows later.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlmeta.agents import Rainbow
from rlmeta.api import train
from rlmeta.bench.seeds import table_seeds
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import statistics
from rlmeta.runs.experiment import Budget
from rlmeta.runs.presets import preset

WHOLE = "Rainbow"
"""Name of the row that the others are compared with."""

GREEDY: dict[str, Any] = {"noisy": False, "epsilon_start": 1.0, "epsilon_end": 0.05, "exploration_fraction": 0.2}
"""DQN's exploration, in the place of noise."""

WITHOUT: dict[str, dict[str, Any]] = {
    "double": {"double": False},
    "prioritised": {"prioritised": False},
    "dueling": {"dueling": False},
    "n-step": {"n_steps": 1},
    "distribution": {"distribution": "none", "huber_delta": 1.0},
    "noisy": GREEDY,
}
"""Settings that take a part away."""


def variants(whole: Rainbow) -> dict[str, Rainbow]:
    """The settings of every row: Rainbow, without each of its parts, and without all of them."""
    rows = {WHOLE: whole, **{f"no {part}": replace(whole, **changes) for part, changes in WITHOUT.items()}}
    nothing = {name: value for changes in WITHOUT.values() for name, value in changes.items()}
    return {**rows, "DQN": replace(whole, **{**nothing, "double": False})}


@dataclass(frozen=True)
class Ablation:
    """Options of `rlmeta bench rainbow`."""

    task: str = "MinAtar/Breakout-v1"
    """A task of agents/rainbow.toml."""
    steps: int = 250_000
    """Environment steps of each learner."""
    seeds: int = 3
    """Learners of every row, with the seeds 100, 101, ..."""
    episodes: int = 64
    """Episodes of the final evaluation of each."""
    only: str = ""
    """Only the rows of these names, separated by semicolons; those that the file has already stay in it."""
    threads: int = 1
    """Threads of torch."""
    out: Path = Path("runs/results")
    """Folder for the results."""

    def __post_init__(self) -> None:
        if min(self.steps, self.seeds, self.episodes, self.threads) < 1:
            raise SettingError("bench rainbow: steps, seeds, episodes and threads are at least 1")


def rainbow(options: Ablation) -> int:
    """Run `rlmeta bench rainbow`; returns the exit status."""
    rows = variants(preset("rainbow", options.task))
    wanted = options.only.split(";") if options.only else list(rows)
    for name in wanted:
        if name not in rows:
            raise unknown_name("row", name, rows)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"rainbow_{options.task.partition('/')[2] or options.task}.json"
    about = {"task": options.task, "steps": options.steps, "seeds": table_seeds(options.seeds)}
    about["episodes"] = options.episodes
    record = _earlier(path, about)
    for name in wanted:
        record[name] = _row(rows[name], options)
        print(f"{name}: {record[name]['mean']:.2f}, {record[name]['seconds']:.0f} s", flush=True)
        compared = {row: {**record[row], **_difference(record, row)} for row in rows if row in record}
        path.write_text(json.dumps({**about, "rows": compared}, indent=1) + "\n")
    _print(json.loads(path.read_text()))
    return 0


def _earlier(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run that the file has.

    Raises:
        SettingError: they are of another task, budget or seeds.
    """
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    rows: dict[str, Any] = content.pop("rows")
    if content != about:
        raise SettingError(f"{path} has rows of {content}, this run is of {about}: give another --out")
    return rows


def _row(settings: Rainbow, options: Ablation) -> dict[str, Any]:
    budget = Budget(steps=options.steps, eval_every=options.steps, eval_episodes=1, final_episodes=options.episodes)
    seeds, began = table_seeds(options.seeds), time.perf_counter()
    run = train(settings, options.task, budget=budget, seeds=seeds, threads=options.threads, progress=False)
    scores = run.scores.tolist()
    return {"scores": scores, "mean": sum(scores) / len(scores), "seconds": round(time.perf_counter() - began, 1)}


def _difference(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A row's scores minus Rainbow's, seed by seed, their mean and its bootstrap interval."""
    if WHOLE not in record or name == WHOLE:
        return {}
    ours, whole = (torch.tensor(record[row]["scores"], dtype=torch.float64) for row in (name, WHOLE))
    each = (ours - whole).numpy()
    low, high = statistics.stratified_bootstrap_interval(each.reshape(-1, 1), statistics.mean)
    return {"differences": each.tolist(), "difference": float(each.mean()), "low": float(low), "high": float(high)}


def _print(content: dict[str, Any]) -> None:
    title = f"{content['task']}, {content['steps']:,} steps, {len(content['seeds'])} seeds"
    table = Table(title=title, caption="paired: a row's score minus Rainbow's, seed by seed; bootstrap 95 % interval")
    for column in ("", "score", "minus Rainbow's", "each seed", "seconds"):
        table.add_column(column, justify="right")
    for name, row in content["rows"].items():
        paired = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if "low" in row else ""
        each = ", ".join(f"{score:.1f}" for score in row["scores"])
        table.add_row(name, f"{row['mean']:.2f}", paired, each, f"{row['seconds']:.0f}")
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)  # a log has no width
