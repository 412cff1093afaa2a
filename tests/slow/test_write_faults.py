"""Every call that writes while a run is resumed goes wrong in every way, and the run is resumed to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.write_faults import MODES, calls_of, failures, needs_forks, unfinished

pytestmark = [pytest.mark.slow, needs_forks]


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_of_any_call_that_writes(mode: str, tmp_path: Path) -> None:
    whole = unfinished(tmp_path / "whole")
    _, calls = calls_of(whole, tmp_path / "run")
    counts, failed = failures(whole, tmp_path / "run", [(at, mode) for at in range(1, len(calls) + 1)])
    print(f"{len(calls)} calls, {dict(counts)}, {len(failed)} failed", *failed, sep="\n")
    assert counts.total() == len(calls) > 100
    assert failed == []
