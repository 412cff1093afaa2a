"""Hooks write nothing in place: what a method is handed is the same, bit for bit, when its hook has returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.learning.method import Method
from rlmeta.lifelong import (
    AGEM,
    ALL,
    DER,
    ERACE,
    EWC,
    GEM,
    HAT,
    L2,
    MAS,
    SI,
    GenerativeReplay,
    LwF,
    PackNet,
    Replay,
    RWalk,
)
from tests.lifelong.test_methods import SHORT, agent, conflicts
from tests.lifelong.toy import learner, pictures, points

HOOKS = (
    "task_start",
    "phase_start",
    "learn",
    "task_end",
    "params",
    "batch",
    "batches",
    "loss",
    "grads",
    "frozen",
    "after_step",
    "predict",
)


def tensors(given: Any) -> Iterator[Tensor]:
    """Every tensor in what a hook is given, the one that named weights are views of too."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from (one for value in given.values() for one in tensors(value))
        if hasattr(given, "flat"):
            yield given.flat
    elif isinstance(given, tuple | list):
        yield from (one for value in given for one in tensors(value))


class Watched(Method):
    """Another method, whose hooks are looked after."""

    def __init__(self, method: Method) -> None:
        self.method, self.name, self.needs = method, method.name, method.needs
        self.phases, self.init = method.phases, method.init
        self.calls = 0
        for hook in HOOKS:
            setattr(self, hook, self.watching(hook))

    def watching(self, hook: str) -> Any:
        def call(*given: Any) -> Any:
            before = [(one, one.detach().clone()) for one in tensors(given)]
            found = getattr(self.method, hook)(*given)
            for one, copy in before:
                assert torch.equal(one.nan_to_num(7.0), copy.nan_to_num(7.0)), f"{self.name}.{hook} wrote in place"
            self.calls += 1
            return found

        return call


METHODS = [EWC(strength=10.0, samples=16), EWC(strength=10.0, samples=16, online=True, decay=0.9), GEM(memory=8)]
METHODS += [AGEM(memory=8, batch_size=8), PackNet(), PackNet(retrain=0.0, keep=0.3), Replay(size=16), HAT()]
METHODS += [L2(), SI(), MAS(samples=16), RWalk(), LwF()]
PICTURES = [GenerativeReplay(latent=2, hidden_sizes=(5,))]
LABELLED = [*PICTURES, DER(size=8), ERACE(size=8)]


def test_every_method_is_looked_after():
    assert {type(method) for method in METHODS + LABELLED} == set(ALL)


@pytest.mark.parametrize("method", METHODS + LABELLED, ids=repr)
def test_hooks_write_nothing_in_place(method):
    watched = Watched(method)
    problem = pictures() if method in PICTURES else points()
    rl.train(learner(), problem, steps=80, seeds=2, lifelong=[watched])
    assert watched.calls > 100


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_agents_hooks_write_nothing_in_place(method):
    watched = Watched(method)
    rl.train(agent(), conflicts(), budget=SHORT, seeds=2, lifelong=[watched])
    assert watched.calls > 50


def test_writing_in_place_is_noticed():
    class Careless(Method):
        name = "careless"

        def init(self, learner, state):
            return {"steps": torch.zeros_like(state["key"])}

        def after_step(self, learner, info, p, m, task, key):
            m["steps"].add_(1)
            return m

    with pytest.raises(AssertionError, match=r"careless\.after_step wrote in place"):
        rl.train(learner(), points(), steps=80, lifelong=[Watched(Careless())])


class AllOneClass(Method):
    """The learner's own loss is of labels that are all 1."""

    name = "all one class"
    recordable = True

    def batch(self, learner: Any, p: Any, m: Any, batch: Any, task: Any) -> Any:
        return {**batch, "target": torch.ones_like(batch["target"])}


def test_the_learners_own_loss_is_of_the_minibatch_that_a_method_gives():
    run = rl.train(learner(learning_rate=0.1), points(1), steps=400, lifelong=[AllOneClass()], progress=False)
    logits = run.agent.logits(run.state["params"], run.agent.draw(run.state, run.world, 40))
    assert (logits.argmax(-1) == 1).all()
