"""The programs agents/iql.py and td3_bc.py: from the same weights a whole run is the package's, in float64."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.nn import Encoder
from tests.agents.worlds import start
from tests.offline.data import recorded

PROGRAMS = Path(__file__).parents[2] / "agents"
PLACES = (("member.joint.", "member.0."), ("member.head.", "member.1."), ("body.", ""), ("head.", "2."))
SHARED = {"gamma": 0.5, "target_rate": 0.25, "batch_size": 6, "hidden_sizes": (8, 8)}
SHARED |= {"actor_learning_rate": 2.0**-7, "critic_learning_rate": 2.0**-6}
NUMBERS = {
    "iql": {**SHARED, "beta": 0.25, "expectile": 0.75, "largest_weight": 1.0},
    "td3_bc": {**SHARED, "alpha": 2.0, "target_noise": 0.5, "target_noise_clip": 0.25},
}
"""Powers of two, which float32 holds."""
NETWORKS = {"iql": ("policy", "value", "q"), "td3_bc": ("policy", "q")}


def load(name):
    spec = importlib.util.spec_from_file_location(f"program_{name}", PROGRAMS / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def double(x):
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)


def by_network(p) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the package's networks, and of the targets, under the programs' names."""
    named: dict[str, dict[str, torch.Tensor]] = {}
    for name, leaf in {**p["weights"], **p["buffers"]}.items():
        network, _, rest = name.partition(".")
        for theirs, mine in PLACES:
            rest = mine + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
        named.setdefault(network, {})[rest] = leaf.clone()
    return named


@pytest.mark.parametrize("name", NUMBERS)
def test_a_whole_run_is_the_packages(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder.__init__, "__defaults__", (torch.float64,))
    program, given = load(name), recorded()
    for setting, value in {**NUMBERS[name], "decay": 2}.items():
        monkeypatch.setattr(program, setting.upper(), value, raising=setting != "decay")
    settings = replace(rl.preset(name, "Pendulum-v1"), demonstrations=given, num_steps=2, **NUMBERS[name])
    agent, state, world = start(settings, "Pendulum-v1", 2)
    agent.capture = None
    state["params"], state["optimizer"] = double(state["params"]), double(state["optimizer"])
    before = by_network(state["params"])
    initial = iter([before[network] for network in NETWORKS[name]])
    monkeypatch.setattr(program, "stack", lambda make, key: next(initial))
    if name == "td3_bc":
        update = program.running_update
        monkeypatch.setattr(program, "running_update", lambda *of: double(update(*of)))
    for i in range(4):
        state["progress"] = torch.full_like(state["progress"], i / 4)
        state, _ = agent.iterate(state, world)
    _, weights = program.train(str(given.save(tmp_path / "data")), "Pendulum-v1", 2, 8)
    after = by_network(state["params"])
    assert weights.keys() == after.keys() == before.keys()
    for network, own in after.items():
        torch.testing.assert_close(weights[network], own, rtol=0, atol=1e-9)
        assert all(not torch.equal(own[part], before[network][part]) for part in own)


@pytest.mark.parametrize("name", NUMBERS)
def test_they_begin_as_the_package_does_and_evaluate(name, tmp_path, capsys):
    program, settings = load(name), rl.preset(name, "Pendulum-v1")
    named = {n.lower(): getattr(program, n) for n in vars(program) if n.isupper() and n != "MLP"}
    assert named.pop("decay", 50) == settings.num_steps
    assert named == {setting: getattr(settings, setting) for setting in named} and len(named) > 8
    _, state, _ = start(replace(settings, demonstrations=recorded()), "Pendulum-v1", 32)
    path = str(recorded().save(tmp_path / "data"))
    _, weights = program.train(path, "Pendulum-v1", 32, 0)
    for network, own in by_network(state["params"]).items():
        for part, leaf in own.items():
            assert weights[network][part].shape == leaf.shape
            torch.testing.assert_close(weights[network][part].std(), leaf.std(), rtol=0.3, atol=1e-6)
    program.main(path, seeds=2, steps=1)
    assert len(re.findall(r"-\d+\.\d+", capsys.readouterr().out)) == 2


@pytest.mark.parametrize("name", NUMBERS)
def test_they_hold_the_algorithm_on_a_page(name):
    text = (PROGRAMS / f"{name}.py").read_text()
    assert 80 <= len(text.splitlines()) <= 150
    assert not re.search(r"rlmeta\.offline|rlmeta\.agents|\.bind\(|rl\.preset\(|\.losses\(|\.iterate\(", text)
