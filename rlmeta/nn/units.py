"""Action scaling: between the environment's units and those of a policy's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlmeta.errors import SettingError

ActionBounds: TypeAlias = Literal["scale", "squash", "clip"]
"""Effect of a Box's bounds on a Gaussian policy: they scale its actions, a tanh squashes actions into them, or only the
environment clips actions."""

_LARGEST = torch.finfo(torch.float32).max


class ActionUnits:
    """Affine action scaling, action = centre + unit u per component, with a Box's bounds at u = -1 and u = 1.

    A policy starts around u = 0 with a standard deviation of 1, whatever the environment's units. A component with one
    bound has it at -1 or 1 and keeps its unit; without bounds, or with float32's largest numbers as bounds, it is not
    scaled; a component whose bounds are equal has u = 0 there.

    Attributes:
        centre: `[A]` float32.
        unit: `[A]` float32.
        bounded: whether every component has two different bounds.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
    ) -> None:
        """Derive the scaling from the bounds of a Box.

        Args:
            shape: of an action.
            low: lower bounds, A numbers; None for none.
            high: upper bounds.

        Raises:
            SettingError: there are not as many bounds as components, or a lower bound is above its upper bound.
        """
        count = math.prod(shape)
        lower, upper = _bounds(low, -math.inf, count), _bounds(high, math.inf, count)
        if any(not a <= b for a, b in zip(lower, upper)) or len(lower) != count or len(upper) != count:
            raise SettingError(f"bounds {lower} and {upper} are no intervals for {count} actions")
        scalings = [_centre_and_unit(a, b) for a, b in zip(lower, upper)]
        self.shape = shape
        self.centre, self.unit = (
            torch.tensor([scaling[i] for scaling in scalings], dtype=torch.float32, device="cpu") for i in (0, 1)
        )
        self.bounded = all(math.isfinite(b - a) and a < b for a, b in zip(lower, upper))
        self._same = bool((self.centre == 0).all() and (self.unit == 1).all())

    def to_environment(self, u: Tensor) -> Tensor:
        """Convert policy units `[..., A]` to actions `[..., *shape]`."""
        action = u if self._same else torch.addcmul(self.centre.to(u), u, self.unit.to(u))
        return action if len(self.shape) == 1 else action.reshape((*action.shape[:-1], *self.shape))

    def to_policy(self, action: Tensor) -> Tensor:
        """Convert actions `[..., *shape]` to policy units `[..., A]`."""
        axes = len(self.shape)
        flat = action if axes == 1 else action.reshape(*action.shape[: action.dim() - axes], -1)
        return flat if self._same else (flat - self.centre.to(flat)) / self.unit.to(flat)

    def step(self, u: Tensor) -> Tensor:
        """Convert differences of actions from policy units `[..., *shape]` to the environment's."""
        return u if self._same else u * self.unit.to(u).reshape(self.shape)


def _bounds(declared: Sequence[float] | None, unbounded: float, count: int) -> list[float]:
    """Bounds as floats; those at the limits of float32 count as infinite."""
    bounds = [unbounded] * count if declared is None else [float(bound) for bound in declared]
    return [math.copysign(math.inf, bound) if abs(bound) >= _LARGEST else bound for bound in bounds]


def _centre_and_unit(low: float, high: float) -> tuple[float, float]:
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2, (high - low) / 2 if low < high else 1.0
    if math.isfinite(low):
        return low + 1.0, 1.0
    return (high - 1.0, 1.0) if math.isfinite(high) else (0.0, 1.0)
