"""Benchmark of offline reinforcement learning on three data sets of Pendulum, and of d3rlpy's algorithms beside it.

`rlmeta bench offline` makes the data sets (random: uniform actions; medium: an early SAC; mixed: what SAC does from its
start until it is good) and trains every row into a run folder of its own; a row that has ended is loaded. `--d3rlpy`
also runs IQL and TD3+BC of d3rlpy 2.8.1 on the same data, one seed each.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlmeta.agents import SAC
from rlmeta.api import resume, train
from rlmeta.bench.seeds import FIRST_SEED, table_seeds
from rlmeta.data.demonstrations import Demonstrations, join
from rlmeta.errors import SettingError, unknown_name
from rlmeta.learning.settings import require
from rlmeta.runs.experiment import Budget
from rlmeta.runs.folder import read_config
from rlmeta.runs.presets import preset
from rlmeta.runs.record_demonstrations import record
from rlmeta.runs.run import Run, load

TASK = "Pendulum-v1"
DATA_SETS = ("random", "medium", "mixed")
CLONING = "behaviour_cloning"
ROWS = (CLONING, "td3_bc", "iql", "cql", "decision_transformer")
PEERS = ("td3_bc", "iql")
"""Rows that d3rlpy's algorithms stand beside."""

DATA_SEED = 0
"""Seed of the SAC that the data comes from."""
MEDIUM_STEPS, MIXED_STEPS = 3_600, 8_000
"""Environment steps of SAC in the medium data set, and at the end of the mixed one."""
PARTS = 20
"""Policies of increasing steps in the mixed data set."""


@dataclass(frozen=True)
class Offline:
    """Options of `rlmeta bench offline`."""

    data: str = "random,medium,mixed"
    """Data sets, separated by commas."""
    rows: str = ",".join(ROWS)
    """Algorithms, separated by commas."""
    seeds: int = 3
    """Number of learners of every row, with the seeds 100, 101, ..."""
    steps: int = 20_000
    """Gradient steps of each learner."""
    episodes: int = 100
    """Episodes of each data set, a multiple of 20."""
    final_episodes: int = 256
    """Episodes of each learner's final evaluation."""
    threads: int = 0
    """Cores to use; 0 for all."""
    d3rlpy: str = os.environ.get("RLMETA_D3RLPY_PYTHON", "")
    """A Python that has d3rlpy 2.8.1 (its own environment), to run it beside; RLMETA_D3RLPY_PYTHON by default."""
    runs: Path = Path("runs/bench_offline")
    """Folder for the data sets and runs."""
    out: Path = Path("runs/results")
    """Folder for the results."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "episodes", "final_episodes"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, expected at least 1")
        require(self.threads >= 0, f"--threads is {self.threads}, expected 0 or more")
        require(self.episodes % PARTS == 0, f"--episodes is {self.episodes}, expected a multiple of {PARTS}")
        for kind, names, known in (("data set", self.data, DATA_SETS), ("row", self.rows, ROWS)):
            for name in names.split(","):
                if name not in known:
                    raise unknown_name(kind, name, known)


def offline(options: Offline) -> int:
    """Produce the tables; returns the exit status."""
    for data in options.data.split(","):
        recorded = data_set(data, options)
        rows = [_row(name, data, recorded, options) for name in options.rows.split(",")]
        beside = [name for name in PEERS if options.d3rlpy or _kept(name, data, options).is_file()]
        rows += [_peer(name, data, recorded, options) for name in beside if name in options.rows.split(",")]
        _report(data, recorded, rows, options)
    return 0


# ---------------------------------------------------------------------- data


def data_set(name: str, options: Offline) -> Demonstrations:
    """Load a data set, recorded on first use."""
    path = options.runs / f"pendulum-{name}-{options.episodes}.demonstrations"
    if not path.is_file():
        _recorded(name, options).save(path)
    return Demonstrations.load(path)


def _recorded(name: str, options: Offline) -> Demonstrations:
    """Episodes of one SAC, with its actions as it takes them in training: uniform ones before it learns."""
    settings: SAC = preset("sac", TASK)
    steps = {"random": settings.learning_starts, "medium": MEDIUM_STEPS, "mixed": MIXED_STEPS}[name]
    episodes = options.episodes // PARTS
    parts: list[Demonstrations] = []

    def keep(run: Run, line: dict[str, Any]) -> None:
        if name != "medium" and not (name == "random" and parts):
            count = options.episodes if name == "random" else episodes
            parts.append(record(run, count, learner=0, deterministic=False, seed=line["env_steps"]))

    budget = Budget(steps=steps, log_points=PARTS, eval_every=steps, eval_episodes=4, final_episodes=4)
    run = train(settings, TASK, seeds=[DATA_SEED], budget=budget, callbacks=[keep], threads=options.threads)
    if name == "medium":
        return record(run, options.episodes, learner=0, deterministic=False)
    return join(parts[:PARTS])


# ---------------------------------------------------------------------- rows


def _row(name: str, data: str, recorded: Demonstrations, options: Offline) -> dict[str, Any]:
    """Result of a row's run, which is trained, resumed or loaded."""
    folder, own = options.runs / f"{data}-{name}", {"demonstrations": recorded.path}
    seeds = table_seeds(options.seeds)
    if (folder / "config.toml").is_file():
        earlier = read_config(folder)["seeds"]
        require(
            earlier == seeds,
            f"{folder} has learners of seeds {earlier}, the table those from {FIRST_SEED} on, {options.seeds} of them: "
            "remove it, or name another folder by --runs",
        )
    if (folder / "summary.json").is_file():
        run: Run = load(folder, own=own)
    elif (folder / "config.toml").is_file():
        run = resume(folder, own=own, progress=True)
    else:
        settings = replace(preset(name, TASK), demonstrations=recorded.path)
        budget = Budget(steps=options.steps, eval_every=options.steps, final_episodes=options.final_episodes)
        run = train(settings, TASK, seeds=seeds, out=folder, budget=budget, threads=options.threads, progress=True)
    row = {**run.summary()[0], "row": name}
    run.close()
    return row


def _kept(name: str, data: str, options: Offline) -> Path:
    """File of the result of d3rlpy's algorithm."""
    return options.runs / f"{data}-{name}-d3rlpy.json"


def _peer(name: str, data: str, recorded: Demonstrations, options: Offline) -> dict[str, Any]:
    """Result of d3rlpy's algorithm on the same data with the same settings, one seed; kept in a file."""
    kept = _kept(name, data, options)
    if not kept.is_file():
        path = options.runs / f"{data}.npz"
        _export(recorded, path)
        settings = preset(name, TASK)
        plain = {f.name: getattr(settings, f.name) for f in fields(settings)}
        job = {key: value for key, value in plain.items() if isinstance(value, bool | int | float | str | tuple)}
        job |= {"algorithm": name, "data": str(path), "steps": options.steps, "seed": FIRST_SEED, "task": TASK}
        job["final_episodes"] = options.final_episodes
        script = Path(__file__).with_name("peer_offline.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([options.d3rlpy, script, json.dumps(job)], stdout=subprocess.PIPE, env=environment)
        if done.returncode:
            raise SettingError(f"{options.d3rlpy} failed to run d3rlpy (exit {done.returncode}): see above")
        kept.write_bytes(done.stdout.splitlines()[-1] + b"\n")
    result = json.loads(kept.read_text())
    score = result["score"]
    summary = {"iqm": score, "low": score, "high": score, "scores": [score], "seeds": 1, "steps": options.steps}
    return {**summary, "seconds": result["seconds"], "row": f"{name}, d3rlpy 2.8.1"}


def _export(recorded: Demonstrations, path: Path) -> None:
    steps = recorded.transitions()
    names = ("observation", "action", "reward", "terminated", "truncated")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: steps[name].numpy() for name in names})


def _report(data: str, recorded: Demonstrations, rows: list[dict[str, Any]], options: Offline) -> None:
    cloned = next((row for row in rows if row["row"] == CLONING), None)
    returns = recorded.returns
    title = (
        f"{TASK}, {data}: {len(recorded)} episodes, return {returns.mean():.0f} on average, best {returns.max():.0f}"
    )
    table = Table(title=title)
    for column in ("row", "IQM return [95 % interval]", "above cloning", "worst to best seed", "steps", "seconds"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        row["above_cloning"] = cloned is not None and row["low"] > cloned["high"]
        table.add_row(
            row["row"],
            f"{row['iqm']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            "yes" if row["above_cloning"] else "no",
            f"{min(row['scores']):.1f} to {max(row['scores']):.1f}",
            f"{row['steps']:,}",
            f"{row['seconds']:,.0f}",
        )
    Console(width=140).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "digest": recorded.digest, "seeds": table_seeds(options.seeds), "rows": rows}
    content["when"] = time.strftime("%Y-%m-%d")
    (options.out / f"offline_{data}.json").write_text(json.dumps(content, indent=1) + "\n")
