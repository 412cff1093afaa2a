"""A sample of the damages and forgeries of tests/slow/test_fuzz.py: a clean error, or the value of the whole file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import damage
from tests.runs.forked import REFUSED, forked
from tests.runs.write_faults import needs_forks, train

pytestmark = needs_forks


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    assert forked(lambda: train(folder)).kind == "ended"
    return folder


def test_damaged_runs_are_refused_or_give_the_same(ended: Path, tmp_path: Path) -> None:
    account = damage.damaged_runs("load", ended, tmp_path / "run", 12, "sample")
    assert account.failed == []
    assert account.counts[REFUSED] > 0


def test_forged_configurations_are_refused_or_give_the_same(ended: Path, tmp_path: Path) -> None:
    account = damage.forged_runs("load", ended, tmp_path / "run", 20, "sample", (damage.EQUAL, REFUSED))
    assert account.failed == []
    assert account.counts[REFUSED] > 0


def test_damaged_and_forged_demonstrations_are_refused_or_give_the_same(tmp_path: Path) -> None:
    account = damage.damaged_demonstrations(damage.demonstrations(tmp_path / "demo"), 15, 25, "sample")
    assert account.failed == []
    assert account.counts[REFUSED] > 0
