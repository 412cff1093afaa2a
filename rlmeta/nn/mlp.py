"""Multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.linear import Activation, ActivationName, Linear, activation_function, check_linear, tapped
from rlmeta.nn.product import affine, layers


class MLP(Block):
    """Multi-layer perceptron (MLP), linear layers with activations: `[*L, ..., in]` -> `[*L, ..., out]`.

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
            final_activation: of the last linear layer, None for none.
            initialiser: "orthogonal" with zero biases, or "torch", which ignores the gains.
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
        self._names: list[tuple[str, str]] = []
        for size, next_size, function, layer_gain in zip(sizes, sizes[1:], functions, gains):
            index = len(self._modules)
            layer_gain = layer_gain if initialiser == "orthogonal" else 1.0
            self.add_module(str(index), Linear(size, next_size, initialiser=initialiser, gain=layer_gain))
            if function is not None:
                self.add_module(str(index + 1), Activation(function))
            self._names.append((f"{index}.weight", f"{index}.bias"))
        self._functions = tuple(functions)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the network: `[*L, ..., in]` -> `[*L, ..., out]`."""
        first = params[prefix + "0.weight"]
        check_linear(x, first)
        if ctx.taps is not None:
            return self._tapped(params, x, ctx, prefix)
        axes = first.dim() - 2
        if axes == 0:
            for (weight, bias), activation in zip(self._names, self._functions):
                x = affine(x, params[prefix + weight], params[prefix + bias])
                if activation is not None:
                    x = activation(x)
            return x
        learners, batch_shape = first.shape[:-2].numel(), x.shape[:-1]
        if x.dim() != 3 or axes != 1:  # a view costs as much time as a small product
            x = x.reshape(learners, x.shape[axes:-1].numel(), x.shape[-1])
        tensors = []
        for weight, bias in self._names:
            layer, offset = params[prefix + weight], params[prefix + bias].unsqueeze(-2)
            if axes != 1:
                layer, offset = layer.reshape(learners, *layer.shape[-2:]), offset.reshape(learners, 1, -1)
            tensors += [layer, offset]
        x = layers(x, tensors, self._functions)
        return x if x.shape[:-1] == batch_shape else x.reshape(*batch_shape, x.shape[-1])

    def _tapped(self, params: Params, x: Tensor, ctx: Context, prefix: str) -> Tensor:
        """Forward pass layer by layer that stores the input and output of every linear layer in `ctx.taps`."""
        for (weight, bias), activation in zip(self._names, self._functions):
            x = tapped(ctx, prefix + weight.removesuffix("weight"), x, params[prefix + weight], params[prefix + bias])
            x = x if activation is None else activation(x)
        return x
