"""Gradient steps under a lifelong method: recorded ones give the bits of those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.learning.method import Method, recordable
from rlmeta.lifelong import ALL, EWC, PackNet
from tests.lifelong.test_hooks import LABELLED, METHODS
from tests.lifelong.test_methods import SHORT, agent, conflicts
from tests.lifelong.toy import learner, pictures, points


def run_with(monkeypatch: pytest.MonkeyPatch, backend: str, agents: bool, *methods: Method) -> Any:
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 1)
    monkeypatch.setenv("RLMETA_BACKEND", backend)
    if backend == "none":  # one step after another, by the way that none of the recorded ones takes
        monkeypatch.setattr("rlmeta.learning.step._capture", lambda *given: None)
    if agents:
        return rl.train(agent(), conflicts(), budget=SHORT, seeds=2, lifelong=methods)
    problem = pictures() if methods[0] in LABELLED else points()
    return rl.train(learner(), problem, steps=160, seeds=3, lifelong=methods)


@pytest.mark.parametrize(
    ("method", "backend", "agents"),
    [
        *((method, "python", False) for method in METHODS + LABELLED),
        *((method, "torchscript", True) for method in METHODS),
        *((method, "torchscript", False) for method in LABELLED),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error:.*not recorded")
def test_recorded_steps_under_a_method_are_the_bits_of_others(monkeypatch, method, backend, agents):
    recorded, plain = (run_with(monkeypatch, one, agents, method) for one in (backend, "none"))
    assert any("gradient step" in name for name in recorded.agent.capture.operations())
    pairs = zip(tree.flatten(recorded.state).items(), tree.flatten(plain.state).items(), strict=True)
    different = [a for (a, x), (b, y) in pairs if a != b or not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))]
    assert different == []  # a row of a task's scores before it was met is NaN


class Draws(Method):
    """Sums up what it draws in every step."""

    name = "draws"
    recordable = True

    def init(self, learner: Any, state: Any) -> Any:
        return {"sum": torch.zeros_like(state["progress"])}

    def after_step(self, learner: Any, info: Any, p: Any, m: Any, task: Any, key: Any) -> Any:
        return {"sum": m["sum"] + random.uniform(key, "draw", 0, (), torch.float64)}


def test_the_key_of_a_method_is_another_one_in_every_recorded_step(monkeypatch):
    recorded, plain = (run_with(monkeypatch, one, True, Draws()) for one in ("", "none"))
    assert torch.equal(recorded.state["methods"]["draws"]["sum"], plain.state["methods"]["draws"]["sum"])


def test_methods_together_are_recorded(monkeypatch):
    methods = EWC(strength=10.0, samples=16), PackNet()
    recorded, plain = (run_with(monkeypatch, one, False, *methods) for one in ("", "none"))
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
