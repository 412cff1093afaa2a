"""Time limits of episodes: their declaration, warnings without one, and their round trip through a configuration."""

from __future__ import annotations

import json
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import TimeLimit

import rlmeta as rl
from rlmeta.envs.native import Bandit, CliffWalking
from rlmeta.envs.task import Task
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional.random import make_keys
from rlmeta.runs.configuration import problem_again


class Endless(gym.Env[Any, Any]):
    """Environment whose episodes never end."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, step_reward: float = 1.0) -> None:
        self.step_reward = step_reward

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), self.step_reward, False, False, {}


def _first_cut(task: Task) -> int:
    """Number of steps after which the task's first episode is truncated."""
    world = task.world((), 1)
    state = world.reset(make_keys([0])[0])
    for step in range(1, 60):
        state, transition = world.step(state, torch.zeros(1, dtype=torch.int64))
        if bool(transition.truncated.any()):
            world.close()
            assert world.max_episode_steps == step
            return step
    raise AssertionError("no end")


def _again(task: Task, source: Any = None) -> Any:
    """Task after a round trip through its configuration."""
    return problem_again(json.loads(json.dumps(task.describe())), source, "run")


LIMITED: dict[str, Any] = {
    "native": lambda n: rl.task("CliffWalking-v1", max_episode_steps=n),
    "native object": lambda n: rl.task(CliffWalking(), max_episode_steps=n),
    "gymnasium": lambda n: rl.task("CliffWalking-v1", native=False, max_episode_steps=n),
    "with a limit": lambda n: rl.task("CartPole-v1", native=False, max_episode_steps=n),
    "spec": lambda n: rl.task(gym.spec("CliffWalking-v1"), max_episode_steps=n),
    "function": lambda n: rl.task(Endless, max_episode_steps=n),
    "function with settings": lambda n: rl.task(Endless, settings={"step_reward": 2.0}, max_episode_steps=n),
    "limited function": lambda n: rl.task(lambda: TimeLimit(Endless(), 50), max_episode_steps=n),
    "workers": lambda n: rl.task(Endless, mode="async", max_episode_steps=n),
}


@pytest.mark.parametrize("kind", LIMITED)
def test_a_task_takes_the_limit_of_its_episodes(kind: str) -> None:
    task = LIMITED[kind](7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert _first_cut(task) == 7
        again = _again(task, task.source if callable(task.source) else None)
        assert again.describe() == task.describe() and _first_cut(again) == 7


def test_a_registered_limit_may_be_raised() -> None:
    assert rl.task("CartPole-v1", native=False, max_episode_steps=900).world((), 1).max_episode_steps == 900


def test_a_limit_that_changes_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"max_episode_steps is 60, but .* after 50 steps by itself"):
        rl.task(lambda: TimeLimit(Endless(), 50), max_episode_steps=60).world((), 1)
    with pytest.raises(SettingError, match=r"max_episode_steps is 60, but .* VectorEnv"):
        task = rl.task(lambda num_envs: SyncVectorEnv([Endless] * num_envs), max_episode_steps=60)
        task.world((), 1)
    with pytest.raises(SettingError, match="max_episode_steps is 60, and 50 in the settings"):
        rl.task("CliffWalking-v1", settings={"max_episode_steps": 50}, max_episode_steps=60)


@pytest.mark.parametrize("limit", [0, -3, 2.5, True, "many"])
@pytest.mark.parametrize("source", ["CliffWalking-v1", Endless, Bandit()], ids=["name", "function", "native"])
def test_a_limit_is_a_count(source: Any, limit: Any) -> None:
    with pytest.raises(SettingError, match="max_episode_steps is"):
        rl.task(source, max_episode_steps=limit)


@pytest.mark.parametrize(("name", "value"), [("max_episode_steps", "7"), ("worker_timeout", None)])
def test_a_broken_limit_of_a_configuration_is_named(name: str, value: Any) -> None:
    described = rl.task(Endless, max_episode_steps=7, worker_timeout=5.0).describe()
    with pytest.raises(CheckpointError, match=f"{name} is {value!r}"):
        problem_again({**described, name: value}, Endless, "run")


def test_a_configuration_keeps_the_timeout() -> None:
    task = rl.task(Endless, mode="async", worker_timeout=5.0)
    assert _again(task, Endless).worker_timeout == 5.0
    assert _again(rl.task("CliffWalking-v1", native=False, worker_timeout=7)).worker_timeout == 7


@pytest.mark.parametrize(
    "task",
    [
        lambda: rl.task(Endless),
        lambda: rl.task("CliffWalking-v1"),
        lambda: rl.stream([rl.task(CliffWalking(), name="a"), rl.task(CliffWalking(), name="b")]),
    ],
    ids=["own", "native", "stream"],
)
def test_nothing_is_said_of_a_limit_before_an_episode_needed_one(task: Any) -> None:
    """Episodes may end by themselves; an evaluation warns if one did not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task().world((), 2).close()


def test_training_says_which_evaluation_was_cut_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmeta.learning.evaluate.EVALUATION_LIMIT", 30)
    settings = rl.PPO(num_envs=2, num_steps=8, batch_size=16, num_epochs=1, hidden_sizes=(4,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        budget = rl.Budget(steps=32, eval_every=32, final_episodes=2, eval_episodes=2)
        rl.train(settings, rl.task(Endless), budget=budget, threads=1)
    messages = [str(warning.message).partition(" did not")[0] for warning in caught]
    assert messages == ["environment 'Endless': 2 of 2 evaluation episodes"]
