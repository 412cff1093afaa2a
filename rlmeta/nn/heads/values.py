"""Value heads: state values V(s), and Q-values of discrete actions."""

from __future__ import annotations

from torch import Tensor

from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import project
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
    ) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            actions: A, the number of actions.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Features `[*L, ..., D]` -> Q-values `[*L, ..., A]`."""
        return project(params, x, ctx, prefix)

    def mode(self, values: Tensor) -> Tensor:
        """Greedy action, `[..., A]` -> `[...]`."""
        return values.argmax(-1)

    def take(self, values: Tensor, action: Tensor) -> Tensor:
        """Q-values of the actions taken, `[..., A]` and `[...]` -> `[...]`."""
        return values.gather(-1, action.unsqueeze(-1)).squeeze(-1)
