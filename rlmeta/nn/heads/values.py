"""Value heads: of states, and of every discrete action (Q-values)."""

from __future__ import annotations

from torch import Tensor

from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import project
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.linear import Linear


class ValueHead(Block):
    """One value per state: `[*L, ..., D]` -> `[*L, ...]`."""

    def __init__(self, features: int, initial_scale: float = 1.0, initialiser: Initialiser = "orthogonal") -> None:
        """Create the head.

        Args:
            features: D.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, 1, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """`[*L, ..., D]` -> `[*L, ...]`."""
        return project(params, x, ctx, prefix).squeeze(-1)


class QHead(Block):
    """One value per action: `[*L, ..., D]` -> `[*L, ..., A]`."""

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 1.0,
        initialiser: Initialiser = "torch",
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the initial weights.
            initialiser: see `initialise`.
        """
        super().__init__()
        self.linear = Linear(features, actions, initialiser=initialiser, gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """`[*L, ..., D]` -> `[*L, ..., A]`."""
        return project(params, x, ctx, prefix)

    def mode(self, values: Tensor) -> Tensor:
        """The best action, `[..., A]` -> `[...]`."""
        return values.argmax(-1)

    def take(self, values: Tensor, action: Tensor) -> Tensor:
        """The values of the given actions, `[..., A]` and `[...]` -> `[...]`."""
        return values.gather(-1, action.unsqueeze(-1)).squeeze(-1)
