"""The checks that open every function of data.

Torch broadcasts `[B]` with `[B, 1]` to `[B, B]`, and negates the bits of an integer where `~` is meant to negate a
flag, and says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError


def same_shape(dims: int = 1, **tensors: Tensor | None) -> None:
    """Refuse tensors that differ in shape; None stands for an argument that was left out.

    Args:
        dims: how many axes they must have at least.
        tensors: the caller's arguments under their own names, which the message repeats.

    Raises:
        ValueError: two shapes differ, or there are fewer than `dims` axes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(shapes.values()))
    if len(first) < dims or any(shape != first for shape in shapes.values()):
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected one shape, of at least {dims} axes, for all of: {given}")


def flags(given: Tensor, name: str) -> Tensor:
    """Flags as bool: bool is returned as it is, integers are set where they are not 0, anything else is refused.

    A real number is refused for what it usually is: another argument in the wrong place (a discount, which is 0 where
    a flag is 1), or a mask that is added to logits.

    Args:
        given: bool or integers, of any shape.
        name: of the caller's argument, which the message repeats.

    Raises:
        SettingError: it is no tensor, or not of such numbers.
    """
    if not isinstance(given, Tensor):
        raise SettingError(f"{name} is a {type(given).__name__}, expected a tensor of flags: torch.as_tensor makes one")
    if given.dtype is torch.bool:
        return given
    if given.is_floating_point() or given.is_complex():
        raise SettingError(
            f"{name} is {str(given.dtype).removeprefix('torch.')}, expected flags, bool or integers 0 and 1: where "
            f"numbers other than 0 stand for set, pass `{name} != 0`"
        )
    return given != 0
