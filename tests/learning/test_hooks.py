"""A hook that gives back something else than it should is named in one line, before the error spreads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import HookError
from rlmeta.lifelong import Method
from tests.lifelong.toy import learner, points

NOTHING = r"gave None \(does it end with return\?\), expected "
CASES: list[tuple[str, Any, str]] = [
    ("init", None, f"{NOTHING}the method's memory"),
    ("init", {"n": torch.zeros(5)}, r"gave torch.float32 \(5,\), expected a tensor that starts .* \(2,\) as 'n'"),
    ("phases", None, f"{NOTHING}pairs"),
    ("phases", [("again", 0)], "gave list, expected pairs"),
    ("task_start", None, rf"{NOTHING}\(p, m\)"),
    ("phase_start", None, rf"{NOTHING}\(p, m\)"),
    ("task_end", None, rf"{NOTHING}\(p, m\)"),
    ("task_start", lambda p, m: (p, {"new": torch.zeros(2)}), "gave the memory that has a new entry 'new'"),
    ("task_start", lambda p, m: (p, None), f"{NOTHING}the memory"),
    ("task_end", lambda p, m: ({}, m), "gave the parameters that lacks 'buffers"),
    ("params", None, f"{NOTHING}parameters"),
    ("params", lambda p: {**p, "weights": {n: w[0] for n, w in p["weights"].items()}}, ".*as 'net.*' of the weights"),
    ("batches", None, f"{NOTHING}pairs"),
    ("batches", [{}], "gave list, expected pairs"),
    ("loss", 1.0, r"gave float, expected torch.float32 \(2,\)"),
    ("loss", torch.zeros(()), r"gave torch.float32 \(\), expected torch.float32 \(2,\)"),
    ("loss", torch.zeros(2), ".*expected one that depends on the weights"),
    ("grads", None, rf"{NOTHING}torch.float32 \(2, "),
    ("grads", torch.zeros(2, 1), r"gave torch.float32 \(2, 1\), expected torch.float32 \(2, "),
    ("frozen", torch.zeros(2, 1, dtype=torch.bool), r"gave torch.bool \(2, 1\), expected torch.bool \(2, "),
    ("after_step", None, f"{NOTHING}the method's memory"),
    ("predict", torch.zeros(2, 3), r"gave torch.float32 \(2, 3\), expected a tensor \(2, 20, 3\)"),
]


@pytest.mark.parametrize(("hook", "found", "message"), CASES)
def test_a_hook_that_gives_something_else_is_named(hook, found, message, tmp_path):
    def given(self, *arguments, **named):
        if not callable(found):
            return found
        return found(*(arguments[1:2] if hook == "params" else arguments[1:3]))

    method = type("Mine", (Method,), {"name": "mine", hook: given})()
    with pytest.raises(HookError, match=f"^mine: its hook {hook} {message}"):
        rl.train(learner(), points(2), steps=80, seeds=2, lifelong=[method])
    if hook in ("init", "phases"):
        with pytest.raises(HookError):
            rl.train(learner(), points(2), steps=80, seeds=2, lifelong=[method], out=tmp_path / "run")
        assert not (tmp_path / "run").exists(), "found before anything is written"


def test_hooks_that_give_nothing_where_they_may_change_nothing():
    class Idle(Method):
        name = "idle"

        def loss(self, learner, p, m, batch, task, key):
            return None

        def frozen(self, p, m, task):
            return None

        def predict(self, learner, p, m, batch, task):
            return None

    plain = rl.train(learner(), points(2), steps=80, seeds=2)
    idle = rl.train(learner(), points(2), steps=80, seeds=2, lifelong=[Idle()])
    assert torch.equal(plain.matrix[:, 1:], idle.matrix[:, 1:])
