"""Noisy linear layer: exploration by random weights whose spread is learned."""

from __future__ import annotations

import math

from torch import Tensor, nn

from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.nn.block import Block, Context, NeedsKey, Params, between
from rlmeta.nn.initialisers import initialise, parameter
from rlmeta.nn.linear import linear


class NoisyLinear(Block):
    """Noisy linear layer y = (W + Σ ∘ f(ε) f(ε')ᵀ) x + b + σ ∘ f(ε): `[*L, ..., in]` -> `[*L, ..., out]`.

    ε `[out]` and ε' `[in]` are standard normal and f(ε) = sign(ε) √|ε| (factorised noise). They are drawn from the
    context's key and the block's name. A key `[*L]` gives all rows of a learner the same noise, as the paper has it for
    a minibatch; a key `[*L, N]` gives each of N rows `[*L, N, ..., in]` noise of its own, as environments that should
    not explore alike need it. Without a key there is no noise: y = W x + b, as in evaluation and in `eval()`.

    Source: Fortunato et al., "Noisy Networks for Exploration", 2018, section 3.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    weight_sigma: nn.Parameter
    bias_sigma: nn.Parameter

    def __init__(self, in_features: int, out_features: int, initial_sigma: float = 0.5) -> None:
        """Create the layer: W and b as torch's linear layer has them, Σ and σ constant.

        Args:
            in_features: size of the last axis of the input.
            out_features: size of the last axis of the output.
            initial_sigma: σ₀; Σ and σ begin at σ₀ / √in.

        Raises:
            SettingError: `initial_sigma` is negative.
        """
        super().__init__()
        if initial_sigma < 0.0:
            raise SettingError(f"initial_sigma is {initial_sigma}, expected 0 or more")
        spread = initial_sigma / math.sqrt(in_features)
        self.weight, self.bias = parameter(out_features, in_features), parameter(out_features)
        self.weight_sigma = parameter(out_features, in_features, value=spread)
        self.bias_sigma = parameter(out_features, value=spread)
        initialise(self.weight, self.bias, "torch")

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the layer: `[*L, ..., in]` -> `[*L, ..., out]`.

        Raises:
            NeedsKey: training without a key.
        """
        weight, bias = params[prefix + "weight"], params[prefix + "bias"]
        if not self.training or ctx.key is None:
            if self.trains(ctx):
                raise NeedsKey(
                    "a noisy layer in training draws random numbers, for which its learner has no key: use it in the "
                    "head of DQN (noisy=True), or in a loop of your own pass one, Context(training=True, key=key)"
                )
            return linear(x, weight, bias)
        weight_sigma, bias_sigma = params[prefix + "weight_sigma"], params[prefix + "bias_sigma"]
        outputs, inputs = weight.shape[-2:]
        normal = random.normal(ctx.key, f"noisy/{prefix}", 0, (outputs + inputs,), weight.dtype)
        noise = normal.sign() * normal.abs().sqrt()
        after, before = noise[..., :outputs], noise[..., outputs:]
        if ctx.key.dim() == weight.dim() - 2:
            moved = weight + weight_sigma * (after.unsqueeze(-1) * before.unsqueeze(-2))
            return linear(x, moved, bias + bias_sigma * after)
        # with noise for each row no row needs a matrix of its own: (Σ ∘ f f'ᵀ) x = f ∘ Σ (f' ∘ x)
        rows = ctx.key.dim()
        spread = linear(x * between(before, x, rows), weight_sigma, bias_sigma)
        mean = linear(x, weight, bias)
        return mean + spread * between(after, mean, rows)

    def may_draw(self) -> bool:
        """Whether it is in training mode."""
        return self.training
