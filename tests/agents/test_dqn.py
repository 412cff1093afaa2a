"""DQN's own: the average of the weights that acts greedily."""

from __future__ import annotations

import dataclasses

import torch

from rlmeta.agents import DQN
from rlmeta.functional import tree
from rlmeta.learning.method import Method
from tests.agents.worlds import start

SETTINGS = DQN(num_envs=4, num_steps=4, gradient_steps=2, batch_size=8, capacity=400, learning_starts=16,
               learning_rate=5e-2, target_every=3, hidden_sizes=(8,))  # fmt: skip
SETTINGS = dataclasses.replace(SETTINGS, average_rate=[1.0, 0.3, 0.05])


def copies(state, name):
    p = state["params"]
    found = p["weights"] if name == "q" else p["buffers"]
    return {n.removeprefix(f"{name}."): t.clone() for n, t in found.items() if n.startswith(f"{name}.")}


def test_the_average_follows_the_weights_at_each_learners_rate():
    agent, state, world = start(SETTINGS, "CartPole-v1", 2)
    rate = torch.tensor([1.0, 1.0, 0.3, 0.3, 0.05, 0.05])
    expected = {name: value.double() for name, value in copies(state, "q").items()}
    for i in range(5):
        state["progress"] = torch.full_like(state["progress"], i / 5)
        state, _ = agent.iterate(state, world)
        if i == 2:
            state["active"][3] = False
            stopped = {name: value[3].clone() for name, value in copies(state, "average").items()}
        for name, online in copies(state, "q").items():
            now = (rate * (state["active"] | (i <= 2))).reshape(-1, *(1,) * (online.dim() - 1)).double()
            expected[name] = (1 - now) * expected[name] + now * online.double()
            torch.testing.assert_close(copies(state, "average")[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    for name, value in copies(state, "average").items():
        assert torch.equal(value[:2], copies(state, "q")[name][:2])  # rate 1: the weights themselves
        assert torch.equal(value[3], stopped[name])
        assert not torch.allclose(value[4], copies(state, "q")[name][4])


def test_greedy_actions_come_from_the_average_and_exploring_ones_from_the_weights():
    agent, state, _world = start(SETTINGS, "CartPole-v1", 2)
    p = state["params"]
    p["hyper"]["epsilon"] = torch.zeros(6)
    for name, value in p["buffers"].items():
        if name.startswith("average."):
            p["buffers"][name] = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    observation = torch.randn(6, 50, 4, generator=torch.Generator().manual_seed(1))
    greedy, exploring = (agent.act(p, observation, {}, state["key"], greedy)[0] for greedy in (True, False))
    assert torch.equal(greedy, agent.forward(agent.q, "average", p, observation).argmax(-1))
    assert torch.equal(exploring, agent.forward(agent.q, "q", p, observation).argmax(-1))
    assert not torch.equal(greedy, exploring)


def test_without_an_average_and_with_lifelong_methods_the_weights_themselves_act():
    plain, _, world = start(dataclasses.replace(SETTINGS, average_rate=1.0), "CartPole-v1", 2)
    spaces = world.observation_space, world.action_space
    lifelong = dataclasses.replace(SETTINGS, average_rate=0.1).bind(*spaces, [Method()])
    for agent in (plain, lifelong):
        _, state, _ = start(dataclasses.replace(SETTINGS, average_rate=1.0), "CartPole-v1", 2)
        assert not any(name.startswith("average.") for name in state["params"]["buffers"])
        observation = torch.randn(2, 50, 4)
        action, _ = agent.act(state["params"], observation, {}, state["key"], True)
        assert torch.equal(action, agent.forward(agent.q, "q", state["params"], observation).argmax(-1))


def test_averaging_changes_nothing_that_is_learned():
    one, two = (start(dataclasses.replace(SETTINGS, average_rate=r), "CartPole-v1", 2) for r in (1.0, 0.1))
    for i in range(4):
        for agent, state, world in (one, two):
            state["progress"] = torch.full_like(state["progress"], i / 4)
            agent.iterate(state, world)
    for part in ("weights", "optimizer", "replay"):
        ours, theirs = ((s["params"] if part == "weights" else s)[part] for _, s, _ in (one, two))
        for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
            assert torch.equal(a, b)
