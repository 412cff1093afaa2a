"""Gradient steps under a lifelong method: recorded ones give the bits of those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import tree
from rlmeta.learning.method import Method, recordable
from rlmeta.lifelong import ALL, EWC, PackNet
from tests.lifelong.test_hooks import METHODS
from tests.lifelong.test_methods import SHORT, agent, conflicts
from tests.lifelong.toy import learner, points


def run_with(monkeypatch: pytest.MonkeyPatch, backend: str, agents: bool, *methods: Method) -> Any:
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 1)
    monkeypatch.setenv("RLMETA_BACKEND", backend)
    if agents:
        return rl.train(agent(), conflicts(), budget=SHORT, seeds=2, lifelong=methods)
    return rl.train(learner(), points(), steps=160, seeds=3, lifelong=methods)


@pytest.mark.parametrize("backend, agents", [("python", False), ("torchscript", True)])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.filterwarnings("error:.*not recorded")
def test_recorded_steps_under_a_method_are_the_bits_of_others(monkeypatch, method, backend, agents):
    recorded, plain = (run_with(monkeypatch, one, agents, method) for one in (backend, "none"))
    assert any("gradient step" in name for name in recorded.agent.capture.operations())
    pairs = zip(tree.flatten(recorded.state).items(), tree.flatten(plain.state).items(), strict=True)
    assert [a[0] for a, b in pairs if a[0] != b[0] or not torch.equal(a[1], b[1])] == []


def test_methods_together_are_recorded(monkeypatch):
    methods = EWC(strength=10.0, samples=16), PackNet()
    recorded, plain = (run_with(monkeypatch, one, False, *methods) for one in ("torchscript", "none"))
    assert recorded.agent.capture.operations()
    for a, b in zip(tree.leaves(recorded.state), tree.leaves(plain.state), strict=True):
        assert torch.equal(a, b)


def test_every_method_here_is_recorded_and_one_of_a_users_own_where_its_class_says_so():
    assert all(recordable(method()) for method in ALL)

    class Derived(EWC):
        """Counts its calls, perhaps."""

    assert not recordable(Derived())
    with pytest.warns(RuntimeWarning, match="gradient steps under ewc: not recorded.*recordable = True"):
        rl.train(learner(), points(), steps=80, lifelong=[Derived()])
