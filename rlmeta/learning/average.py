"""Averages of metrics over the gradient steps of an update."""

from __future__ import annotations

from torch import Tensor


class Average:
    """Running means of named tensors `[*L]`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of a gradient step to the running means."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def result(self) -> dict[str, Tensor]:
        """Mean of every metric over the steps that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
