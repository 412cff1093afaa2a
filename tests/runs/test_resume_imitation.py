"""Imitators, and agents whose rewards are changed, end as if never stopped after a kill."""

from __future__ import annotations

import pytest

import rlmeta as rl
from rlmeta.errors import SettingError
from tests.runs import killed_imitation
from tests.runs.test_resume import assert_same_run


@pytest.mark.filterwarnings("ignore:episodes terminate at different times")
@pytest.mark.parametrize("name", ["gail", "gail gymnasium", "cloning", "irl", "rewards"])
def test_killed_and_resumed_equals_never_stopped(name, tmp_path, killer):
    whole = killed_imitation.train(str(tmp_path / "whole"), name)
    half = int(whole.state["count"]["iterations"].max()) // 2
    killer.kill("tests.runs.killed_imitation:train", str(tmp_path / "killed"), name, half)
    with pytest.raises(SettingError, match="which a configuration only describes"):
        rl.resume(tmp_path / "killed")
    assert_same_run(whole, rl.resume(tmp_path / "killed", own=killed_imitation.own(name)))
