"""Policy head of continuous actions without chance: one action a state, squashed into the bounds by a tanh."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import project
from rlmeta.nn.linear import Linear
from rlmeta.nn.units import ActionUnits


class DeterministicHead(Block):
    """An action u in (-1, 1) for every state, in the policy's units, `[*L, ..., D]` -> `[*L, ..., A]`.

    Source: Lillicrap et al., "Continuous control with deep reinforcement learning", 2016.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        initial_scale: float = 0.01,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create the head.

        Args:
            features: D.
            actions: A.
            initial_scale: gain of the orthogonal initial weights.
            low: lower bounds, -1 where left out.
            high: upper bounds, 1 where left out.
            shape: of an action, `(A,)` where left out.

        Raises:
            SettingError: a bound is infinite, or not below its upper one.
        """
        super().__init__()
        lower, upper = [-1.0] * actions if low is None else low, [1.0] * actions if high is None else high
        self.units = ActionUnits((actions,) if shape is None else shape, lower, upper)
        if not self.units.bounded:
            raise SettingError(
                f"bounds {list(lower)} and {list(upper)} are infinite or equal, so nothing can be squashed into them"
            )
        self.linear = Linear(features, actions, initialiser="orthogonal", gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Features to actions in the policy's units."""
        return project(params, x, ctx, prefix).tanh()
