"""Meta-train in a process that is killed at a chosen iteration, see `tests/runs/killer.py`."""

from __future__ import annotations

import os
import signal
from typing import Any

import rlmeta as rl

POLICY = rl.REINFORCE(num_envs=2, num_steps=20, baseline="batch", hidden_sizes=(6,), learning_rate=0.1)
CLIPPED = rl.PPO(num_envs=2, num_steps=20, batch_size=40, hidden_sizes=(6,))
LEARNED = {"num_envs": 4, "horizon": 10, "unroll": 5, "hidden_sizes": (4,)}
CASES: dict[str, tuple[Any, str, int]] = {
    "maml": (rl.MAML(rl.Regressor(hidden_sizes=(8,)), num_envs=4), "sinusoid", 16),
    "maml reinforce": (rl.MAML(POLICY, num_envs=3, inner_rate=0.1), "navigation-short", 960),
    "maml classifier": (rl.MAML(rl.Classifier(hidden_sizes=(8,)), num_envs=4, first_order=True), "few-shot-digits", 16),
    "maml ppo": (rl.MAML(CLIPPED, num_envs=3, inner_rate=0.1, meta_epochs=2), "navigation-short", 960),
    "meta sgd": (
        rl.MetaSGD(rl.Regressor(hidden_sizes=(8,)), num_envs=4, rates_max_grad_norm=1.0),
        "sinusoid",
        16,
    ),
    "protonet": (rl.ProtoNet(num_envs=4, hidden_sizes=(8,)), "few-shot-digits", 16),
    "truncated": (rl.LearnedOptimizer(estimator="truncated", **LEARNED), "quadratics", 100),
    "pes": (rl.LearnedOptimizer(estimator="pes", **LEARNED), "quadratics", 100),
}
"""Settings, family and steps. The optimizers' problems are renewed every second iteration, so a kill at an odd one
falls into the middle of unrolls."""


def train(folder: str, name: str, kill_at: int = 0) -> rl.Run:
    """Train, with a checkpoint after every line of metrics; killed without warning where asked."""

    def kill(run: rl.Run, line: dict[str, Any]) -> None:
        if kill_at and line["iteration"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    settings, family, steps = CASES[name]
    budget = rl.Budget(steps=steps, eval_every=steps // 4, eval_episodes=2, final_episodes=2,
                       checkpoint_seconds=0.0, log_points=8)  # fmt: skip
    return rl.train(settings, family, seeds=2, out=folder, budget=budget, callbacks=[kill], threads=1)
