"""Helpers of policy and value heads: their linear layer, and flattening of actions."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from rlmeta.nn.block import Context, Params
from rlmeta.nn.linear import tapped

Distribution: TypeAlias = dict[str, Tensor]
"""Parameters of a distribution by name, each `[*L, ..., K]`."""


def project(params: Params, x: Tensor, ctx: Context, prefix: str) -> Tensor:
    """Apply the linear layer of a head, from `params` directly: `[*L, ..., D]` -> `[*L, ..., K]`."""
    return tapped(ctx, f"{prefix}linear.", x, params[prefix + "linear.weight"], params[prefix + "linear.bias"])


def flat(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flatten actions `[..., *shape]` -> `[..., A]`."""
    return action if len(shape) == 1 else action.reshape(*action.shape[: action.dim() - len(shape)], -1)


def shaped(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unflatten actions `[..., A]` -> `[..., *shape]`."""
    return action if len(shape) == 1 else action.reshape((*action.shape[:-1], *shape))
