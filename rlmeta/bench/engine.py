"""Backends of recordings: training steps/s of each and of none, `rlmeta bench engine`.

PPO on CartPole-v1 with rl-zoo's settings, alone and with many learners, and a network of convolutions and norms on
pictures; every side in a process of its own, the sides in turn, round after round; medians of the second half of a
training, in which all that can be is recorded. Equal seeds give equal final weights on every side, which is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rlmeta.bench.seeds import table_seeds
from rlmeta.engine.backends import VARIABLE as BACKEND_VARIABLE
from rlmeta.envs.native import NativeEnv
from rlmeta.errors import SettingError

DEFAULT = "default"
"""The first backend that takes a recording: TorchScript, or generated Python for what that refuses."""
BACKENDS = (DEFAULT, "python", "none")
CASES = {"PPO, 1 learner": ("mlp", 1, 60_000), "PPO, 16 learners": ("mlp", 16, 60_000),
         "convolutions and norms, 8 learners": ("pictures", 8, 20_000)}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """Steps/s of each backend of recordings, and of none."""

    rounds: int = 3
    """How often every side is measured; medians are printed."""
    out: Path = Path("runs/results/engine.json")
    """Where the figures go."""


@dataclass(frozen=True)
class Dot(NativeEnv):
    """A dot in a picture of 8 x 8 that moves left or right; reward 1 at the right edge, where the episode ends."""

    max_episode_steps: int | None = 16
    step_noise = 0

    @property
    def observation_space(self) -> gym.Space:
        """A picture `[1, 8, 8]` of bytes."""
        return gym.spaces.Box(0, 255, (1, 8, 8), np.uint8)

    @property
    def action_space(self) -> gym.Space:
        """Two actions: left and right."""
        return gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Any) -> dict[str, Tensor]:
        """Initial state: the dot at the left edge."""
        return {"cell": torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)}

    def step(self, state: Any, action: Tensor, noise: Tensor, physics: Any) -> tuple[Any, Tensor, Tensor]:
        """Transition: the dot moves one cell."""
        cell = (state["cell"] + 2 * action - 1).clamp(0, 7)
        return {"cell": cell}, (cell == 7).float(), cell == 7

    def observe(self, state: Any) -> Tensor:
        """Picture with the dot in white."""
        lit = state["cell"].unsqueeze(-1) == torch.arange(8, device=state["cell"].device)
        return (255 * lit).to(torch.uint8)[..., None, None, :].expand(*lit.shape[:-1], 1, 8, 8).contiguous()


class Scale(nn.Module):
    """Scaling of pixels from bytes to 0 to 1."""

    recordable = True

    def forward(self, x: Tensor) -> Tensor:
        """Scale pixels to 0 to 1."""
        return x.float() / 255


def convolutional_network(space: gym.Space) -> nn.Module:
    """Two convolutions with norms, and a linear layer."""
    return nn.Sequential(
        *(Scale(), nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 32), nn.LayerNorm(32), nn.Tanh()),
    )


def train_and_measure(case: str) -> dict[str, Any]:
    """Train once: steps/s of the second half, operations of the recordings, and a digest of the final weights."""
    from rlmeta.agents import PPO
    from rlmeta.bench.agents import ZOO
    from rlmeta.bench.steady import train_and_time
    from rlmeta.envs.task import task
    from rlmeta.runs.experiment import Budget

    network, learners, steps = CASES[case]
    small = PPO(num_envs=8, num_steps=32, batch_size=64, num_epochs=4, network=convolutional_network)
    settings, problem = (ZOO, task("CartPole-v1")) if network == "mlp" else (small, task(Dot(), name="dot"))
    budget = Budget(steps=steps, eval_every=10 * steps, final_episodes=4)
    run, taken, seconds = train_and_time(settings, problem, table_seeds(learners), budget, threads=1)
    weights = torch.cat([value.reshape(-1) for value in run.state["params"]["weights"].values()])
    capture: Any = run.agent.capture  # type: ignore[attr-defined]
    return {
        "steps_per_second": taken / seconds,
        "operations": capture.operations() if capture else {},
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    }


def _side(case: str, backend: str) -> dict[str, Any]:
    environment = {**os.environ, BACKEND_VARIABLE: "" if backend == DEFAULT else backend, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        f"import json; from rlmeta.bench import engine; print(json.dumps(engine.train_and_measure({case!r})))",
    ]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SettingError(f"bench: {case} on {backend} failed: {process.stderr[-500:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main(options: Engine) -> int:
    """Print and write the table; returns exit status 1 if final weights differ between backends."""
    if options.rounds < 1:
        raise SettingError("bench: rounds is at least 1")
    results: dict[str, dict[str, list[dict[str, Any]]]] = {case: {side: [] for side in BACKENDS} for case in CASES}
    for number in range(options.rounds):
        for case, sides in results.items():
            for side in BACKENDS if number % 2 == 0 else reversed(BACKENDS):
                sides[side].append(_side(case, side))
    table = Table("case", *(f"{side} (steps/s)" for side in BACKENDS), "operations", box=None)
    rows: list[dict[str, Any]] = []
    for case, sides in results.items():
        rates = {side: statistics.median(x["steps_per_second"] for x in trials) for side, trials in sides.items()}
        equal = len({x["weights"] for trials in sides.values() for x in trials}) == 1
        operations: dict[str, int] = sides[BACKENDS[0]][0]["operations"]
        rows.append({"case": case, "steps_per_second": rates, "equal_weights": equal, "operations": operations})
        cells = [f"{rate:,.0f} ({rate / rates['none']:.2f}x)" for rate in rates.values()]
        table.add_row(case, *cells, ", ".join(f"{name}: {count}" for name, count in operations.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=200).print(table)
    unequal = [row["case"] for row in rows if not row["equal_weights"]]
    if unequal:
        print(f"other final weights on another backend: {', '.join(unequal)}")
    return 1 if unequal else 0
