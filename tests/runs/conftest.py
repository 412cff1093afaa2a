"""What the tests of runs share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.runs.killer import Killer


@pytest.fixture(scope="session")
def killer() -> Iterator[Killer]:
    """Where runs are killed."""
    process = Killer()
    yield process
    process.close()


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
    """As it would be in a suite that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
