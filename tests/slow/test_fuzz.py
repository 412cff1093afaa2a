"""Files of runs and of demonstrations, damaged and forged at random: a clean error, or the value of the whole file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import damage
from tests.runs.forked import REFUSED, forked
from tests.runs.write_faults import needs_forks, train, unfinished

pytestmark = [pytest.mark.slow, needs_forks]


def run_for(reader: str, folder: Path) -> Path:
    """A run that has ended, to be loaded, or one that has not, to be resumed."""
    if reader == "resume":
        return unfinished(folder)
    assert forked(lambda: train(folder)).kind == "ended"
    return folder


@pytest.mark.parametrize("reader", damage.READERS)
def test_damaged_runs(reader: str, tmp_path: Path) -> None:
    account = damage.damaged_runs(reader, run_for(reader, tmp_path / "whole"), tmp_path / "run", 150, reader)
    print(f"{reader}: {account}")
    assert account.failed == []


@pytest.mark.parametrize("reader", damage.READERS)
def test_forged_configurations(reader: str, tmp_path: Path) -> None:
    """A resume may be one of another experiment, where what is forged is a setting that training can have."""
    whole = run_for(reader, tmp_path / "whole")
    allowed = (damage.EQUAL, REFUSED, *([damage.CHANGED] if reader == "resume" else []))
    account = damage.forged_runs(reader, whole, tmp_path / "run", 250 if reader == "load" else 100, reader, allowed)
    print(f"{reader}: {account}")
    assert account.failed == []


def test_damaged_and_forged_plans(tmp_path: Path) -> None:
    """What is forged may be another plan that a command could have written."""
    whole = damage.plan_of_groups(tmp_path / "whole")
    for account in (
        damage.damaged_runs("plan", whole, tmp_path / "g", 60, "plan"),
        damage.forged_plans(whole, tmp_path / "g", 250, "plan"),
    ):
        print(f"plan: {account}")
        assert account.failed == []


def test_damaged_and_forged_demonstrations(tmp_path: Path) -> None:
    account = damage.damaged_demonstrations(damage.demonstrations(tmp_path / "demo"), 150, None, "demonstrations")
    print(account)
    assert account.counts.total() > 300
    assert account.failed == []
