"""Train in a process that is killed at a chosen iteration, see `tests/runs/killer.py`.

On a stream, where the task is one, with lifelong methods behind a plus: "split-digits+ewc+replay".
"""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import rlmeta as rl
from rlmeta.envs import streams
from tests.agents.worlds import Target

SETTINGS: dict[str, Any] = {
    "ppo": rl.PPO(num_envs=2, num_steps=32, batch_size=32, num_epochs=2, normalise_reward=True, hidden_sizes=(8,)),
    "a2c": rl.A2C(num_envs=2, num_steps=8, normalise_advantage=True, hidden_sizes=(8,)),
    "dqn": rl.DQN(num_envs=2, num_steps=8, gradient_steps=2, capacity=200, learning_starts=32, target_every=3,
                  n_steps=2, batch_size=8, average_rate=0.3, hidden_sizes=(8,)),
    "reinforce": rl.REINFORCE(num_envs=2, num_steps=32, action_noise=0.1, hidden_sizes=(8,)),
    "classifier": rl.Classifier(batch_size=16, num_steps=2, hidden_sizes=(12,)),
}  # fmt: skip
STEPS = {"ppo": 1024, "a2c": 512, "dqn": 512, "reinforce": 1024, "classifier": 128}
METHODS: dict[str, Any] = {
    "ewc": rl.EWC(strength=100.0, samples=32),
    "gem": rl.GEM(memory=16),
    "agem": rl.AGEM(memory=16),
    "packnet": rl.PackNet(),
    "hat": rl.HAT(),
    "generative_replay": rl.GenerativeReplay(latent=2, hidden_sizes=(8,)),
    "replay": rl.Replay(size=20, batch_size=8),
}


def problem(name: str) -> Any:
    """A native task, one of Box2D, a user's own environment, or a stream."""
    if name == "own":
        return rl.task(partial(Target, "discrete"), name="own")
    return rl.stream(name) if streams.is_stream(name) else rl.task(name)


def train(folder: str, agent: str, task: str, kill_at: int = 0) -> rl.Run:
    """Train, with a checkpoint after every line of metrics; killed without warning where asked."""

    def kill(run: rl.Run, line: dict[str, Any]) -> None:
        if kill_at and line["iteration"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    name, *methods = task.split("+")
    steps = STEPS[agent] // 2 if methods and agent == "ppo" else STEPS[agent]
    budget = rl.Budget(steps=steps, eval_every=steps // 4, eval_episodes=2, final_episodes=2,
                       checkpoint_seconds=0.0, log_points=8)  # fmt: skip
    return rl.train(
        SETTINGS[agent],
        problem(name),
        seeds=2,
        out=folder,
        budget=budget,
        callbacks=[kill],
        threads=2,
        lifelong=[METHODS[method] for method in methods],
    )
