"""Benchmark of imitation learning and reward shaping, and of GAIL's speed against the package imitation.

`rlmeta bench imitation` trains every row into a run folder of its own; a row that has ended is loaded, one that was
killed is resumed. `--speed` times ten seeds of GAIL in one process against one process of imitation 1.0.1.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlmeta.agents import PPO
from rlmeta.api import resume, train
from rlmeta.bench.seeds import BY_HAND_SEEDS, FIRST_SEED, table_seeds
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.names import shipped
from rlmeta.errors import SettingError, unknown_name
from rlmeta.imitation import GAIL
from rlmeta.learning.settings import require
from rlmeta.rewards import PotentialShaping
from rlmeta.runs.experiment import Budget
from rlmeta.runs.folder import read_config
from rlmeta.runs.presets import preset
from rlmeta.runs.record_demonstrations import record
from rlmeta.runs.run import Run, load

FIXED = "CartPole-fixed"


@dataclass(frozen=True)
class Imitation:
    """Options of `rlmeta bench imitation`."""

    tables: str = "gail,shaping"
    """Tables to produce, separated by commas."""
    seeds: int = 10
    """Number of learners of every row, with the seeds 100, 101, ..."""
    steps: int = 200_000
    """Environment steps of each learner."""
    speed: bool = False
    """Instead, time GAIL with all seeds in one process against the package imitation."""
    rounds: int = 2
    """With --speed: number of measurements of each; medians are printed."""
    imitation: str = os.environ.get("RLMETA_IMITATION_PYTHON", "")
    """With --speed: a Python that has imitation 1.0.1 (its own environment); RLMETA_IMITATION_PYTHON by default."""
    runs: Path = Path("runs/bench_imitation")
    """Folder for the runs."""
    out: Path = Path("runs/results")
    """Folder for the results."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "rounds"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}, expected at least 1")
        for name in self.tables.split(","):
            if name not in TABLES:
                raise unknown_name("table", name, TABLES)


def imitation(options: Imitation) -> int:
    """Produce the tables, or measure speed; returns the exit status."""
    if options.speed:
        return speed(options)
    for name in options.tables.split(","):
        title, rows = TABLES[name](options)
        _report(name, title, rows, options)
    return 0


def demonstrations(options: Imitation) -> Demonstrations:
    """Load the demonstrations: 60 episodes of an expert, PPO trained on the task; recorded on first use."""
    path = options.runs / "cartpole-fixed.demonstrations"
    if not path.is_file():
        expert = train(preset("ppo", FIXED), FIXED, steps=200_000, seeds=table_seeds(2))
        record(expert, 60).save(path)
    return Demonstrations.load(path)


def gail(options: Imitation) -> tuple[str, list[dict[str, Any]]]:
    """Behaviour cloning and GAIL from ten episodes, and GAIL with shuffled demonstrations as a control."""
    recorded = demonstrations(options)
    imitator = replace(preset("gail", FIXED), demonstrations=recorded.path)
    cloner = replace(preset("behaviour_cloning", FIXED), demonstrations=recorded.path)
    rows = {
        "gail": (imitator, options.steps),
        "gail-shuffled": (replace(imitator, shuffled=True), options.steps),
        "behaviour-cloning": (cloner, 2_000),
    }
    results = [_row(name, settings, FIXED, steps, options) for name, (settings, steps) in rows.items()]
    title = f"{FIXED}, 10 episodes of demonstrations with a mean return of {float(recorded.first(10).returns.mean()):g}"
    return title, results


def shaping(options: Imitation) -> tuple[str, list[dict[str, Any]]]:
    """PPO on MountainCar, with and without potential-based shaping by the car's energy."""
    plain: PPO = preset("ppo", "MountainCar-v0")
    rows = {"ppo-shaped": replace(plain, rewards=(_energy(),)), "ppo": plain}
    results = [_row(name, settings, "MountainCar-v0", options.steps, options) for name, settings in rows.items()]
    return "MountainCar-v0, scores by the task's own reward", results


TABLES: dict[str, Callable[[Imitation], tuple[str, list[dict[str, Any]]]]] = {"gail": gail, "shaping": shaping}
"""Functions that return the title and rows of a table, by name."""


def _energy() -> PotentialShaping:
    """Load the shaping potential of the program agents/reward_shaping.py."""
    import importlib.util

    for path in (folder / "agents" / "reward_shaping.py" for folder in shipped()):
        spec = importlib.util.spec_from_file_location("reward_shaping", path)
        if spec is not None and spec.loader is not None and path.is_file():
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            potential: PotentialShaping = module.ENERGY
            return potential
    raise SettingError("agents/reward_shaping.py is not there: run in a checkout")


def _row(name: str, settings: Any, task: str, steps: int, options: Imitation) -> dict[str, Any]:
    """Result of a row's run, which is trained, resumed or loaded."""
    folder = options.runs / name
    own = {"rewards": settings.rewards} if getattr(settings, "rewards", ()) else {}
    if (folder / "config.toml").is_file():
        seeds = read_config(folder)["seeds"]
        require(
            seeds == table_seeds(options.seeds),
            f"{folder} has learners of seeds {seeds}, the table those from {FIRST_SEED} on, {options.seeds} of them: "
            "remove it, or name another folder by --runs",
        )
    if (folder / "summary.json").is_file():
        run: Run = load(folder, own=own)
    elif (folder / "config.toml").is_file():
        run = resume(folder, own=own, progress=True)
    else:
        budget = Budget(steps=steps, final_episodes=256)
        run = train(settings, task, seeds=table_seeds(options.seeds), out=folder, budget=budget, progress=True)
    row = {**run.summary()[0], "row": name}
    run.close()
    return row


def _report(name: str, title: str, rows: list[dict[str, Any]], options: Imitation) -> None:
    table = Table(title=title)
    for column in ("row", "IQM return [95 % interval]", "worst to best seed", "steps", "seeds", "seconds"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        table.add_row(
            row["row"],
            f"{row['iqm']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            f"{min(row['scores']):.1f} to {max(row['scores']):.1f}",
            f"{row['steps']:,}",
            str(row["seeds"]),
            f"{row['seconds']:,.0f}",
        )
    Console(width=140).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {"seeds": table_seeds(options.seeds), "chosen_on_seeds": list(BY_HAND_SEEDS)}
    record_ = {"title": title, **chosen, "when": time.strftime("%Y-%m-%d"), "rows": rows}
    (options.out / f"imitation_{name}.json").write_text(json.dumps(record_, indent=1) + "\n")


# ---------------------------------------------------------------------- speed


def speed(options: Imitation) -> int:
    """Time environment steps per second of all learners, with equal samples and gradient steps for each learner."""
    if not options.imitation:
        raise SettingError(
            "--speed needs the package imitation in an environment of its own: pip install imitation==1.0.1 there, "
            "then --imitation PATH/bin/python (or RLMETA_IMITATION_PYTHON)"
        )
    recorded = demonstrations(options).first(10)
    settings = replace(preset("gail", FIXED), demonstrations=recorded, episodes=0, gradient_penalty=0.0)
    path = options.runs / "demonstrations.npz"
    _export(recorded, path)
    steps = min(options.steps, 5 * settings.num_envs * settings.num_steps)
    many = f"rlmeta, {options.seeds} seeds in one process"
    rates: dict[str, list[float]] = {many: [], "imitation 1.0.1, one process": []}
    for number in range(options.rounds):
        rates[many].append(_ours(settings, steps, options.seeds))
        rates["imitation 1.0.1, one process"].append(_theirs(settings, path, steps, number, options.imitation))
        print(f"round {number + 1}: {', '.join(f'{side} {rate[-1]:,.0f} steps/s' for side, rate in rates.items())}")
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    print(f"{ratio:.1f} times, median of {options.rounds} rounds of {steps:,} steps a learner")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"steps": steps, "seeds": options.seeds, "ratio": ratio, "steps_per_second": rates}
    content |= {"cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", ""), "when": time.strftime("%F")}
    (options.out / "imitation_speed.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _export(recorded: Demonstrations, path: Path) -> None:
    steps = recorded.transitions()
    arrays = {"obs": "observation", "acts": "action", "next_obs": "next_observation", "dones": "terminated"}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: steps[ours].numpy() for name, ours in arrays.items()})


def _ours(settings: GAIL, steps: int, seeds: int) -> float:
    budget = Budget(steps=steps, eval_every=100 * steps, final_episodes=1)
    run = train(settings, FIXED, seeds=table_seeds(seeds), budget=budget)
    return run.env_steps * seeds / run.seconds


def _theirs(settings: GAIL, path: Path, steps: int, seed: int, python: str) -> float:
    names = ("num_envs", "num_steps", "num_epochs", "batch_size", "learning_rate", "gamma")
    job = {name: getattr(settings, name) for name in names}
    job |= {name: getattr(settings, name) for name in ("discriminator_updates", "discriminator_batch_size")}
    job |= {"hidden_sizes": list(settings.discriminator_hidden_sizes), "steps": steps, "seed": seed}
    job["demonstrations"] = str(path)
    script = Path(__file__).with_name("peer_imitation.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, script, json.dumps(job)], stdout=subprocess.PIPE, env=environment)
    if done.returncode:
        raise SettingError(f"{python} failed to run imitation (exit {done.returncode}): see above")
    result = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.flush()
    return float(result["steps"]) / float(result["seconds"])
