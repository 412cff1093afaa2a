"""The check that opens every function of data: torch broadcasts `[B]` with `[B, 1]` to `[B, B]` and says nothing."""

from __future__ import annotations

from torch import Tensor


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
