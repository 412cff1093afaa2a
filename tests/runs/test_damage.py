"""A sample of the damages and forgeries of tests/slow/test_fuzz.py: a clean error, or the value of the whole file."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.runs import damage
from tests.runs.forging import accept_config
from tests.runs.forked import REFUSED, forked
from tests.runs.write_faults import needs_forks, train

pytestmark = needs_forks


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    assert forked(lambda: train(folder)).kind == "ended"
    return folder


def test_damaged_runs_are_refused_or_give_the_same(ended: Path, tmp_path: Path) -> None:
    account = damage.damaged_runs("load", ended, tmp_path / "run", 10, "sample")
    assert account.failed == []
    assert account.counts[REFUSED] > 0


def test_forged_configurations_are_refused_or_give_the_same(ended: Path, tmp_path: Path) -> None:
    account = damage.forged_runs("load", ended, tmp_path / "run", 16, "sample", (damage.EQUAL, REFUSED))
    assert account.failed == []
    assert account.counts[REFUSED] > 0


@pytest.mark.parametrize(("name", "value"), [("num_envs", 10**12), ("hidden_sizes", [10**12])])
def test_a_configuration_that_fits_no_memory_is_refused(name: str, value: Any, ended: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ended, tmp_path / "run")
    config = tomllib.loads((folder / "config.toml").read_text())
    config["variants"][0][name] = value
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    accept_config(folder)
    outcome = forked(lambda: damage.loaded(folder))
    assert outcome.kind == REFUSED, outcome
    assert "run/config.toml describes a run that needs more memory than there is" in outcome.said


def test_damaged_and_forged_demonstrations_are_refused_or_give_the_same(tmp_path: Path) -> None:
    account = damage.damaged_demonstrations(damage.demonstrations(tmp_path / "demo"), 12, 18, "sample")
    assert account.failed == []
    assert account.counts[REFUSED] > 0
