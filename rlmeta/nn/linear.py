"""Linear layers, activations and flattening."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params, fetch, learner_axes
from rlmeta.nn.initialisers import Initialiser, initialise, parameter
from rlmeta.nn.product import affine, layers, learner_product

ActivationName: TypeAlias = Literal["tanh", "relu", "elu", "gelu", "silu", "sigmoid", "leaky_relu", "softplus"]
"""Name of an activation function."""


def activation_function(activation: ActivationName | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Activation function by name; a function is returned as it is.

    Raises:
        SettingError: the name is not one of `ActivationName`.
    """
    if callable(activation):
        return activation
    if activation not in get_args(ActivationName):
        raise SettingError(
            f"activation {activation!r} is unknown, expected a function or one of {', '.join(get_args(ActivationName))}"
        )
    function: Callable[[Tensor], Tensor] = getattr(torch, activation, None) or getattr(F, activation)
    return function


def check_linear(x: Tensor, weight: Tensor) -> None:
    """Refuse an input whose learner axes or features are not those of the weight `[*L, out, in]`."""
    if (
        x.shape[: weight.dim() - 2] != weight.shape[:-2]
        or x.shape[-1:] != weight.shape[-1:]
        or x.dim() < weight.dim() - 1
    ):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected {(*weight.shape[:-2], '...', weight.shape[-1])} "
            f"for a weight of shape {tuple(weight.shape)}"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear map y = x Wᵀ + b for every learner.

    Args:
        x: `[*L, ..., in]`.
        weight: `[*L, out, in]`.
        bias: `[*L, out]` or None.

    Returns:
        `[*L, ..., out]`

    Raises:
        ValueError: `x` does not fit the weight.
    """
    check_linear(x, weight)
    axes = weight.dim() - 2
    if axes == 0:
        return affine(x, weight, bias)
    offset = None if bias is None else bias.unsqueeze(-2)
    if axes == 1 and x.dim() == 3:
        return _product(x, weight, offset)
    learners = weight.shape[:-2].numel()
    out = _product(
        x.reshape(learners, x.shape[axes:-1].numel(), x.shape[-1]),
        weight.reshape(learners, *weight.shape[-2:]),
        None if offset is None else offset.reshape(learners, 1, -1),
    )
    return out.reshape(*x.shape[:-1], weight.shape[-2])


def tapped(ctx: Context, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear map that also records its input and output in `ctx.taps`, unless that is None, for per-sample gradients.

    The weights are then treated as constants: their gradients follow from the taps, so that in the graph they have a
    gradient only where something else uses them too.

    Args:
        ctx: with taps, or without for an ordinary linear map.
        prefix: of the layer's names in the parameters, under which the call is recorded.
        x: `[*L, ..., in]`.
        weight: `[*L, out, in]`.
        bias: `[*L, out]` or None.

    Returns:
        `[*L, ..., out]`
    """
    if ctx.taps is None or not torch.is_grad_enabled():
        return linear(x, weight, bias)
    out = linear(x, weight.detach(), None if bias is None else bias.detach())
    out = out if out.requires_grad else out.requires_grad_()  # the first layer
    ctx.taps.setdefault(prefix, []).append((x.detach(), out))
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return learner_product(x, weight, None) if bias is None else layers(x, (weight, bias), (None,))


class Linear(Block):
    """Linear layer y = x Wᵀ + b: `[*L, ..., in]` -> `[*L, ..., out]`.

    The weight is `[*L, out, in]` and the bias `[*L, out]`, as torch's.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        initialiser: Initialiser = "torch",
        gain: float = 1.0,
    ) -> None:
        """Create the layer.

        Args:
            in_features: size of the last axis of the input.
            out_features: size of the last axis of the output.
            bias: whether to add one.
            initialiser: see `initialise`.
            gain: factor of the initial weights.
        """
        super().__init__()
        self.weight = parameter(out_features, in_features)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        initialise(self.weight, self.bias, initialiser, gain)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the layer: `[*L, ..., in]` -> `[*L, ..., out]`."""
        return tapped(ctx, prefix, x, params[prefix + "weight"], fetch(self, params, prefix, "bias"))


class Activation(Block):
    """Activation function as a block: elementwise, any shape."""

    def __init__(self, function: ActivationName | Callable[[Tensor], Tensor]) -> None:
        """Create the block from a function (an `nn.ReLU()` is one, too) or its name."""
        super().__init__()
        if getattr(function, "inplace", False):  # its input may be a view, or be used elsewhere
            function = copy.copy(function)
            function.inplace = False  # type: ignore[union-attr]
        self._function = (activation_function(function),)  # in a tuple, since a module would become a child

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the function to `x`."""
        return self._function[0](x)


class Flatten(Block):
    """Flattening of axes `start_dim` to `end_dim`, as `nn.Flatten` of one learner (axis 0 is its batch)."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        """Create the block with the arguments of `nn.Flatten`."""
        super().__init__()
        self._start_dim, self._end_dim = start_dim, end_dim

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Flatten `[*L, B, ...]` to `[*L, B, D]` with the default axes."""
        axes = learner_axes(self, params, ctx, prefix)
        ends = [dim + axes if dim >= 0 else dim for dim in (self._start_dim, self._end_dim)]
        return x.flatten(*ends)
