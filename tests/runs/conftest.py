"""What the tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runs.killer import Killer


@pytest.fixture(scope="session")
def killer() -> Iterator[Killer]:
    """Where runs are killed."""
    process = Killer()
    yield process
    process.close()
