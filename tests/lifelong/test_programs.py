"""The runnable programs of lifelong methods, loop in sight, are `rl.train` bit for bit."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import tree
from tests.agents.test_programs import PROGRAMS, load


@pytest.mark.parametrize(
    ("name", "value", "method"),
    [("ewc", 1000.0, rl.EWC(1000.0)), ("gem", 20, rl.GEM(20)), ("packnet", 0.0, rl.PackNet())],
)
def test_a_program_equals_train_on_a_stream(name, value, method):
    by_hand = load(name).train("split-digits", value, seeds=2, steps=640)
    stream = rl.stream("split-digits")
    run = rl.train(
        rl.preset("classifier", "split-digits"),
        stream,
        seeds=2,
        steps=640,
        threads=1,
        lifelong=[method],
        progress=False,
    )
    ours = tree.flatten({part: run.state[part] for part in ("params", "methods")})
    for path, leaf in tree.flatten({part: by_hand[part] for part in ("params", "methods")}).items():
        assert torch.equal(leaf, ours[path]), path
    assert torch.equal(by_hand["matrix"][:, 1:], run.matrix[:, 1:])
    assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 80
