"""The multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.linear import Activation, ActivationName, Linear, activation_function, check_linear, learner_product

Elementwise: TypeAlias = Callable[[Tensor], Tensor]

_IN_PLACE: dict[Elementwise, Elementwise] = {
    torch.tanh: torch.tanh_,
    torch.relu: torch.relu_,
    torch.sigmoid: torch.sigmoid_,
}
_OUT_OF_PLACE = {in_place: function for function, in_place in _IN_PLACE.items()}

_SLOPES: dict[Elementwise, Callable[[Tensor, Tensor], Tensor]] = {
    torch.tanh_: torch.ops.aten.tanh_backward,
    torch.relu_: lambda grad, out: torch.ops.aten.threshold_backward(grad, out, 0),
    torch.sigmoid_: torch.ops.aten.sigmoid_backward,
}
"""From the gradient behind an activation and the activation's output to the gradient before it."""


class MLP(Block):
    """Linear layers with an activation between them: `[*L, ..., in]` -> `[*L, ..., out]`.

    Parameters are named as those of `nn.Sequential(nn.Linear, nn.Tanh, nn.Linear, ...)`: "0.weight", "0.bias",
    "2.weight", ...
    """

    def __init__(
        self,
        in_features: int,
        hidden_sizes: Sequence[int],
        out_features: int | None = None,
        activation: ActivationName | Callable[[Tensor], Tensor] = "tanh",
        final_activation: ActivationName | Callable[[Tensor], Tensor] | None = None,
        initialiser: Initialiser = "orthogonal",
        gain: float = math.sqrt(2.0),
        final_gain: float = 1.0,
    ) -> None:
        """Create the network.

        Args:
            in_features: size of the last axis of the input.
            hidden_sizes: units of the hidden layers, each followed by `activation`.
            out_features: units of a last linear layer; None for none, so that the last hidden layer is the output.
            activation: a name or an elementwise function.
            final_activation: what follows the last linear layer, None for nothing.
            initialiser: "orthogonal" with zero biases, or "torch", for which the gains do not count.
            gain: of the hidden layers' orthogonal weights.
            final_gain: of the last linear layer's orthogonal weights.

        Raises:
            SettingError: there is no layer, a size is below 1, or an activation is unknown.
        """
        super().__init__()
        sizes = [in_features, *hidden_sizes] if out_features is None else [in_features, *hidden_sizes, out_features]
        if len(sizes) < 2 or min(sizes) < 1:
            raise SettingError(
                f"an MLP of sizes {sizes} has no layer or an empty one: give at least one size, 1 or more"
            )
        self.features = sizes[-1]
        functions: list[Callable[[Tensor], Tensor] | None] = [activation_function(activation)] * len(hidden_sizes)
        if out_features is not None:
            functions.append(None if final_activation is None else activation_function(final_activation))
        gains = [gain] * len(hidden_sizes) + [final_gain] * (out_features is not None)
        layers: list[tuple[str, str, Callable[[Tensor], Tensor] | None]] = []
        for size, next_size, function, layer_gain in zip(sizes, sizes[1:], functions, gains):
            index = len(self._modules)
            layer_gain = layer_gain if initialiser == "orthogonal" else 1.0
            self.add_module(str(index), Linear(size, next_size, initialiser=initialiser, gain=layer_gain))
            if function is not None:
                self.add_module(str(index + 1), Activation(function))
            # The product is nobody else's: writing over it saves a third of a large forward pass without gradients.
            in_place = None if function is None else _IN_PLACE.get(function, function)
            layers.append((f"{index}.weight", f"{index}.bias", in_place))
        self._layers = tuple(layers)
        known = all(function is None or function in _SLOPES for _, _, function in layers)
        self._slopes = tuple(None if f is None else _SLOPES[f] for _, _, f in layers) if known else None

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """`[*L, ..., in]` -> `[*L, ..., out]`."""
        first = params[prefix + "0.weight"]
        check_linear(x, first)
        axes = first.dim() - 2
        if axes == 0:
            for weight, bias, activation in self._layers:
                x = F.linear(x, params[prefix + weight], params[prefix + bias])
                if activation is not None:
                    x = activation(x)
            return x
        learners, batch_shape = first.shape[:-2].numel(), x.shape[:-1]
        if x.dim() != 3 or axes != 1:  # a view costs as much time as a small product
            x = x.reshape(learners, x.shape[axes:-1].numel(), x.shape[-1])
        tensors = []
        for weight, bias, _ in self._layers:
            layer, offset = params[prefix + weight], params[prefix + bias].unsqueeze(-2)
            if axes != 1:
                layer, offset = layer.reshape(learners, *layer.shape[-2:]), offset.reshape(learners, 1, -1)
            tensors += [layer, offset]
        if self._slopes is None or torch._C._are_functorch_transforms_active():
            x = _layers_by_autograd(x, tensors, [function for _, _, function in self._layers])
        else:
            x = _Layers.apply(x, self._layers, self._slopes, *tensors)  # type: ignore[no-untyped-call]
        return x if x.shape[:-1] == batch_shape else x.reshape(*batch_shape, x.shape[-1])


def _layers_by_autograd(x: Tensor, tensors: Sequence[Tensor], functions: Sequence[Elementwise | None]) -> Tensor:
    """`[S, B, in]` through weights `[S, out, in]` and biases `[S, 1, out]` in turn."""
    for layer, offset, function in zip(tensors[::2], tensors[1::2], functions):
        x = learner_product(x, layer, offset)
        if function is not None:
            x = function(x)
    return x


class _Layers(torch.autograd.Function):
    """`_layers_by_autograd` as one node of the graph, bit for bit the same: for small networks the bookkeeping of a
    node for every product, transpose and activation costs as much as the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[tuple[str, str, Elementwise | None]],
        slopes: Sequence[Any],
        *tensors: Tensor,
    ) -> Tensor:
        """Keep the input of every layer."""
        ctx.functions, ctx.slopes = [function for _, _, function in layers], slopes
        inputs = [x]
        for layer, offset, function in zip(tensors[::2], tensors[1::2], ctx.functions):
            product = learner_product(inputs[-1], layer, offset)
            inputs.append(product if function is None else function(product))
        ctx.save_for_backward(*inputs, *tensors)
        return inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The chain rule, layer by layer; by autograd where it is itself to be differentiated."""
        count = len(ctx.functions)
        inputs, tensors = ctx.saved_tensors[: count + 1], ctx.saved_tensors[count + 1 :]
        if torch.is_grad_enabled():
            return _Layers._differentiable(ctx, grad, inputs[0], tensors)
        found: list[Tensor | None] = [None] * (2 * count)
        for i in reversed(range(count)):
            if ctx.slopes[i] is not None:
                grad = ctx.slopes[i](grad, inputs[i + 1])
            found[2 * i], found[2 * i + 1] = torch.bmm(grad.mT, inputs[i]), grad.sum(-2, keepdim=True)
            if i > 0 or ctx.needs_input_grad[0]:
                grad = torch.bmm(grad, tensors[2 * i])
        return grad if ctx.needs_input_grad[0] else None, None, None, *found

    @staticmethod
    def _differentiable(ctx: Any, grad: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        wanted = [tensor for tensor in (x, *tensors) if tensor.requires_grad]
        out = _layers_by_autograd(x, tensors, [_OUT_OF_PLACE.get(f, f) if f else None for f in ctx.functions])
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        first, *rest = [next(found) if tensor.requires_grad else None for tensor in (x, *tensors)]
        return first, None, None, *rest
