"""The optimizer's moments in a state: their start, and one step along a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.optim import Optimizer, apply_updates, clip_by_norm
from rlmeta.functional.packed import Packed
from rlmeta.learning.state import State


def reset_optimizer(state: State) -> State:
    """The optimizer's moments as at the start of a run: every one of them starts at zero."""
    return {**state, "optimizer": tree.map(torch.zeros_like, state["optimizer"])}


def init_optimizer(optimizer: Optimizer, state: State) -> State:
    """The optimizer's moments for the packed weights of a state."""
    packed = Packed.of(state["params"]["weights"], state["key"].dim())
    return optimizer.init({"weights": packed.flat}, state["key"].shape)


def move(
    flat: Tensor,
    moments: State,
    gradient: Tensor,
    max_norm: float | Tensor,
    axes: int,
    optimizer: Optimizer,
    frozen: Tensor | None = None,
) -> tree.Tree:
    """Clip, then the optimizer's move; frozen entries, and the moments under them, are written back."""
    clipped, norm = clip_by_norm({"weights": gradient}, max_norm, axes)
    updates, new_moments = optimizer.update(clipped, moments, {"weights": flat})
    new_flat = apply_updates({"weights": flat}, updates)["weights"]
    if frozen is not None:
        new_flat = torch.where(frozen, flat, new_flat)
        new_moments = tree.map(
            lambda new: new.masked_fill(frozen, 0.0) if new.shape == flat.shape else new, new_moments
        )
    finite = torch.isfinite(norm + new_flat.sum(-1))  # one not finite entry makes the sum so
    return {"flat": new_flat, "moments": new_moments, "norm": norm, "finite": finite}
