"""Action masks: ends that allow nothing, agents that share a network, and what no head could obey."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents import A2C, DQN, PPO, REINFORCE
from rlmeta.envs.task import task
from rlmeta.errors import SpaceError
from rlmeta.functional import tree
from rlmeta.learning.collect import collect
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.minibatch import flatten_time
from tests.agents.worlds import Target, start, train

LEARNERS = {
    "dqn": DQN(num_envs=4, num_steps=8, gradient_steps=4, batch_size=32, capacity=500, learning_starts=32,
               hidden_sizes=(16,), learning_rate=5e-3, n_steps=2, gamma=0.5, exploration_fraction=1.0),
    "dqn, not double": DQN(num_envs=4, num_steps=8, gradient_steps=4, batch_size=32, capacity=500, learning_starts=32,
                           hidden_sizes=(16,), learning_rate=5e-3, double=False, gamma=0.5, exploration_fraction=1.0),
    "ppo": PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, learning_rate=3e-3, hidden_sizes=(16,)),
    "ppo, shared": PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, learning_rate=3e-3, hidden_sizes=(16,),
                       share_network=True),
    "a2c": A2C(num_envs=8, num_steps=5, learning_rate=1e-2, hidden_sizes=(16,)),
    "reinforce": REINFORCE(num_envs=8, num_steps=12, learning_rate=1e-2, hidden_sizes=(16,)),
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", LEARNERS)


class Board(gym.Env):
    """Five moves, a reward of 1 for move 1; when the game is over no move is allowed, as in board games.

    Args:
        end: "terminated" or "truncated".
        stuck: let the third position, too, allow nothing.
        spaces: of the moves, and how many entries their mask has.
    """

    def __init__(self, end: str = "terminated", stuck: bool = False, spaces=None) -> None:
        self.end, self.stuck = end, stuck
        self.action_space, self.entries = spaces or (gym.spaces.Discrete(3), 3)
        mask = gym.spaces.MultiBinary(self.entries)
        place = gym.spaces.Box(0, 10, (1,), np.float32)
        self.observation_space = gym.spaces.Dict({"place": place, "action_mask": mask})

    def _observe(self):
        over = self.t >= 5 or (self.stuck and self.t == 2)
        mask = np.zeros(self.entries, np.int8) if over else np.ones(self.entries, np.int8)
        if not over:
            mask[0] = 0
        return {"place": np.array([self.t / 5], np.float32), "action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action):
        first = int(np.asarray(action).flat[0])
        assert first != 0 or (self.stuck and self.t == 2), "a masked action was taken"
        self.t += 1
        over = self.t >= 5
        ended = over and self.end == "terminated"
        return self._observe(), float(first == 1), ended, over and not ended, {}


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@BY_NAME
def test_an_end_that_allows_nothing_stops_no_learner(name, end):
    problem = task(partial(Board, end), name="board")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        agent, state = train(LEARNERS[name], problem, 25)
    assert state["active"].all()
    assert all(leaf.isfinite().all() for leaf in tree.leaves(state["params"]["weights"]))
    first = {"place": torch.zeros(2, 1, 1), "action_mask": torch.tensor([0, 1, 1]).expand(2, 1, 3)}
    action, _ = agent.act(state["params"], first, {}, state["key"], deterministic=True)
    assert (action == 1).all()


@pytest.mark.parametrize("double", [True, False])
def test_values_where_nothing_is_allowed(double):
    """After a terminal state comes nothing; after one that a time limit cut, the value of the best of all actions."""
    agent, state, world = start(replace(LEARNERS["dqn"], double=double), task(Board, name="board"))
    p, nothing, everything = state["params"], torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
    before, after = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    chosen = agent.forward(agent.q, "q", p, {"place": before, "action_mask": everything})[..., 1]
    best = agent.forward(agent.q, "q", p, {"place": after, "action_mask": everything}).amax(-1)
    for discount, target in ((0.0, torch.full((2, 1), 0.25)), (0.5, 0.25 + 0.5 * best)):
        batch = {
            "observation": {"place": before, "action_mask": everything},
            "next_observation": {"place": after, "action_mask": nothing},
            "action": torch.ones(2, 1, dtype=torch.int64),
            "reward": torch.full((2, 1), 0.25),
            "discount": torch.full((2, 1), discount),
            "valid": torch.ones(2, 1, dtype=torch.bool),
        }
        loss = agent.losses(p, batch, StepContext())["q"]
        torch.testing.assert_close(loss, 0.5 * (chosen - target).square().mean(-1))
    world.close()


@BY_NAME
def test_a_position_in_between_that_allows_nothing_is_told(name):
    problem = task(partial(Board, stuck=True), name="board")
    with pytest.warns(RuntimeWarning, match="allows no action"):
        _, state = train(LEARNERS[name], problem, 10)
    assert state["active"].all()


@pytest.mark.parametrize("name", ["ppo", "ppo, shared", "a2c", "reinforce"])
def test_masks_of_several_choices(name):
    problem = task(partial(Board, spaces=(gym.spaces.MultiDiscrete([3, 2]), 5)), name="board")
    _, state = train(LEARNERS[name], problem, 10)  # the environment asserts
    assert state["active"].all()


@pytest.mark.parametrize("share", [False, True])
def test_what_is_learned_from_knows_the_mask_that_was_acted_under(share):
    problem = task(partial(Target, "discrete", masked=True), name="masked")
    agent, state, world = start(replace(LEARNERS["ppo"], share_network=share), problem)
    state, rollout = collect(agent, state, world, 16)
    batch = flatten_time(agent.credit(state["params"], rollout, {"task": rollout["reward"]}), 1)
    torch.testing.assert_close(batch["old_log_prob"], torch.zeros(2, 64))  # one action is allowed, so it is certain
    torch.testing.assert_close(agent.log_prob(state["params"], batch), batch["old_log_prob"])
    world.close()


def test_exploration_on_top_of_the_policy_obeys_the_mask():
    problem = task(partial(Target, "discrete", masked=True), name="masked")
    train(replace(LEARNERS["reinforce"], action_noise=1.0), problem, 2)  # the environment asserts
    train(replace(LEARNERS["dqn"], epsilon_end=1.0), problem, 2)


def test_a_run_acts_on_an_end_too():
    budget = rl.Budget(steps=256, eval_every=512, final_episodes=2)
    run = rl.train(LEARNERS["dqn"], task(Board, name="board"), seeds=1, budget=budget)
    over = {"place": np.ones(1, np.float32), "action_mask": np.zeros(3, np.int8)}
    assert run.act(over) in (0, 1, 2) and run.act(over, deterministic=False) in (0, 1, 2)
    assert run.scores.isfinite().all()


def test_masks_that_no_head_could_obey_are_refused():
    mask, other = gym.spaces.MultiBinary(3), gym.spaces.Box(0, 1, (1,), np.float32)
    flat = gym.spaces.Dict({"action_mask": mask, "place": other})
    for agent in (PPO(), A2C(), REINFORCE()):
        with pytest.raises(SpaceError, match="for Discrete and MultiDiscrete actions"):
            agent.bind(flat, gym.spaces.Box(-1, 1, (3,), np.float32))
        with pytest.raises(SpaceError, match="for Discrete and MultiDiscrete actions"):
            agent.bind(flat, gym.spaces.MultiBinary(3))
        with pytest.raises(SpaceError, match=r"expected the shape \(4,\)"):
            agent.bind(flat, gym.spaces.MultiDiscrete([2, 2]))
    for agent in (PPO(), DQN()):
        with pytest.raises(SpaceError, match=r"expected the shape \(4,\)"):
            agent.bind(flat, gym.spaces.Discrete(4))
        for deep in (gym.spaces.Dict({"board": flat}), gym.spaces.Tuple((flat, other))):
            with pytest.raises(SpaceError, match="move it into the outermost Dict"):
                agent.bind(deep, gym.spaces.Discrete(3))
