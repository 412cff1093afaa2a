"""Units of continuous actions: those of the environment, and those in which a policy's Gaussian lives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlmeta.errors import SettingError

ActionBounds: TypeAlias = Literal["scale", "squash", "clip"]
"""What the bounds of a Box do to a Gaussian policy: they are its unit, a tanh keeps it within them, or it ignores them
and the environment clips."""

_LARGEST = torch.finfo(torch.float32).max


class ActionUnits:
    """action = centre + unit u, component by component: a Box's bounds are at u = -1 and u = 1.

    A policy starts around u = 0 with a deviation of 1, whatever the environment counts in. A component with one bound
    has it at -1 or 1 and keeps its own unit; one without bounds, or with float32's largest numbers as bounds, is as it
    is; one that can only be `low` has u = 0 there.

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
        """Compare the units.

        Args:
            shape: of an action.
            low: lower bounds, A numbers; none where left out.
            high: upper bounds.

        Raises:
            SettingError: as many bounds as components are needed, none above its upper one.
        """
        count = math.prod(shape)
        lower, upper = _bounds(low, -math.inf, count), _bounds(high, math.inf, count)
        if any(not a <= b for a, b in zip(lower, upper)) or len(lower) != count or len(upper) != count:
            raise SettingError(f"bounds {lower} and {upper} are no intervals for {count} actions")
        found = [_centre_and_unit(a, b) for a, b in zip(lower, upper)]
        self.shape = shape
        self.centre, self.unit = (
            torch.tensor([one[i] for one in found], dtype=torch.float32, device="cpu") for i in (0, 1)
        )
        self.bounded = all(math.isfinite(b - a) and a < b for a, b in zip(lower, upper))
        self._same = bool((self.centre == 0).all() and (self.unit == 1).all())

    def to_environment(self, u: Tensor) -> Tensor:
        """Policy units `[..., A]` -> actions `[..., *shape]`."""
        action = u if self._same else torch.addcmul(self.centre.to(u), u, self.unit.to(u))
        return action if len(self.shape) == 1 else action.reshape((*action.shape[:-1], *self.shape))

    def to_policy(self, action: Tensor) -> Tensor:
        """Actions `[..., *shape]` -> policy units `[..., A]`."""
        axes = len(self.shape)
        flat = action if axes == 1 else action.reshape(*action.shape[: action.dim() - axes], -1)
        return flat if self._same else (flat - self.centre.to(flat)) / self.unit.to(flat)

    def step(self, u: Tensor) -> Tensor:
        """Differences of actions: policy units `[..., *shape]` -> the environment's, of the same shape."""
        return u if self._same else u * self.unit.to(u).reshape(self.shape)


def _bounds(given: Sequence[float] | None, none: float, count: int) -> list[float]:
    """The bounds as numbers; those as large as a float32 can be are none."""
    bounds = [none] * count if given is None else [float(bound) for bound in given]
    return [math.copysign(math.inf, bound) if abs(bound) >= _LARGEST else bound for bound in bounds]


def _centre_and_unit(low: float, high: float) -> tuple[float, float]:
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2, (high - low) / 2 if low < high else 1.0
    if math.isfinite(low):
        return low + 1.0, 1.0
    return (high - 1.0, 1.0) if math.isfinite(high) else (0.0, 1.0)
