"""A saved configuration makes the same experiment again."""

from __future__ import annotations

import copy
import dataclasses
import os
import tomllib

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import Bandit, CartPole
from rlmeta.errors import CheckpointError, RlmetaError, SettingError
from rlmeta.runs.configuration import from_config
from rlmeta.runs.experiment import Budget, Experiment, available_threads
from rlmeta.runs.folder import encoded


@pytest.mark.parametrize(
    "problem",
    [
        rl.task("CartPole-v1"),
        rl.task("CartPole-v1", settings={"length": 1.5}),
        rl.task("FrozenLake8x8-v1"),
        rl.task("CartPole-v1", native=False),
        rl.task(CartPole(length=2.0, gravity=5.0)),
        rl.task("cartpole-long-pole"),
        rl.family("cartpole-physics").task(),
    ],
    ids=lambda problem: problem.name,
)
def test_every_kind_of_task_comes_back(problem):
    experiment = Experiment((rl.PPO(learning_rate=1e-3), rl.PPO(gamma=0.5)), (3, 5), problem, Budget(steps=10))
    again = from_config(experiment.config(), where="here")
    assert again.problem.source == problem.source
    assert again.problem.ranges == problem.ranges
    assert again.variants == experiment.variants
    assert again.seeds == (3, 5)
    assert again.budget == experiment.budget


def test_what_cannot_be_named_is_asked_for_again():
    experiment = Experiment((rl.PPO(),), (0,), rl.task(lambda: None, name="own"), Budget(steps=10))
    with pytest.raises(SettingError, match=r"pass it again as env= \(on the command line --env PACKAGE"):
        from_config(experiment.config(), where="here")

    class Mine(Bandit):
        """A user's own native environment."""

    experiment = dataclasses.replace(experiment, problem=rl.task(Mine()))
    with pytest.raises(SettingError, match=r"pass it again as env= \(on the command line --env PACKAGE"):
        from_config(experiment.config(), where="here")
    assert isinstance(from_config(experiment.config(), where="here", source=Mine()).problem.source, Mine)


def test_a_configuration_of_something_else_is_refused():
    with pytest.raises(CheckpointError, match="it is not the configuration of a run"):
        from_config({"exp_name": "ppo"}, where="here")


@pytest.mark.parametrize(("seeds", "threads"), [(3, 1), (4, 2)])
def test_torch_takes_several_threads_for_four_learners_or_more(seeds, threads):
    Experiment((rl.PPO(),), tuple(range(seeds)), rl.task("CartPole-v1"), threads=2).use_threads()
    assert torch.get_num_threads() == threads


def test_changing_one_constant_of_a_named_family_keeps_its_ranges():
    changed = rl.task("cartpole-physics", settings={"tau": 0.03})
    assert changed.ranges == rl.family("cartpole-physics").ranges != {}
    assert changed.source.tau == 0.03
    assert rl.task("cartpole-long-pole", mode="async").mode == "async"


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("", os.cpu_count()), ("all", os.cpu_count())])
def test_threads_are_as_many_as_omp_num_threads_says(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert available_threads() == threads


def test_devices_and_methods_that_are_none_are_refused():
    with pytest.raises(SettingError, match="device is 'gpu'"):
        Experiment((rl.PPO(),), (0,), rl.task("CartPole-v1"), device="gpu")
    with pytest.raises(SettingError, match="expected a method of it: EWC"):
        Experiment((rl.PPO(),), (0,), rl.stream("cartpole-conflicts"), methods=(rl.EWC,))


def _paths(value, path=()):
    """Every place in a configuration."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _paths(child, (*path, name))


WRONG = [-1, 0, 10**19, 1.5, float("nan"), "x", "", True, [], {}, [[1]], ["a"], [{}], [{"name": 3}]]


@pytest.mark.parametrize("kind", ["task", "stream", "family", "samples"])
def test_every_wrong_type_in_a_configuration_is_a_sentence(kind):
    """What reads is the same experiment or one that the value describes; anything else says what it expected."""
    methods = ()
    if kind == "task":
        problem, agent = rl.task("CartPole-v1", settings={"length": 1.5}), rl.PPO(network=None)
    elif kind == "stream":
        problem, agent = rl.stream("cartpole-conflicts"), rl.PPO()
        problem, methods = dataclasses.replace(problem, table={}), (rl.EWC(),)
    elif kind == "family":
        problem, agent = rl.family("cartpole-physics").task(), rl.DQN()
    else:
        problem, agent = rl.stream("split-digits"), rl.Classifier()
    config = Experiment((agent,), (0, 1), problem, Budget(steps=100), methods=methods).config()
    config = tomllib.loads(encoded(config).decode())
    refused = 0
    for path in list(_paths(config))[1:]:
        for value in [None, *WRONG]:
            changed = copy.deepcopy(config)
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            if value is None:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            try:
                from_config(changed, where="here")
            except RlmetaError as error:
                assert len(str(error).split()) > 3
                refused += 1
    assert refused > 100
