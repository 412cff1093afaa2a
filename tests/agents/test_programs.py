"""The runnable programs in agents/, loop in sight, are `rl.train` bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.learning.settings import name_of

PROGRAMS = Path(__file__).parents[2] / "agents"


@pytest.mark.parametrize(("name", "steps"), [("ppo", 1024), ("a2c", 400), ("dqn", 1600), ("reinforce", 4096)])
def test_program_equals_train(name, steps):
    by_hand = load(name).train("CartPole-v1", seeds=2, steps=steps)
    budget = rl.Budget(steps=steps, eval_every=10 * steps, final_episodes=1)
    run = rl.train(rl.preset(name, "CartPole-v1"), "CartPole-v1", seeds=2, budget=budget, threads=1)
    ours = tree.flatten(run.state["params"])
    for path, leaf in tree.flatten(by_hand["params"]).items():
        assert torch.equal(leaf, ours[path]), path


def load(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", PROGRAMS / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_classifier_program_equals_train_on_a_stream(scenario):
    by_hand = load("classifier").train("split-digits", scenario, seeds=2, steps=640)
    stream = rl.stream("split-digits", scenario=scenario)
    run = rl.train(rl.preset("classifier", "split-digits"), stream, seeds=2, steps=640, threads=1)
    ours = tree.flatten(run.state["params"])
    for path, leaf in tree.flatten(by_hand["state"]["params"]).items():
        assert torch.equal(leaf, ours[path]), path
    assert torch.equal(by_hand["accuracy"], run.matrix[:, 1:])


def test_every_agent_has_a_short_program_and_settings():
    from rlmeta.agents import ALL, Regressor

    for cls in set(ALL) - {Regressor}:  # which serves meta-learners
        name = name_of(cls)
        assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 80
        assert (PROGRAMS / f"{name}.toml").is_file()
