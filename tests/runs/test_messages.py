"""Errors of arguments that a user mixes up: the message names the argument, and what to give instead."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.lifelong import Method
from tests.lifelong.toy import learner, points


class Nameless(Method):
    pass


class Numbered(Method):
    name = 3


class Novelty:
    def init(self, agent, state, world):
        return {}

    def relabel(self, agent, state, memory, rollout, rewards):
        return memory, rewards, {}


def test_a_reward_without_a_name_is_asked_for_one():
    with pytest.raises(SettingError, match=r"the reward Novelty has no name: give its class one, such as name = "):
        rl.train(rl.PPO(rewards=(Novelty(),)), "CartPole-v1", steps=128)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Nameless(), Nameless()], "method Nameless is named 'method': give its class a name of its own"),
        ([Numbered()], "method Numbered is named 3: give its class a name of its own"),
    ],
)
def test_a_method_without_a_name_of_its_own_is_asked_for_one(methods, message):
    with pytest.raises(SettingError, match=message):
        rl.train(learner(), points(2), steps=80, lifelong=methods)


def test_a_single_method_may_go_without_a_name():
    run = rl.train(learner(), points(2), steps=80, lifelong=[Nameless()])
    assert list(run.state["methods"]) == ["method"]


def narrow(space):
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())


def wide(space):
    return torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh())


def deep(space):
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))


def test_another_network_than_the_runs_is_named_as_the_fault(tmp_path, monkeypatch):
    budget = rl.Budget(steps=64, final_episodes=2)
    rl.train(rl.A2C(network=narrow), "CartPole-v1", out=tmp_path / "run", budget=budget)
    for other in (wide, deep):
        with pytest.raises(SettingError, match=f"had the network .*:narrow, got .*:{other.__name__}: give the same"):
            rl.load(tmp_path / "run", network=other)
        monkeypatch.setattr(other, "__qualname__", "narrow")
        with pytest.raises(CheckpointError, match="network= is not the network that the run was trained with"):
            rl.load(tmp_path / "run", network=other)


def test_a_network_for_a_run_without_one_is_refused(tmp_path):
    rl.train(rl.A2C(), "CartPole-v1", out=tmp_path / "run", budget=rl.Budget(steps=64, final_episodes=2))
    with pytest.raises(SettingError, match=r"had no network of your own, network= is <function wide.*: leave it out"):
        rl.load(tmp_path / "run", network=wide)


@pytest.mark.parametrize("name", ["CartPole-v1", "rotated-mnist", "CartPole-fixed"])
def test_a_meta_learner_is_told_which_families_there_are(name, capfd):
    with pytest.raises(SettingError, match=f"MAML learns from a family of tasks, '{name}' is none") as caught:
        rl.train(rl.MAML(), name, steps=8)
    assert main(["train", "maml", name]) == 2
    for message in (str(caught.value), capfd.readouterr().err):
        assert "sinusoid" in message and "few-shot-omniglot" in message
        assert "split-mnist" not in message and "cartpole-long-pole" not in message


def test_a_family_that_is_nearly_named_is_suggested():
    with pytest.raises(SettingError, match=r"'sinusoids' is none: did you mean sinusoid\?"):
        rl.train(rl.MAML(), "sinusoids", steps=8)
