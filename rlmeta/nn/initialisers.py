"""Weight initialisation."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError

Initialiser: TypeAlias = Literal["orthogonal", "torch"]
"""Name of a weight initialisation; see `initialise`."""


def parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
    """Parameter filled with one value: float32 on the CPU, whatever torch's defaults are; `Module.to` moves it."""
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32, device="cpu"))


def initialise(weight: Tensor, bias: Tensor | None, initialiser: Initialiser, gain: float = 1.0) -> None:
    """Initialise the weight and bias of a linear or convolutional layer in place, drawing from torch's generator.

    "orthogonal": orthonormal rows or columns times `gain`, bias 0 (Saxe et al., 2014), usual for policy gradients.
    "torch": as torch's layers, uniform within 1 / sqrt(in), times `gain`. Of a convolution `in` counts every entry that
    an output sees.

    Args:
        weight: `[out, in]`, of a convolution `[out, in, *kernel]`.
        bias: `[out]` or None.
        initialiser: one of the two.
        gain: factor of the weights.

    Raises:
        SettingError: the initialiser is unknown.
    """
    if initialiser == "orthogonal":
        nn.init.orthogonal_(weight, gain)
        if bias is not None:
            nn.init.zeros_(bias)
    elif initialiser == "torch":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            incoming = math.prod(weight.shape[1:])
            bound = 1.0 / math.sqrt(incoming) if incoming > 0 else 0.0
            nn.init.uniform_(bias, -bound, bound)
        if gain != 1.0:
            weight.data.mul_(gain)
    else:
        raise SettingError(f"initialiser {initialiser!r} is unknown, expected 'orthogonal' or 'torch'")
