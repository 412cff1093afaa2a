"""Optimizer state: initial moments, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.optim import Optimizer, apply_updates, clip_by_norm
from rlmeta.functional.packed import Packed
from rlmeta.learning.groups import Group, check_partition, entries, spans, whole, with_entries
from rlmeta.learning.state import State


def reset_optimizer(state: State) -> State:
    """Reset the optimizer's moments to zero, as at the start of a run."""
    return {**state, "optimizer": tree.map(torch.zeros_like, state["optimizer"])}


def init_optimizer(optimizer: Optimizer | Sequence[Group], state: State) -> State:
    """Initial moments of every group `{name: moments}` for the packed weights of a state; one optimizer is one group.

    Raises:
        SettingError: the groups are not each weight's only one.
    """
    packed = Packed.of(state["params"]["weights"], state["key"].dim())
    groups = as_groups(optimizer)
    check_partition(groups, packed)
    return {
        group.name: group.optimizer.init(
            {"weights": entries(packed.flat, spans(group, packed)).contiguous()}, state["key"].shape
        )
        for group in groups
    }


def as_groups(optimizer: Optimizer | Sequence[Group], max_norm: float | Tensor | None = None) -> tuple[Group, ...]:
    """Convert an optimizer to one group of all weights; groups stay as they are."""
    return whole(optimizer, max_norm) if isinstance(optimizer, Optimizer) else tuple(optimizer)


def move(
    weights: Packed,
    moments: State,
    gradients: dict[str, Tensor],
    groups: Sequence[Group],
    axes: int,
    frozen: Tensor | None = None,
) -> tree.Tree:
    """Take one optimizer step with every group; weights and moments of other groups stay.

    Args:
        weights: packed, `[*L, P]`.
        moments: of every group by name.
        gradients: of the groups that move, by name, each `[*L, G]`.
        groups: those that move.
        axes: how many leading axes are learner axes.
        frozen: None, or entries `[*L, P]` (bool) that are written back, with the moments under them.

    Returns:
        `flat` `[*L, P]`, `moments`, the `norm` of the gradients before they were clipped and whether all is `finite`.
    """
    changed, new_moments, norms, finite = [], dict(moments), [], []
    for group in groups:
        places = spans(group, weights)
        held = None if frozen is None else entries(frozen, places)
        moved = _move_group(
            entries(weights.flat, places), moments[group.name], gradients[group.name], group, axes, held
        )
        changed.append((places, moved["flat"]))
        new_moments[group.name] = moved["moments"]
        norms.append(moved["norm"])
        finite.append(moved["finite"])
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
    all_finite = finite[0] if len(finite) == 1 else torch.stack(finite).all(0)
    flat = with_entries(weights.flat, changed)
    return {"flat": flat, "moments": new_moments, "norm": norm, "finite": all_finite}


def _move_group(
    flat: Tensor, moments: State, gradient: Tensor, group: Group, axes: int, frozen: Tensor | None
) -> tree.Tree:
    """Clip the gradient of a group and take the optimizer's step; frozen entries and their moments are restored."""
    clipped, norm = clip_by_norm({"weights": gradient}, group.max_norm, axes)
    updates, new_moments = group.optimizer.update(clipped, moments, {"weights": flat})
    new_flat = apply_updates({"weights": flat}, updates)["weights"]
    if frozen is not None:
        new_flat = torch.where(frozen, flat, new_flat)
        new_moments = tree.map(
            lambda new: new.masked_fill(frozen, 0.0) if new.shape == flat.shape else new, new_moments
        )
    finite = torch.isfinite(norm + new_flat.sum(-1))  # one not finite entry makes the sum so
    return {"flat": new_flat, "moments": new_moments, "norm": norm, "finite": finite}
