"""Learner axes: broadcasting per-learner settings `[*L]` against data `[*L, ...]`, and masked means over the rest."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from rlmeta.functional.shapes import flags


@overload
def align(setting: float, x: Tensor) -> float: ...
@overload
def align(setting: Tensor, x: Tensor) -> Tensor: ...
def align(setting: float | Tensor, x: Tensor) -> float | Tensor:
    """Reshape a per-learner setting `[*L]` so that it broadcasts against data `[*L, ...]`.

    Torch broadcasts from the right while learner axes are a prefix on the left; a setting `[*L]` therefore gets one
    trailing axis of size 1 for every further axis of `x`.

    Args:
        setting: a number, or a tensor `[*L]` whose shape is a prefix of `x`'s.
        x: data `[*L, ...]`.

    Returns:
        The number itself, or `setting` as `[*L, 1, ..., 1]`.

    Raises:
        ValueError: `setting.shape` is not a prefix of `x.shape`.
    """
    if not isinstance(setting, Tensor) or setting.dim() == 0:
        return setting
    if x.shape[: setting.dim()] != setting.shape:
        raise ValueError(f"learner axes {tuple(setting.shape)} are not a prefix of the data's shape {tuple(x.shape)}")
    return setting.reshape(setting.shape + (1,) * (x.dim() - setting.dim()))


def masked_mean(x: Tensor, valid: Tensor | None = None, axes: int = 1) -> Tensor:
    """Masked mean over the last `axes` axes: only entries where `valid` is set are counted (0 where none is).

    Args:
        x: `[*L, ...]`.
        valid: None, or of `x`'s shape: flags, bool or integers 0 and 1; real numbers are weights of 0 or more.
        axes: number of trailing axes to average over.

    Returns:
        `[*L]`

    Raises:
        ValueError: `valid` has another shape than `x`.
    """
    dims = tuple(range(-axes, 0))
    if valid is None:
        return x.mean(dims)
    weights = isinstance(valid, Tensor) and valid.is_floating_point()
    counted = valid != 0 if weights else flags(valid, "valid")
    if valid.shape != x.shape:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, expected that of x, {tuple(x.shape)}")
    weight = (valid if weights else counted).to(x.dtype)
    total = weight.sum(dims)
    summed = torch.where(counted, x, torch.zeros_like(x)).mul(weight).sum(dims)
    return summed / torch.where(total > 0, total, torch.ones_like(total))
