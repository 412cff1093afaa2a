"""The runnable programs in agents/, loop in sight, are `rl.train` bit for bit."""

from __future__ import annotations

import importlib.util
import re
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


def test_every_agent_has_a_short_program_and_settings():
    for name in AGENTS.keys() - {"regressor"}:  # which serves meta-learners
        assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 150
        assert (PROGRAMS / f"{name}.toml").is_file()


@pytest.mark.parametrize("path", sorted(PROGRAMS.glob("*.py")), ids=lambda path: path.stem)
def test_the_command_that_a_program_names_is_one_of_its(path):
    program = load(path.stem)
    (command,) = re.findall(r"^python agents/(\S+) ?(.*)$", program.__doc__, re.M)
    assert command[0] == path.name
    tyro.extras.get_parser(program.main).parse_args(command[1].split())
