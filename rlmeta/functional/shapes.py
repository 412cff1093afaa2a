"""Argument checks of shapes and flags.

Torch silently broadcasts `[B]` with `[B, 1]` to `[B, B]`, and `~` of an integer negates its bits where a flag was
meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError


def same_shape(dims: int = 1, **tensors: Tensor | None) -> None:
    """Check that tensors have one shape; None stands for an argument that was left out.

    Args:
        dims: smallest number of axes.
        tensors: the caller's arguments under their own names, which the message repeats.

    Raises:
        ValueError: two shapes differ, or there are fewer than `dims` axes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(shapes.values()))
    if len(first) < dims or any(shape != first for shape in shapes.values()):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected one shape, of at least {dims} axes, for all of: {listed}")


def flags(tensor: Tensor, name: str) -> Tensor:
    """Convert flags to bool: bool is returned as it is, integers are set where not 0, other types are refused.

    Real numbers are refused because they usually are another argument in the wrong place (a discount, which is 0 where
    a flag is 1), or a mask that is added to logits.

    Args:
        tensor: bool or integers, of any shape.
        name: of the caller's argument, which the message repeats.

    Raises:
        SettingError: `tensor` is no tensor, or neither bool nor integers.
    """
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise SettingError(f"{name} is of type {kind}, expected a tensor of flags: convert it with torch.as_tensor")
    if tensor.dtype is torch.bool:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        raise SettingError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected flags, bool or integers 0 and 1: where "
            f"numbers other than 0 stand for set, pass `{name} != 0`"
        )
    return tensor != 0
