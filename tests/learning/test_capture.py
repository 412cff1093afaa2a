"""A recorded function gives the same bits as the function, for the names and shapes it was recorded for."""

from __future__ import annotations

import torch

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.lab.experiment import Budget
from rlmeta.learning import capture as capture_module
from rlmeta.learning.capture import Capture


def gradient(inputs: tree.Tree) -> tree.Tree:
    weight = inputs["weight"].detach().requires_grad_()
    with torch.enable_grad():
        loss = torch.tanh(inputs["x"] @ weight).square().mean()
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, weight)[0]}


def inputs(seed: int, rows: int = 5) -> tree.Tree:
    torch.manual_seed(seed)
    return {"x": torch.randn(rows, 3), "weight": torch.randn(3, 2)}


def test_replays_equal_calls_bit_for_bit_and_take_new_values():
    calls = []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return gradient(given)

    capture = Capture(warm_up=3)
    for seed in range(10):
        given = inputs(seed)
        found, expected = capture("loss", counted, given), gradient(given)
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
        assert not found["gradient"].requires_grad
    assert len(calls) == 3 + 3  # the third is recorded, three check the recording


def test_other_shapes_and_names_are_recorded_apart():
    capture = Capture(warm_up=1)
    for rows in (5, 7, 5, 7):
        assert torch.equal(capture("a", gradient, inputs(0, rows))["loss"], gradient(inputs(0, rows))["loss"])
    doubled = capture("b", lambda given: {"loss": 2 * gradient(given)["loss"]}, inputs(0))
    assert torch.equal(doubled["loss"], 2 * gradient(inputs(0))["loss"])


def test_a_function_that_looks_at_values_is_never_replayed():
    capture = Capture(warm_up=1)

    def branches(given: tree.Tree) -> tree.Tree:
        return {"y": given["x"] if bool(given["x"].sum() > 0) else -given["x"]}

    for sign in (1.0, -1.0, 1.0, -1.0):
        assert capture("branches", branches, {"x": torch.ones(2) * sign})["y"].tolist() == [1.0, 1.0]


def test_a_function_with_a_memory_of_its_own_is_never_replayed():
    capture, count = Capture(warm_up=1), [0.0]

    def counts(given: tree.Tree) -> tree.Tree:
        count[0] += 1.0
        return {"y": given["x"] + count[0]}

    assert [capture("counts", counts, {"x": torch.zeros(())})["y"].item() for _ in range(2)] != [1.0, 1.0]


def test_random_numbers_follow_the_key():
    capture = Capture(warm_up=2)
    for seed in range(6):
        keys = random.make_keys([seed, seed + 1])
        found = capture("draw", lambda given: {"x": random.normal(given["key"], "a", 0, (4,))}, {"key": keys})
        assert torch.equal(found["x"], random.normal(keys, "a", 0, (4,)))


def test_training_is_the_same_with_and_without(monkeypatch):
    def weights(warm_up: int, agent: object) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(capture_module, "WARM_UP", warm_up)
        run = rl.train(agent, "CartPole-v1", seeds=2, budget=Budget(steps=1024, final_episodes=2))
        return dict(run.state["params"]["weights"])

    for agent in (rl.PPO(num_steps=32, num_epochs=4), rl.A2C(), rl.DQN(), rl.REINFORCE()):
        plain, replayed = weights(10**9, agent), weights(3, agent)
        assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_an_agent_whose_settings_have_no_network_can_be_bound():
    from dataclasses import dataclass

    import gymnasium as gym

    from rlmeta.agents.agent import Agent

    @dataclass(frozen=True)
    class Settings:
        """A user's own."""

    agent = Agent(Settings(), gym.spaces.Discrete(2), gym.spaces.Discrete(2))
    assert agent.capture is not None
