"""Meta-learners end as if never stopped after a kill: the unrolls under way and PES's perturbations included."""

from __future__ import annotations

import pytest

import rlmeta as rl
from rlmeta.cli.main import main
from tests.runs import killed_meta
from tests.runs.test_resume import assert_same_run


@pytest.mark.parametrize("name", list(killed_meta.CASES))
def test_killed_and_resumed_equals_never_stopped(name, tmp_path, killer):
    whole = killed_meta.train(str(tmp_path / "whole"), name)
    iterations = int(whole.state["count"]["iterations"].max())
    at = iterations // 2 + (1 - iterations // 2 % 2)  # odd
    assert 0 < at < iterations
    killer.kill("tests.runs.killed_meta:train", str(tmp_path / "killed"), name, at)
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(["resume", str(tmp_path / "killed"), "--quiet"]) == 0
    assert_same_run(whole, rl.load(tmp_path / "killed"))
