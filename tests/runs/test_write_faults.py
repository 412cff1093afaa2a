"""A resume in which a call that writes goes wrong: every kind of call on every kind of file, one of the modes each.

tests/slow/test_write_faults.py has all calls and all modes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.write_faults import MODES, calls_of, failures, needs_forks, unfinished

POINTS = 12


@needs_forks
@pytest.mark.slow
def test_a_resume_that_a_fault_ends_is_resumed_to_the_same_end(tmp_path: Path) -> None:
    whole = unfinished(tmp_path / "whole")
    _, calls = calls_of(whole, tmp_path / "run")
    kinds = {kind: calls.index(kind) + 1 for kind in calls}
    assert len(kinds) > 20, kinds
    places = list(kinds.values())
    chosen = [places[i * len(places) // POINTS] for i in range(POINTS)]
    _, failed = failures(whole, tmp_path / "run", [(at, MODES[i % len(MODES)]) for i, at in enumerate(chosen)])
    assert failed == []
