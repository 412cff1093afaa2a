"""What heads share: their linear layer, and actions as one axis."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from rlmeta.nn.block import Context, Params
from rlmeta.nn.linear import tapped

Distribution: TypeAlias = dict[str, Tensor]
"""Parameters of one distribution per learner and batch row."""


def project(params: Params, x: Tensor, ctx: Context, prefix: str) -> Tensor:
    """The head's linear layer, without the detour over its module."""
    return tapped(ctx, f"{prefix}linear.", x, params[prefix + "linear.weight"], params[prefix + "linear.bias"])


def flat(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., *shape]` -> `[..., A]`."""
    return action if len(shape) == 1 else action.reshape(*action.shape[: action.dim() - len(shape)], -1)


def shaped(action: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[..., A]` -> `[..., *shape]`."""
    return action if len(shape) == 1 else action.reshape((*action.shape[:-1], *shape))
