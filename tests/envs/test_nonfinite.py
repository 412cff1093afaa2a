"""NaN and infinity from a user's native environment: the warning names the environment, row and step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.native import CartPole, NativeEnv, NativeWorld, Physics
from rlmeta.functional.random import make_keys

KEYS = make_keys([0, 1])
ACTIONS = torch.ones(2, 3, dtype=torch.int64)


@dataclass(frozen=True)
class Counts(NativeEnv):
    """Environment that counts the steps of its episodes."""

    observed: float = math.inf
    """The time from which the observation is NaN."""
    rewarded: float = math.inf
    """That at which the reward is infinite."""
    max_episode_steps: int | None = 4

    @property
    def observation_space(self) -> gym.Space:
        return gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    @property
    def action_space(self) -> gym.Space:
        return gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Physics) -> dict[str, Tensor]:
        return {"time": torch.zeros(noise.shape[:-1], dtype=torch.float64)}

    def step(self, state: Any, action: Tensor, noise: Tensor, physics: Physics) -> Any:
        time = state["time"] + action
        reward = torch.where(time == physics.get("rewarded", self.rewarded), torch.inf, 1.0).float()
        return {"time": time}, reward, torch.zeros_like(time, dtype=torch.bool)

    def observe(self, state: Any) -> Tensor:
        time = state["time"]
        shown = torch.where(time >= self.observed, torch.nan, time).float()
        return torch.stack((torch.zeros_like(shown), shown), -1)


def _messages(env: NativeEnv, steps: int, action: Tensor = ACTIONS, **about: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = NativeWorld(env, (2,), 3, **about)
        state = world.reset(KEYS)
        for _ in range(steps):
            state, _ = world.step(state, action)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("env", "what", "when"),
    [
        (Counts(observed=2), "an observation", "at step 2 of its episode"),
        (Counts(observed=4), "an observation", "at step 4 of its episode"),
        (Counts(observed=0), "an observation", "at its reset"),
        (Counts(rewarded=3), "a reward", "at step 3 of its episode"),
        (Counts(rewarded=2, observed=2), "a reward", "at step 2 of its episode"),
    ],
)
def test_the_row_and_the_step_are_named_once(env: NativeEnv, what: str, when: str) -> None:
    lone = torch.zeros(2, 3, dtype=torch.int64)
    lone[1, 1] = 1
    (message,) = _messages(env, 12, lone if "reset" not in when else ACTIONS)
    row = "row 4, environment 1 of learner 1" if "reset" not in when else "row 0, environment 0 of learner 0"
    assert message == (
        f"environment 'Counts' gave {what} that is not finite in {row}, {when}: a learner that learns from it is not "
        "finite any more; correct the environment"
    )


@dataclass(frozen=True)
class Sours(Counts):
    """Environment of which every tenth episode begins with NaN."""

    reset_noise = 1

    def reset(self, noise: Tensor, physics: Physics) -> dict[str, Tensor]:
        return {"time": torch.where(noise[..., 0] < 0.1, torch.nan, 0.0).double()}


def test_an_episode_that_begins_so_after_another_is_named() -> None:
    """The NaN is not attributed to the end of the previous episode."""
    world = NativeWorld(Sours(), (2,), 3)
    state = world.reset(KEYS)
    assert world.observation(state).isfinite().all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while not caught:
            state, transition = world.step(state, ACTIONS)
            assert transition.next_observation.isfinite().all()
    assert "at its reset" in str(caught[0].message)
    row = int((~transition.observation.isfinite()).any(-1).flatten().nonzero()[0])
    assert f"in row {row}, environment {row % 3} of learner {row // 3}" in str(caught[0].message)


def test_nothing_is_said_of_finite_numbers_and_nothing_is_kept_of_rlmetas_own() -> None:
    assert _messages(Counts(), 12) == []
    assert "nonfinite" not in NativeWorld(CartPole(), (2,), 3).reset(KEYS)


@pytest.mark.parametrize("steps", [4, 40], ids=["as it is", "recorded"])
@pytest.mark.parametrize("spoils", ["observed", "rewarded"])
def test_training_names_the_environment_before_the_learner(spoils: str, steps: int) -> None:
    """Recorded steps do not check for NaN themselves; one learner of two gets a number that is not finite."""
    settings = rl.PPO(num_envs=2, num_steps=steps, batch_size=2 * steps, num_epochs=1, hidden_sizes=(4,))
    env = dataclasses.replace(Counts(max_episode_steps=40), **{spoils: 4.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = rl.train(settings, rl.task(env), seeds=2, steps=2 * steps * 4, threads=1)
    messages = [str(warning.message) for warning in caught]
    what = {"observed": "an observation", "rewarded": "a reward"}[spoils]
    assert not run.state["active"].any()
    assert messages[0].startswith(f"environment 'Counts' gave {what} that is not finite in row ")
    assert any("is no longer finite" in message for message in messages[1:])


def test_a_stream_looks_at_the_task_it_is_in() -> None:
    stream = rl.stream([rl.task(Counts(), name="a"), rl.task(Counts(rewarded=2.0), name="b")])
    world: Any = stream.world((2,), 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in (0, 1):
            world.select(torch.full((2,), task))
            state = world.reset(KEYS)
            for _ in range(3):
                noise, _ = world.predraw_noise(state)
                state, _ = world.step(state, ACTIONS, noise)
            assert caught == []
            world.warn_of_nonfinite(state)
            assert len(caught) == task
