"""The program agents/iql.py: a whole run from the same initial weights is the package's, in float64."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.nn import Encoder
from tests.agents.worlds import start
from tests.offline.data import recorded

PROGRAM = Path(__file__).parents[2] / "agents" / "iql.py"
PLACES = (("member.joint.", "member.0."), ("member.head.", "member.1."), ("body.", ""), ("head.", "2."))
NUMBERS = {"gamma": 0.5, "beta": 0.25, "expectile": 0.75, "target_rate": 0.25, "largest_weight": 1.0}
NUMBERS |= {"actor_learning_rate": 2.0**-7, "critic_learning_rate": 2.0**-6}
"""Powers of two, which float32 holds."""


def load():
    spec = importlib.util.spec_from_file_location("program_iql", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def by_network(p) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the package's networks, and of the target, under the program's names."""
    named: dict[str, dict[str, torch.Tensor]] = {}
    for name, leaf in {**p["weights"], **p["buffers"]}.items():
        network, _, rest = name.partition(".")
        for theirs, mine in PLACES:
            rest = mine + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
        named.setdefault(network, {})[rest] = leaf.clone()
    return named


def test_a_whole_run_is_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder.__init__, "__defaults__", (torch.float64,))
    program, given = load(), recorded()
    for name, value in {**NUMBERS, "hidden_sizes": (8, 8), "batch_size": 6, "decay": 2}.items():
        monkeypatch.setattr(program, name.upper(), value)
    settings = rl.IQL(given, num_steps=2, batch_size=6, hidden_sizes=(8, 8), **NUMBERS)
    agent, state, world = start(settings, "Pendulum-v1", 2)
    agent.capture = None
    for part in ("params", "optimizer"):
        state[part] = tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state[part])
    before = by_network(state["params"])
    initial = iter([before["policy"], before["value"], before["q"]])
    monkeypatch.setattr(program, "stack", lambda make, key: next(initial))
    for i in range(4):
        state["progress"] = torch.full_like(state["progress"], i / 4)
        state, _ = agent.iterate(state, world)
    _, weights = program.train(str(given.save(tmp_path / "data")), "Pendulum-v1", 2, 8)
    after = by_network(state["params"])
    assert weights.keys() == after.keys() == {"policy", "value", "q", "target"}
    for network, own in after.items():
        torch.testing.assert_close(weights[network], own, rtol=0, atol=1e-9)
        assert all(not torch.equal(own[name], before[network][name]) for name in own)


def test_it_begins_as_the_package_does_and_evaluates(tmp_path, capsys):
    program = load()
    settings = rl.preset("iql", "Pendulum-v1")
    named = {name.lower(): getattr(program, name) for name in vars(program) if name.isupper()}
    assert named.pop("mlp") and named.pop("decay") == settings.num_steps
    assert named == {name: getattr(settings, name) for name in named} and len(named) > 8
    _, state, _ = start(rl.IQL(recorded(), hidden_sizes=(64, 64)), "Pendulum-v1", 32)
    path = str(recorded().save(tmp_path / "data"))
    _, weights = program.train(path, "Pendulum-v1", 32, 0)
    for network, own in by_network(state["params"]).items():
        for name, leaf in own.items():
            assert weights[network][name].shape == leaf.shape
            torch.testing.assert_close(weights[network][name].std(), leaf.std(), rtol=0.3, atol=1e-6)
    program.main(path, seeds=2, steps=1)
    assert len(re.findall(r"-\d+\.\d+", capsys.readouterr().out)) == 2


def test_it_holds_the_algorithm_on_a_page():
    text = PROGRAM.read_text()
    assert 80 <= len(text.splitlines()) <= 150
    assert not re.search(r"rlmeta\.offline|\.bind\(|rl\.preset\(|\.losses\(|\.iterate\(", text)
