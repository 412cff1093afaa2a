"""Without TorchScript: `pytest --without-jit` runs tests as if torch had no `torch.jit` any more.

It is deprecated, and off the road map of newer Pythons: its absence may cost speed and nothing else. Tests that are
about it, by their names or their parameters, are left out. Processes that tests start have it: so what was killed with
it goes on without it, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch


def _absent(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("torch.jit is not there: --without-jit")


def take_away() -> None:
    """From now on `torch.jit.trace` and `torch.jit.script` raise."""
    torch.jit.trace = torch.jit.script = _absent  # type: ignore[assignment]


def others(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that are not about TorchScript."""
    return [item for item in items if "torchscript" not in item.name]
