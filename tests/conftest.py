"""Shared set-up of the test suite."""

from __future__ import annotations

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes, and those they start, share two cores

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)
