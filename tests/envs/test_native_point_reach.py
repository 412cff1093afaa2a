"""Point reach: moves, goals, and rewards that another goal would have had."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlmeta.envs.native import NativeWorld, PointReach, register
from rlmeta.errors import SettingError
from rlmeta.functional import random


def test_transitions_equal_plain_python() -> None:
    env = PointReach(stride=0.2, radius=0.3)
    world = NativeWorld(env, (2,), 3)
    state = world.reset(random.make_keys([0, 1]))
    actions = 3 * torch.rand(200, 2, 3, 2, generator=torch.Generator().manual_seed(0)) - 1.5
    reached = 0
    for action in actions:
        position, goal, elapsed = state["env"]["position"], state["env"]["goal"], state["elapsed"]
        state, transition = world.step(state, action)
        for i in range(2):
            for n in range(3):
                place = [
                    min(max(float(position[i, n, k]) + 0.2 * min(max(float(action[i, n, k]), -1), 1), -1), 1)
                    for k in range(2)
                ]
                near = math.dist(place, goal[i, n].tolist()) <= 0.3
                seen = {name: part[i, n] for name, part in transition.next_observation.items()}
                torch.testing.assert_close(seen["observation"], torch.tensor(place, dtype=torch.float32))
                assert torch.equal(seen["achieved_goal"], seen["observation"])
                assert torch.equal(seen["desired_goal"], goal[i, n].float())
                assert float(transition.reward[i, n]) == near == bool(transition.terminated[i, n])
                assert bool(transition.truncated[i, n]) == (int(elapsed[i, n]) == 49)
                reached += near
    assert reached > 5


def test_goals_lie_around_the_start() -> None:
    goal = NativeWorld(PointReach(), (), 2000).reset(random.make_keys([0])[0])["env"]["goal"]
    distance = goal.norm(dim=-1)
    assert 0.5 <= float(distance.min()) < 0.51 and 0.99 < float(distance.max()) <= 1
    assert float(goal.mean(0).abs().max()) < 0.06


def test_another_goal_is_paid_as_the_step_would_have_paid_it() -> None:
    """What is stored of a step gives its reward again, and that of the place that was reached is 1."""
    env = PointReach(radius=0.2, nearest=0.0)
    world = NativeWorld(env, (), 500)
    state, paid = world.reset(random.make_keys([0])[0]), 0.0
    for t in range(30):
        state, transition = world.step(state, 2 * random.uniform(torch.tensor(1), "a", t, (500, 2)) - 1)
        seen = transition.next_observation
        assert torch.equal(env.compute_reward(seen["achieved_goal"], seen["desired_goal"]), transition.reward)
        assert torch.equal(env.compute_terminated(seen["achieved_goal"], seen["desired_goal"]), transition.terminated)
        assert bool((env.compute_reward(seen["achieved_goal"], seen["achieved_goal"]) == 1).all())
        paid += float(transition.reward.sum())
    assert paid > 10


def test_at_the_radius_itself_too() -> None:
    """Where the precision of what is stored decides."""
    env, count = PointReach(), 2000
    noise = random.uniform(torch.tensor(0), "a", 0, (2, count), torch.float64)
    distance, angle = 0.05 * (1 + 1e-7 * (noise[0] - 0.5)), 2 * math.pi * noise[1]
    goal = torch.stack((distance * angle.cos(), distance * angle.sin()), -1)
    new, reward, _ = env.step({"position": 0 * goal, "goal": goal}, 0 * goal, noise[:0].T, {})
    seen = env.observe(new)
    assert torch.equal(env.compute_reward(seen["achieved_goal"], seen["desired_goal"]), reward)
    assert 0 < float(reward.mean()) < 1


def test_random_play_does_not_reach_it_and_a_straight_walk_does() -> None:
    world = NativeWorld(PointReach(), (), 1000)
    for straight in (False, True):
        state, total = world.reset(random.make_keys([0])[0]), torch.zeros(1000)
        playing = torch.ones(1000, dtype=torch.bool)
        for t in range(50):
            seen = world.observation(state)
            action = 20 * (seen["desired_goal"] - seen["observation"])
            action = action if straight else 2 * random.uniform(torch.tensor(1), "a", t, (1000, 2)) - 1
            state, transition = world.step(state, action)
            total += transition.reward * playing
            playing &= ~transition.memory_reset
        assert float(total.mean()) == 1 if straight else float(total.mean()) < 0.01


def test_gymnasiums_has_goal_envs_interface() -> None:
    env: Any = gym.make(register.gym_id("PointReach-v0"), constants={"radius": 0.4, "nearest": 0.0, "stride": 0.2})
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    goals, paid = env.unwrapped, []
    for _ in range(50):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        own = observation["achieved_goal"], observation["desired_goal"], info
        assert (goals.compute_reward(*own), goals.compute_terminated(*own)) == (reward, terminated)
        paid.append(reward)
        if terminated or truncated:
            env.reset()
    assert 0 < sum(paid) < 50
    many = np.array([[0.0, 0.0], [0.1, 0.2], [1.0, 0.0]])
    assert goals.compute_reward(many, 0 * many, {}).tolist() == [1.0, 1.0, 0.0]
    assert goals.compute_terminated(many, 0 * many, {}).tolist() == [True, True, False]


def test_a_radius_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"radius=0\.0"):
        PointReach(radius=0.0)
