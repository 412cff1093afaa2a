"""Speed of a training once its operations are recorded: environment steps/s of its second half."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rlmeta.api import train
from rlmeta.runs.experiment import Budget
from rlmeta.runs.run import Run


def train_and_time(
    settings: Any, problem: Any, seeds: list[int], budget: Budget, threads: int = 0
) -> tuple[Run, int, float]:
    """Train, and time the second half.

    Args:
        settings: a learner's.
        problem: what it is trained on.
        seeds: of its learners.
        budget: without evaluations before the end.
        threads: threads for torch; 0 for one a core.

    Returns:
        The run, the environment steps that all learners took in the second half, and its seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = train(settings, problem, seeds=seeds, budget=budget, out=f"{folder}/run", threads=threads)
        lines = [json.loads(line) for line in Path(folder, "run", "timing.jsonl").read_text().splitlines()]
    half = next(line for line in lines if line["iteration"] >= lines[-1]["iteration"] / 2)
    iterations = lines[-1]["iteration"] - half["iteration"]
    steps = iterations * settings.num_envs * settings.num_steps * len(seeds)
    return run, steps, lines[-1]["seconds"] - half["seconds"]
