"""Speed regression: training seconds of this checkout against another one's, `rlmeta bench checkout --against DIR`.

Every case trains on both checkouts, each in a process of its own, in alternating rounds; seconds are those of
timing.jsonl without evaluation, so that a changed default of evaluation is not taken for a changed speed. The ratio
printed is the median over rounds of (this / other), with the rounds' range.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import rlmeta
from rlmeta.errors import SettingError

CASES: dict[str, str] = {
    "PPO, 16 learners": "ppo CartPole-v1 --seeds 16 --steps 30k",
    "PPO, 1 learner": "ppo CartPole-v1 --seeds 1 --steps 60k",
    "PPO, Gymnasium's LunarLander": "ppo LunarLander-v3 --seeds 2 --steps 20k",
    "A2C, 8 learners": "a2c CartPole-v1 --seeds 8 --steps 60k",
    "REINFORCE, 8 learners": "reinforce CartPole-v1 --seeds 8 --steps 120k",
    "DQN, 8 learners": "dqn CartPole-v1 --seeds 8 --steps 10k",
    "DQN, 16 learners": "dqn CartPole-v1 --seeds 16 --steps 10k",
    "MAML, sinusoid": "maml sinusoid --seeds 2 --steps 5k",
    "learned optimizer": "learned_optimizer quadratics --seeds 2 --steps 600",
    "classifier": "classifier split-digits --seeds 8 --steps 20k",
    "classifier with EWC": "classifier split-digits --seeds 8 --steps 2k --lifelong ewc --ewc.strength 100",
    "classifier with GEM": "classifier split-digits --seeds 8 --steps 2k --lifelong gem",
    "classifier with PackNet": "classifier split-digits --seeds 8 --steps 2k --lifelong packnet",
}
"""What is trained: the words after `rlmeta train`."""


@dataclass(frozen=True)
class Checkout:
    """Training seconds of this checkout against another one's."""

    against: Path
    """Folder of the other checkout."""
    rounds: int = 5
    """How often every case is measured on both sides."""
    only: str = ""
    """A part of a case's name; by default all."""
    out: Path = Path("runs/results/checkout.json")
    """Where the figures go."""


def training_seconds(checkout: Path, words: str) -> float:
    """Seconds of training without evaluation of `rlmeta train WORDS` by the package in `checkout`.

    Raises:
        SettingError: the run failed; its last lines stand in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "rlmeta", "train", *words.split(), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SettingError(f"bench: rlmeta train {words} in {checkout} failed: {done.stderr[-500:]}")
        last = json.loads((out / "timing.jsonl").read_text().splitlines()[-1])
    return last["seconds"] - last.get("time/evaluate", 0.0)


def compare(options: Checkout) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every case, (this, other) a round; the side that begins alternates."""
    this, other = Path(rlmeta.__file__).parent.parent, options.against.resolve()
    if not (other / "rlmeta" / "__init__.py").is_file():
        raise SettingError(f"bench: {options.against} holds no rlmeta; give the folder of a checkout")
    seconds: dict[str, list[tuple[float, float]]] = {}
    for index in range(options.rounds):
        for name, words in CASES.items():
            if options.only.lower() not in name.lower():
                continue
            first, second = (this, other) if index % 2 == 0 else (other, this)
            taken = {side: training_seconds(side, words) for side in (first, second)}
            seconds.setdefault(name, []).append((taken[this], taken[other]))
    return seconds


def main(options: Checkout) -> int:
    """Print and write the table; 0, whatever the ratios are."""
    if options.rounds < 1:
        raise SettingError("bench: rounds is at least 1")
    table = Table("case", "this (s)", "other (s)", "ratio", "rounds", box=None)
    rows = []
    for name, pairs in compare(options).items():
        ratios: Sequence[float] = sorted(this / other for this, other in pairs)
        row = {
            "case": name,
            "this": statistics.median(this for this, _ in pairs),
            "other": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "command": f"rlmeta train {CASES[name]}",
        }
        rows.append(row)
        spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        table.add_row(name, f"{row['this']:.2f}", f"{row['other']:.2f}", f"{row['ratio']:.3f}", spread)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    Console().print(table)
    return 0
