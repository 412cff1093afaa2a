"""The runnable programs in agents/, loop in sight, are `rl.train` bit for bit."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.runs.shipped import AGENTS

PROGRAMS = Path(__file__).parents[2] / "agents"


@pytest.mark.parametrize(
    ("name", "steps"),
    [("ppo", 1024), ("a2c", 400), ("dqn", 1600), ("reinforce", 4096), ("sac", 1200), ("td3", 1200)],
)
def test_program_equals_train(name, steps):
    task = "Pendulum-v1" if name in ("sac", "td3") else "CartPole-v1"
    by_hand = load(name).train(task, seeds=2, steps=steps)
    budget = rl.Budget(steps=steps, eval_every=10 * steps, final_episodes=1)
    run = rl.train(rl.preset(name, task), task, seeds=2, budget=budget, threads=1)
    ours = tree.flatten(run.state["params"])
    for path, leaf in tree.flatten(by_hand["params"]).items():
        assert torch.equal(leaf, ours[path]), path


def test_the_ppo_program_equals_train_on_two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        by_hand = load("ppo").train("CartPole-v1", seeds=4, steps=1024)
        budget = rl.Budget(steps=1024, eval_every=10240, final_episodes=1)
        run = rl.train(rl.preset("ppo", "CartPole-v1"), "CartPole-v1", seeds=4, budget=budget, threads=2)
    finally:
        torch.set_num_threads(before)
    for name, weight in by_hand["params"]["weights"].items():
        assert torch.equal(weight, run.state["params"]["weights"][name]), name


def load(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", PROGRAMS / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.mark.parametrize(
    ("name", "family", "steps"), [("maml", "sinusoid", 250), ("learned_optimizer", "quadratics", 4480)]
)
def test_the_meta_learners_programs_equal_train(name, family, steps):
    by_hand = load(name).train(family, seeds=2, steps=steps)
    budget = rl.Budget(steps=steps, eval_every=10 * steps, final_episodes=2)
    run = rl.train(rl.preset(name, family), family, seeds=2, budget=budget, threads=1)
    ours = tree.flatten(run.state["params"])
    for path, leaf in tree.flatten(by_hand["params"]).items():
        assert torch.equal(leaf, ours[path]), path
    assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_classifier_program_equals_train_on_a_stream(scenario):
    by_hand = load("classifier").train("split-digits", scenario, seeds=2, steps=640)
    stream = rl.stream("split-digits", scenario=scenario)
    run = rl.train(rl.preset("classifier", "split-digits"), stream, seeds=2, steps=640, threads=1)
    ours = tree.flatten(run.state["params"])
    for path, leaf in tree.flatten(by_hand["state"]["params"]).items():
        assert torch.equal(leaf, ours[path]), path
    torch.testing.assert_close(by_hand["accuracy"], run.matrix[:, 1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "task", "steps"), [("behaviour_cloning", "CartPole-v1", 150), ("gail", "CartPole-fixed", 8000)]
)
def test_programs_of_imitation_equal_train(name, task, steps, tmp_path):
    expert = rl.train(rl.A2C(), task, seeds=1, budget=rl.Budget(steps=2_000, eval_every=4_000, final_episodes=1))
    path = str(rl.record(expert, 10).save(tmp_path / "demo"))
    by_hand = load(name).train(path, task, seeds=2, steps=steps)
    settings = replace(rl.preset(name, task), demonstrations=path)
    budget = rl.Budget(steps=steps, eval_every=10 * steps, final_episodes=1)
    ours = tree.flatten(rl.train(settings, task, seeds=2, budget=budget, threads=1).state)
    for path, leaf in tree.flatten({"params": by_hand["params"], "rewards": by_hand.get("rewards", {})}).items():
        assert torch.equal(leaf, ours[path]), path


def test_the_irl_program_equals_train(tmp_path):
    expert = rl.train(rl.A2C(), "GridWorld-v0", seeds=1, budget=rl.Budget(steps=2_000, final_episodes=1))
    path = str(rl.record(expert, 10, deterministic=False).save(tmp_path / "demo"))
    by_hand = load("irl").train(path, seeds=2, steps=20)
    settings = replace(rl.preset("irl", "GridWorld-v0"), demonstrations=path)
    run = rl.train(settings, "GridWorld-v0", seeds=2, steps=20, threads=1)
    for name, weight in by_hand["params"]["weights"].items():
        assert torch.equal(weight, run.state["params"]["weights"][name]), name


def test_the_shaping_program_equals_train():
    program = load("reward_shaping")
    steps = 8192
    by_hand = program.train(seeds=2, steps=steps)
    settings = replace(rl.preset("ppo", "MountainCar-v0"), rewards=(program.ENERGY,))
    budget = rl.Budget(steps=steps, eval_every=10 * steps, final_episodes=1)
    ours = tree.flatten(rl.train(settings, "MountainCar-v0", seeds=2, budget=budget, threads=1).state["params"])
    for path, leaf in tree.flatten(by_hand["params"]).items():
        assert torch.equal(leaf, ours[path]), path


def test_every_agent_has_a_short_program_and_settings():
    for name in AGENTS.keys() - {"regressor"}:  # which serves meta-learners
        assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 80
        assert (PROGRAMS / f"{name}.toml").is_file()


@pytest.mark.parametrize("path", sorted(PROGRAMS.glob("*.py")), ids=lambda path: path.stem)
def test_the_command_that_a_program_names_is_one_of_its(path):
    program = load(path.stem)
    (command,) = re.findall(r"^python agents/(\S+) ?(.*)$", program.__doc__, re.M)
    assert command[0] == path.name
    tyro.extras.get_parser(program.main).parse_args(command[1].split())
