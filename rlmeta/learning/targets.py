"""Target networks and averages of weights: slowly moving copies of a network, kept among the buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.functional.axes import align
from rlmeta.learning.state import Params, State


class Copy(NamedTuple):
    """A copy of all weights and buffers whose names begin with a prefix."""

    name: str
    """The copy's prefix: `target` has `target.linear.weight` for `q.linear.weight`."""
    source: str
    """The prefix of what it follows."""

    def sources(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it follows, under the copy's own names."""
        start = f"{self.source}."
        online = {**weights, **buffers}
        return {f"{self.name}.{n.removeprefix(start)}": t for n, t in online.items() if n.startswith(start)}


def with_copy(p: Params, copy: Copy) -> Params:
    """Parameters with a copy, equal to its source, among the buffers."""
    copies = {name: value.detach().clone() for name, value in copy.sources(p["weights"], p["buffers"]).items()}
    return {**p, "buffers": {**p["buffers"], **copies}}


@torch.no_grad()
def moved(copy: Copy, rate: Tensor, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The copy's tensors after copy += rate (source - copy), by their names; `rate` is `[*L]`, 0 leaves it as it is."""
    return {name: _nearer(buffers[name], value, rate) for name, value in copy.sources(weights, buffers).items()}


def follow(state: State, copy: Copy, rate: Tensor) -> None:
    """Move a copy in a state on, for the learners that are active."""
    p = state["params"]
    p["buffers"] = {**p["buffers"], **moved(copy, rate * state["active"], p["weights"], p["buffers"])}


def _nearer(copy: Tensor, source: Tensor, rate: Tensor) -> Tensor:
    """copy + rate (source - copy), in the copy's type; what is counted, not measured, is taken over."""
    if not source.is_floating_point():
        return torch.where(align(rate, source) > 0, source, copy)
    return torch.lerp(copy.to(source.dtype), source, align(rate.to(source.dtype), source))
