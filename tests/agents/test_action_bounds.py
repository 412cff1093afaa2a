"""Continuous actions: whatever an environment counts in, an agent acts on its scale."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents import A2C, PPO, REINFORCE
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.task import task
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.imitation import GAIL, BehaviourCloning
from rlmeta.imitation.gail import Discriminator
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from tests.agents.worlds import start, train

BOUNDS = [(-1.0, 1.0), (0.0, 1000.0), (-0.001, 0.001), (50.0, 150.0)]
SMALL = {
    "ppo": PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, learning_rate=3e-3, hidden_sizes=(16,)),
    "gsde": PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, learning_rate=3e-3, hidden_sizes=(16,),
                state_dependent_exploration=True, noise_hold=1, initial_log_std=-1.5),
    "a2c": A2C(num_envs=8, num_steps=5, learning_rate=1e-2, hidden_sizes=(16,)),
    "reinforce": REINFORCE(num_envs=8, num_steps=8, learning_rate=1e-2, hidden_sizes=(16,)),
}  # fmt: skip


class Reach(gym.Env):
    """One step: a reward of 1 less the distance to a point at three quarters of the way from `low` to `high`."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, low: float, high: float, span: float = 0.0) -> None:
        self.action_space = gym.spaces.Box(low, high, (2,), np.float32)
        self.low, self.span = low, span or high - low

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        place = (action.astype(np.float64) - self.low) / self.span
        return np.ones(1, np.float32), float(1 - np.abs(place - 0.75).mean()), True, False, {}


def greedy(agent, state, problem):
    world = problem.world(tuple(state["key"].shape), 1)
    try:
        return evaluate(agent, state["params"], world, random.fold(state["key"], "test"), 2).returns.mean(-1)
    finally:
        world.close()


@pytest.mark.parametrize(("name", "bounds"), [*zip(SMALL, BOUNDS), *zip(SMALL, BOUNDS[::-1])])
def test_learns_a_point_between_any_bounds(name, bounds):
    problem = task(partial(Reach, *bounds), name="reach")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        agent, state = train(SMALL[name], problem, 40)
    assert (greedy(agent, state, problem) > 0.8).all()


def test_squashed_actions_learn_it_too():
    problem = task(partial(Reach, *BOUNDS[1]), name="reach")
    squashing = replace(SMALL["ppo"], action_bounds="squash", entropy_coefficient=0.01)
    agent, state = train(squashing, problem, 40)
    assert (greedy(agent, state, problem) > 0.8).all()


def test_one_bound_is_where_a_unit_begins():
    problem = task(partial(Reach, 300.0, np.inf, 2.0), name="half")
    agent, state = train(SMALL["a2c"], problem, 60)
    assert (greedy(agent, state, problem) > 0.85).all()


def test_the_unit_changes_nothing_but_the_unit():
    """From the same seed, on a scale that float32 multiplies exactly: actions are twice as large, weights are equal."""
    one, two = (
        train(SMALL["ppo"], task(partial(Reach, -b, b), name="reach"), 3)[1]["params"]["weights"] for b in (1.0, 2.0)
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)


def test_actions_are_in_the_environments_units_and_their_density_in_the_policys():
    agent, state, world = start(SMALL["ppo"], task(partial(Reach, 50.0, 150.0), name="reach"))
    state, rollout = collect(agent, state, world, 200)
    action = rollout["action"]
    assert 90 < action.mean() < 110 and 40 < action.std() < 60
    batch = {"observation": rollout["observation"].flatten(1, 2), "action": action.flatten(1, 2)}
    standard = torch.distributions.Normal(0.0, 1.0).log_prob((action.flatten(1, 2) - 100) / 50).sum(-1)
    torch.testing.assert_close(agent.log_prob(state["params"], batch), standard, rtol=0, atol=0.2)
    world.close()


def test_exploration_noise_is_in_the_policys_unit():
    problem = task(partial(Reach, 0.0, 1000.0), name="reach")
    agent, state, world = start(replace(SMALL["reinforce"], action_noise=2.0, initial_log_std=-9.0), problem)
    _, rollout = collect(agent, state, world, 100)
    assert 900 < rollout["action"].std() < 1100
    world.close()


def test_raw_units_are_warned_of_where_they_do_harm():
    raw = replace(SMALL["a2c"], action_bounds="clip")
    for bounds in BOUNDS[1:]:
        with pytest.warns(RuntimeWarning, match='far from the bounds.*action_bounds="scale"'):
            raw.bind(Reach.observation_space, gym.spaces.Box(*bounds, (1,), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for low, high in ((-1, 1), (-2, 2), (0, 1), (-np.inf, np.inf), (-1, np.inf)):
            raw.bind(Reach.observation_space, gym.spaces.Box(low, high, (1,), np.float32))


def test_squashing_into_no_bounds_is_refused():
    for space in (gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(1, 1, (1,), np.float32)):
        with pytest.raises(SettingError, match='action_bounds="scale"'):
            PPO(action_bounds="squash").bind(Reach.observation_space, space)
    with pytest.raises(SettingError, match="options for a Box"):
        PPO(action_bounds="squash").bind(Reach.observation_space, gym.spaces.Discrete(2))


def test_a_run_acts_in_the_environments_units():
    budget = rl.Budget(steps=1280, eval_every=2560, final_episodes=2)
    run = rl.train(SMALL["a2c"], task(partial(Reach, 50.0, 150.0), name="reach"), seeds=1, budget=budget)
    action = run.act(np.ones(1, np.float32))
    assert action.dtype == np.float32 and 100 < action.mean() < 140
    shown = rl.record(run, 2)
    assert (shown.action >= 50).all() and (shown.action <= 150).all()


# ------------------------------------------------------------------------------------------------------ imitation


def shown_between(low: float, high: float, episodes: int = 64) -> Demonstrations:
    """One-step episodes that act around three quarters of the way."""
    generator = torch.Generator().manual_seed(0)
    place = 0.75 + 0.02 * torch.randn(episodes, 2, generator=generator, dtype=torch.float64)
    space = gym.spaces.Box(low, high, (2,), np.float32)
    return Demonstrations(
        observation=torch.ones(2 * episodes, 1),
        action=(low + place * (high - low)).float(),
        reward=torch.ones(episodes),
        lengths=torch.ones(episodes, dtype=torch.int64),
        terminated=torch.ones(episodes, dtype=torch.bool),
        truncated=torch.zeros(episodes, dtype=torch.bool),
        observation_space=Reach.observation_space,
        action_space=space,
    )


@pytest.mark.parametrize("bounds", BOUNDS)
def test_cloning_reaches_what_was_shown(bounds):
    problem = task(partial(Reach, *bounds), name="reach")
    cloning = BehaviourCloning(shown_between(*bounds), learning_rate=1e-2, hidden_sizes=(16,))
    agent, state = train(cloning, problem, 6)
    assert (greedy(agent, state, problem) > 0.93).all()


def test_the_discriminator_sees_actions_in_their_bounds_unit():
    found = []
    for low, high in BOUNDS:
        judge = Discriminator(shown_between(low, high), (8,), absorbing=False)
        place = torch.linspace(-0.2, 1.2, 5, dtype=torch.float64).unsqueeze(-1).expand(5, 2)
        found.append(judge.encode(torch.ones(5, 1), (low + place * (high - low)).float()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    assert (found[0][0, 1:] - found[0][-1, 1:]).abs().min() > 5  # the two ends are told apart


def test_gail_learns_between_wide_bounds():
    problem = task(partial(Reach, 0.0, 1000.0), name="reach")
    imitating = GAIL(demonstrations=shown_between(0.0, 1000.0), num_envs=4, num_steps=16, batch_size=32, num_epochs=4,
                     learning_rate=3e-3, hidden_sizes=(16,), discriminator_updates=10, form="logit",
                     discriminator_hidden_sizes=(16,), discriminator_batch_size=32)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that episodes terminate
        agent, state = train(imitating, problem, 50)
    assert (greedy(agent, state, problem) > 0.8).all()
