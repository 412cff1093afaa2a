"""Target networks and weight averages: slowly moving copies of a network, kept among the buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.functional.axes import align
from rlmeta.learning.state import Params, State


class Copy(NamedTuple):
    """Target network: a copy of all weights and buffers whose names begin with a prefix."""

    name: str
    """Prefix of the copy: `target` has `target.linear.weight` for `q.linear.weight`."""
    source: str
    """Prefix of the network that the copy follows."""

    def sources(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Online network's tensors, weights and buffers, under the names of the target network that tracks them."""
        start = f"{self.source}."
        online = {**weights, **buffers}
        return {f"{self.name}.{n.removeprefix(start)}": t for n, t in online.items() if n.startswith(start)}


def with_copy(p: Params, copy: Copy) -> Params:
    """Add a target network, equal to its online network, to the buffers."""
    copies = {name: value.detach().clone() for name, value in copy.sources(p["weights"], p["buffers"]).items()}
    return {**p, "buffers": {**p["buffers"], **copies}}


@torch.no_grad()
def moved(copy: Copy, rate: Tensor, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Polyak averaging: the copy after copy += rate (source - copy), by names; at a `rate` `[*L]` of 0 it stays."""
    return {name: _nearer(buffers[name], value, rate) for name, value in copy.sources(weights, buffers).items()}


def follow(state: State, copy: Copy, rate: Tensor) -> None:
    """Soft (Polyak) update of a target network in a state, at `rate` `[*L]`; inactive learners keep theirs."""
    p = state["params"]
    p["buffers"] = {**p["buffers"], **moved(copy, rate * state["active"], p["weights"], p["buffers"])}


def _nearer(copy: Tensor, source: Tensor, rate: Tensor) -> Tensor:
    """Interpolate copy + rate (source - copy) in the copy's dtype; integers are copied from the source."""
    if not source.is_floating_point():
        return torch.where(align(rate, source) > 0, source, copy)
    return torch.lerp(copy.to(source.dtype), source, align(rate.to(source.dtype), source))
