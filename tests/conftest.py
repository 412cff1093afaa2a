"""Shared set-up of the test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes, and those they start, share two cores

import pytest
import torch
from hypothesis import settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlmeta.report import curves, matrices
from tests import without_jit
from tests.default_device import DefaultDeviceMeta

settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci")

KNOWN_SKIPS = Path(__file__).with_name("skips.txt")
"""Tests that may be skipped where the machine lacks what they need, one node id (or its beginning) a line."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --default-device-meta, what rlmeta makes without naming a device has no numbers."""
    with DefaultDeviceMeta() if request.config.getoption("--default-device-meta") else nullcontext():
        yield


_DRAWS = {module: module._figure for module in (curves, matrices)}


@pytest.fixture(autouse=True, scope="session")
def light_folders() -> Iterator[None]:
    """Folders of runs hold blank pictures, for to draw one takes longer than most runs here; and nothing waits for the
    disk: what that does shows only after a power failure, and that it is asked for in the right places has tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        for module in _DRAWS:
            patched.setattr(module, "_figure", lambda *_: FigureCanvasAgg(Figure((1, 1))).figure)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of pictures: they are drawn."""
    for module, draw in _DRAWS.items():
        monkeypatch.setattr(module, "_figure", draw)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--default-device-meta", action="store_true", help="see tests/default_device.py")
    parser.addoption("--without-jit", action="store_true", help="see tests/without_jit.py")
    parser.addoption("--no-new-skips", action="store_true", help="fail where a test is skipped that skips.txt lacks")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-jit"):
        without_jit.take_away()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is about that which was taken away."""
    if config.getoption("--without-jit"):
        kept = without_jit.others(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _skipped(config: pytest.Config) -> list[str]:
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else sorted({report.nodeid for report in reporter.stats.get("skipped", [])})


def _new_skips(config: pytest.Config) -> list[str]:
    known = [line for line in KNOWN_SKIPS.read_text().splitlines() if line and not line.startswith("#")]
    return [node for node in _skipped(config) if not node.startswith(tuple(known))]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that silently stopped running proves nothing, so a skip that nobody allowed is a failure."""
    on_worker = hasattr(session.config, "workerinput")
    if not on_worker and session.config.getoption("--no-new-skips") and _new_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which tests were skipped, and which of them should not have been."""
    for node in _skipped(config):
        terminalreporter.write_line(f"skipped: {node}")
    if config.getoption("--no-new-skips"):
        for node in _new_skips(config):
            terminalreporter.write_line(f"FAILED by --no-new-skips: {node} is not in tests/skips.txt", red=True)
