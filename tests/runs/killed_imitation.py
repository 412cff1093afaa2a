"""Imitate, or learn from changed rewards, in a process that is killed, see `tests/runs/killer.py`."""

from __future__ import annotations

import os
import signal
from typing import Any

import rlmeta as rl
from tests.imitation.test_gail import TINY, cartpole
from tests.imitation.test_irl import walks

SMALL: dict[str, Any] = {
    name: TINY[name] for name in ("num_envs", "num_steps", "batch_size", "num_epochs", "hidden_sizes")
}
REWARDS = (rl.PotentialShaping(lambda observation: observation[..., 0].abs()), rl.EpisodicCounts(resolution=0.05))
DEMONSTRATIONS = {"gail": cartpole(), "gail gymnasium": cartpole(), "cloning": cartpole(), "irl": walks(states=12)}
"""What the runs were given that no configuration holds."""


def case(name: str) -> tuple[Any, Any, int]:
    """Settings, problem and steps."""
    if name == "irl":
        return rl.IRL(DEMONSTRATIONS[name], num_steps=2), "GridWorld-v0", 32
    if name == "cloning":
        return rl.BehaviourCloning(DEMONSTRATIONS[name], num_steps=4, batch_size=8), "CartPole-v1", 64
    if name == "rewards":
        return rl.PPO(**SMALL, normalise_reward=True, rewards=REWARDS), "MountainCar-v0", 1024
    task = rl.task("CartPole-v1", native=False) if name == "gail gymnasium" else "CartPole-fixed"
    settings = rl.GAIL(demonstrations=DEMONSTRATIONS[name], warm_start=5, **TINY, rewards=REWARDS[1:])
    return settings, task, 1024


def own(name: str) -> dict[str, Any]:
    """What is given again."""
    found: dict[str, Any] = {} if name not in DEMONSTRATIONS else {"demonstrations": DEMONSTRATIONS[name]}
    if name == "rewards":
        found["rewards"] = REWARDS
    elif name.startswith("gail"):
        found["rewards"] = REWARDS[1:]
    return found


def train(folder: str, name: str, kill_at: int = 0) -> rl.Run:
    """Train, with a checkpoint after every line of metrics; killed without warning where asked."""

    def kill(run: rl.Run, line: dict[str, Any]) -> None:
        if kill_at and line["iteration"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    settings, problem, steps = case(name)
    budget = rl.Budget(steps=steps, eval_every=steps // 4, eval_episodes=2, final_episodes=2,
                       checkpoint_seconds=0.0, log_points=8)  # fmt: skip
    return rl.train(settings, problem, seeds=2, out=folder, budget=budget, callbacks=[kill], threads=1)
