"""Parameter groups: weights with losses, an optimizer and a gradient clip of their own.

A group's losses are differentiated with respect to its own weights alone, so no actor's gradient reaches a critic.
Which groups move is known before a step: those that are given to it. The others come out of it bit-identical, and so
do their moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional.optim import Optimizer
from rlmeta.functional.packed import Packed

Span = tuple[int, int]
"""Index ranges (start, end) among packed weights `[*L, P]`."""


class Group(NamedTuple):
    """Parameter group: weights that are updated together."""

    name: str
    """Name of the group, under which the optimizer's moments are kept."""
    weights: tuple[str, ...]
    """Prefixes of the names of the group's weights."""
    losses: tuple[str, ...] | None
    """Names of the losses that are summed and differentiated with respect to the group's weights; None for all."""
    optimizer: Optimizer
    max_norm: float | Tensor = torch.inf
    """Norm to which each learner's gradient is clipped; a number or `[*L]`."""

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Sum of the group's losses, `[*L]`."""
        chosen = [loss for name, loss in losses.items() if self.losses is None or name in self.losses]
        if not chosen:
            raise SettingError(f"the group {self.name!r} needs a loss of {self.losses}, there are {sorted(losses)}")
        return torch.stack(chosen).sum(0) if len(chosen) > 1 else chosen[0]

    def own(self, names: Iterable[str]) -> list[str]:
        """Select the names of the group's weights."""
        return [name for name in names if name.startswith(self.weights)]


def whole(optimizer: Optimizer, max_norm: float | Tensor | None = None) -> tuple[Group, ...]:
    """Create one group of all weights, trained on all losses."""
    return (Group("all", ("",), None, optimizer, torch.inf if max_norm is None else max_norm),)


def moving(groups: Sequence[Group]) -> frozenset[str] | None:
    """Names of the groups to update, for `StepContext.moving`; None if one group has all losses."""
    return None if any(group.losses is None for group in groups) else frozenset(group.name for group in groups)


def check_partition(groups: Sequence[Group], names: Iterable[str]) -> None:
    """Check that every weight belongs to exactly one group.

    Raises:
        SettingError: a weight is in no group or in several, or two groups share a name.
    """
    if len({group.name for group in groups}) < len(groups):
        raise SettingError(f"groups repeat: {', '.join(group.name for group in groups)}; give each a name of its own")
    for name in names:
        owners = [group.name for group in groups if group.own([name])]
        if len(owners) != 1:
            where = f"in the groups {', '.join(owners)}" if owners else "in no group"
            raise SettingError(f"the weight {name} is {where}, expected in one: groups split the weights by prefix")


def spans(group: Group, weights: Packed) -> list[Span]:
    """Index ranges of a group's weights among the packed ones, with neighbours joined."""
    joined: list[Span] = []
    start = 0
    for name, shape in zip(weights, weights.shapes):
        end = start + shape.numel()
        if name.startswith(group.weights):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        start = end
    if not joined:
        raise SettingError(f"the group {group.name!r} has no weight: none begins with {' or '.join(group.weights)}")
    return joined


def entries(flat: Tensor, places: Sequence[Span]) -> Tensor:
    """Select the entries of a group, `[*L, P]` -> `[*L, G]`; a view if they are contiguous."""
    if places[0] == (0, flat.shape[-1]):
        return flat
    pieces = [flat[..., start:end] for start, end in places]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def with_entries(flat: Tensor, changed: Sequence[tuple[Sequence[Span], Tensor]]) -> Tensor:
    """Replace the entries of some groups in `flat` `[*L, P]`; a group of all weights is returned as it is."""
    if len(changed) == 1 and changed[0][0][0] == (0, flat.shape[-1]):
        return changed[0][1]
    pieces: list[tuple[int, int, Tensor]] = []
    for places, values in changed:
        offset = 0
        for start, end in places:
            pieces.append((start, end, values[..., offset : offset + end - start]))
            offset += end - start
    ordered, at = [], 0
    for start, end, piece in sorted(pieces, key=lambda entry: entry[0]):
        if start > at:
            ordered.append(flat[..., at:start])
        ordered.append(piece)
        at = end
    if at < flat.shape[-1]:
        ordered.append(flat[..., at:])
    return torch.cat(ordered, -1)
