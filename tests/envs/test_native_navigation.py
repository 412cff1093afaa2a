"""2D navigation, transition by transition."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import NativeWorld, Navigation
from rlmeta.functional import random


def test_steps_cost_the_distance_and_end_at_the_goal():
    goal = {"goal_x": torch.tensor([0.2, -0.5]), "goal_y": torch.tensor([-0.1, 0.5])}
    world = NativeWorld(Navigation(), (2,), 1, goal)
    state = world.reset(random.make_keys([0, 1]))
    assert world.observation(state).abs().max() == 0
    state, t = world.step(state, torch.tensor([[[1.0, -1.0]], [[-3.0, 0.5]]]))  # the second is clipped
    torch.testing.assert_close(t.next_observation[:, 0], torch.tensor([[0.1, -0.1], [-0.1, 0.05]]))
    torch.testing.assert_close(
        t.reward[:, 0], torch.tensor([-0.1, -float(torch.hypot(torch.tensor(0.4), torch.tensor(0.45)))])
    )
    assert not t.terminated.any()
    state, t = world.step(state, torch.tensor([[[0.95, 0.0]], [[0.0, 0.0]]]))
    assert t.terminated[:, 0].tolist() == [True, False]
    assert t.reward[0, 0] == pytest.approx(-0.005, abs=1e-6)
    assert world.observation(state)[0].abs().max() == 0  # the next episode


def test_an_episode_has_a_hundred_steps():
    world = NativeWorld(Navigation(goal_x=5.0), (1,), 1)
    state = world.reset(random.make_keys([0]))
    for i in range(100):
        state, t = world.step(state, torch.zeros(1, 1, 2))
        assert bool(t.truncated) == (i == 99)


def test_the_family_draws_goals_in_the_square():
    family = rl.family("navigation")
    physics = family.sample(random.make_keys(range(2000)))
    for name in ("goal_x", "goal_y"):
        assert physics[name].abs().max() <= 0.5 and physics[name].std() == pytest.approx(1 / 12**0.5, rel=0.05)
