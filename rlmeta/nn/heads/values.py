"""Value heads: state values V(s), and Q-values of discrete actions."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import project
from rlmeta.nn.heads.discrete import allowed
from rlmeta.nn.heads.streams import PLAIN, ActionStreams, StreamOptions
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.linear import Linear


class ValueHead(Block):
    """State-value head V(s): `[*L, ..., D]` -> `[*L, ...]`."""

    def __init__(self, features: int, initial_scale: float = 1.0, initialiser: Initialiser = "orthogonal") -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, 1, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Features `[*L, ..., D]` -> values `[*L, ...]`."""
        return project(params, x, ctx, prefix).squeeze(-1)


class QHead(Block):
    """Q-value head Q(s, ·) of discrete actions: `[*L, ..., D]` -> `[*L, ..., A]`."""

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 1.0,
        initialiser: Initialiser = "torch",
        options: StreamOptions = PLAIN,
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
            initial_scale: gain of the last layer's initial weights, unless it is noisy.
            initialiser: see `initialise`.
            options: of its layers, see `ActionStreams`.
        """
        super().__init__()
        self.streams = ActionStreams(features, actions, 1, options, initialiser, initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "", mask: Tensor | None = None) -> Tensor:
        """Features `[*L, ..., D]` -> Q-values `[*L, ..., A]`, minus infinity where `mask` `[*L, ..., A]` is 0.

        A row that allows nothing is taken as one that allows everything.
        """
        values = self.streams.run(params, x, ctx, f"{prefix}streams.", mask).squeeze(-1)
        return masked(values, mask)

    def values(self, values: Tensor) -> Tensor:
        """Q-values `[..., A]` of what `run` gives: the same."""
        return values

    def mode(self, values: Tensor) -> Tensor:
        """Greedy action, `[..., A]` -> `[...]`."""
        return values.argmax(-1)

    def take(self, values: Tensor, action: Tensor) -> Tensor:
        """Q-values of the actions taken, `[..., A]` and `[...]` -> `[...]`."""
        return values.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mask Q-values `[*L, ..., A]`: minus infinity where an action is not allowed."""
    return values if mask is None else values.masked_fill(~allowed(mask), -torch.inf)
