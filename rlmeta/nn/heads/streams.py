"""Outputs for every action: one stack of layers, or a dueling architecture of two."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.discrete import allowed
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.lift import Sequential
from rlmeta.nn.linear import Activation, Linear
from rlmeta.nn.noisy import NoisyLinear


class StreamOptions(NamedTuple):
    """Layers of a Q-head."""

    dueling: bool = False
    """Whether the value of a state and the advantages of actions have layers of their own."""
    noisy: bool = False
    """Whether the layers are noisy (`NoisyLinear`)."""
    hidden_sizes: tuple[int, ...] = ()
    """Widths of the head's own hidden layers, of each stream if it is dueling; each is followed by a ReLU."""


PLAIN = StreamOptions()
"""One linear layer."""


class ActionStreams(Block):
    """Outputs of every action, `[*L, ..., D]` -> `[*L, ..., A, K]`, by one stack of layers or by dueling ones.

    Dueling: Q(s, a) = V(s) + A(s, a) - mean of A(s, b) over the allowed actions b, where V and A have layers of their
    own; of K outputs (of a distribution) each is such a sum.

    Source: Wang et al., "Dueling Network Architectures for Deep Reinforcement Learning", 2016, equation 9.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        outputs: int = 1,
        options: StreamOptions = PLAIN,
        initialiser: Initialiser = "torch",
        gain: float = 1.0,
    ) -> None:
        """Create the layers.

        Args:
            features: D, the number of input features.
            actions: A.
            outputs: K, for each action.
            options: if dueling, there are two stacks of layers, `advantage` and `value`, instead of one, `linear`.
            initialiser: of the last layers, unless they are noisy; see `initialise`.
            gain: factor of their initial weights.
        """
        super().__init__()
        self.actions, self.outputs, self.dueling = actions, outputs, options.dueling

        def stack(size: int) -> Block:
            sizes, noisy = [features, *options.hidden_sizes], options.noisy
            layers: list[Block] = []
            for width, next_width in itertools.pairwise(sizes):
                layers += [_layer(width, next_width, noisy, "torch", 1.0), Activation("relu")]
            last = _layer(sizes[-1], size, noisy, initialiser, gain)
            return Sequential(*layers, last) if layers else last

        if options.dueling:
            self.advantage, self.value = stack(actions * outputs), stack(outputs)
        else:
            self.linear = stack(actions * outputs)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None) -> Tensor:
        """Features `[*L, ..., D]` -> outputs `[*L, ..., A, K]`; `mask` `[*L, ..., A]` is nonzero for allowed actions.

        The outputs of other actions are not masked here: they are only left out of the mean.
        """
        shape = (*x.shape[:-1], self.actions, self.outputs)
        if not self.dueling:
            return self.linear.run(params, x, ctx, f"{prefix}linear.").reshape(shape)
        advantage = self.advantage.run(params, x, ctx, f"{prefix}advantage.").reshape(shape)
        value = self.value.run(params, x, ctx, f"{prefix}value.").unsqueeze(-2)
        if mask is None:
            return value + (advantage - advantage.mean(-2, keepdim=True))
        open_ = allowed(mask).unsqueeze(-1)
        total = torch.where(open_, advantage, torch.zeros_like(advantage)).sum(-2, keepdim=True)
        return value + (advantage - total / open_.sum(-2, keepdim=True))


def _layer(features: int, outputs: int, noisy: bool, initialiser: Initialiser, gain: float) -> Block:
    return NoisyLinear(features, outputs) if noisy else Linear(features, outputs, initialiser=initialiser, gain=gain)
