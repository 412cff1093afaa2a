"""PPO against rejax, `rlmeta bench agents --jax PYTHON`: steps/s of both once everything is compiled.

PYTHON is that of an environment with rejax (`pip install rejax "gymnax<1"`). Every side trains in a process of its own
on all cores, the sides in turn, round after round. rejax compiles in a first call, and the second is measured; rlmeta
records operations in the first iterations, and the second half of a training is measured.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
from rich.console import Console
from rich.table import Table

from rlmeta.agents import PPO
from rlmeta.bench import peer_rejax
from rlmeta.bench.agents import ZOO
from rlmeta.bench.seeds import table_seeds
from rlmeta.bench.steady import train_and_time
from rlmeta.errors import SettingError
from rlmeta.runs.experiment import Budget

CLEANRL = PPO(
    num_envs=4,
    num_steps=128,
    batch_size=128,
    num_epochs=4,
    learning_rate=2.5e-4,
    learning_rate_schedule="linear",
    entropy_coefficient=0.01,
    value_clip_range=0.2,
)
"""CleanRL's settings of PPO on CartPole-v1."""


class Flat(torch.nn.Module):
    """Two layers of 64 on the flattened observation, which are rejax's network of pictures, too."""

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        super().__init__()
        assert space.shape is not None
        self.hidden, self.features = torch.nn.Linear(math.prod(space.shape), 64), torch.nn.Linear(64, 64)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Features `[B, 64]` of bytes `[B, ...]`."""
        return self.features(self.hidden(observation.float().flatten(1)).relu()).relu()


PUREJAXRL = PPO(
    num_envs=64,
    num_steps=128,
    batch_size=1024,
    num_epochs=4,
    learning_rate=5e-3,
    learning_rate_schedule="linear",
    entropy_coefficient=0.01,
    value_clip_range=0.2,
    activation="relu",
    network=Flat,
)
"""PureJaxRL's settings of PPO on MinAtar."""


@dataclass(frozen=True)
class Case:
    """What both sides train."""

    settings: str
    seeds: int
    bar: float
    """The least ratio that is wanted."""
    task: str = "CartPole-v1"
    peer_task: str = "CartPole-v1"
    """The task by its name in gymnax."""
    episode_steps: int = 500
    """Steps after which an episode of rejax's evaluation is cut."""


SETTINGS = {"rl-zoo": ZOO, "CleanRL": CLEANRL, "PureJaxRL": PUREJAXRL}
CASES = (
    Case("rl-zoo", 16, 2.0),
    Case("rl-zoo", 1, 0.65),
    Case("CleanRL", 8, 0.85),
    Case("CleanRL", 1, 0.3),
    Case("PureJaxRL", 8, 0.0, "MinAtar/Breakout-v1", "Breakout-MinAtar", 1000),
)


def rejax_settings(settings: PPO) -> dict[str, Any]:
    """Settings in the names of `rejax.PPO.create`; its learning rate and clip range are constant."""
    return {
        "num_envs": settings.num_envs,
        "num_steps": settings.num_steps,
        "num_epochs": settings.num_epochs,
        "num_minibatches": settings.num_envs * settings.num_steps // settings.batch_size,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "clip_eps": settings.clip_range,
        "ent_coef": settings.entropy_coefficient,
        "vf_coef": settings.value_coefficient,
        "agent_kwargs": {"activation": settings.activation, "hidden_layer_sizes": settings.hidden_sizes},
    }


def work(name: str, task: str, seeds: int, steps: int) -> dict[str, Any]:
    """Train our side; steps and seconds of the second half of the training."""
    final = Budget(steps=steps, final_episodes=peer_rejax.EVALUATION_EPISODES, eval_every=10 * steps)
    run, taken, seconds = train_and_time(SETTINGS[name], task, table_seeds(seeds), final)
    return {"steps": taken, "seconds": seconds, "scores": run.scores.tolist()}


def _side(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise SettingError(f"bench: {command[0]} failed: {done.stderr[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "steps_per_second": result["steps"] / result["seconds"]}


def _round(case: Case, python: Path, steps: int, peer_first: bool) -> dict[str, dict[str, Any]]:
    """Both sides of a case, one after the other."""
    job = {
        "task": case.peer_task,
        "episode_steps": case.episode_steps,
        "seeds": case.seeds,
        "steps": steps,
        "settings": rejax_settings(SETTINGS[case.settings]),
    }
    words = (case.settings, case.task, case.seeds, steps)
    call = f"import json; from rlmeta.bench.against_rejax import work; print(json.dumps(work{words}))"
    commands = {
        "rlmeta": [sys.executable, "-c", call],
        "rejax": [str(python), str(Path(peer_rejax.__file__)), json.dumps(job)],
    }
    names = sorted(commands, reverse=not peer_first)
    return {name: _side(commands[name]) for name in names}


def main(python: Path, steps: int, rounds: int, out: Path) -> int:
    """Print and write the table of medians and ratios; 0, whatever they are."""
    if not python.exists():
        raise SettingError(f'bench: {python} is no Python; give that of an environment with rejax and "gymnax<1"')
    results: dict[Case, list[dict[str, dict[str, Any]]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case, sides in results.items():
            sides.append(_round(case, python, steps, peer_first=number % 2 == 1))
            rates = {name: f"{side['steps_per_second']:,.0f} steps/s" for name, side in sides[-1].items()}
            print(f"round {number + 1}: {case.settings} on {case.task}, {case.seeds}: {rates}", flush=True)
    table = Table(
        "settings", "task", "learners", "rlmeta (steps/s)", "rejax (steps/s)", "ratio", "wanted", "scores", box=None
    )
    rows = []
    for case, sides in results.items():
        ratios = sorted(x["rlmeta"]["steps_per_second"] / x["rejax"]["steps_per_second"] for x in sides)
        row: dict[str, Any] = {
            "settings": case.settings,
            "task": case.task,
            "learners": case.seeds,
            "wanted": case.bar,
            "ratios": ratios,
        }
        for name in ("rlmeta", "rejax"):
            row[name] = statistics.median(x[name]["steps_per_second"] for x in sides)
            row[f"{name}_score"] = statistics.fmean(score for x in sides for score in x[name]["scores"])
        row["ratio"] = statistics.median(ratios)
        rows.append(row)
        scores = f"{row['rlmeta_score']:.0f} / {row['rejax_score']:.0f}"
        ratio = f"{row['ratio']:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        numbers = (f"{row['rlmeta']:,.0f}", f"{row['rejax']:,.0f}", ratio, f"{case.bar}", scores)
        table.add_row(case.settings, case.task, str(case.seeds), *numbers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench_rejax.json").write_text(json.dumps({"steps": steps, "rounds": rounds, "rows": rows}, indent=1) + "\n")
    Console(width=140).print(table)
    return 0
