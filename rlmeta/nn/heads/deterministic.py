"""Deterministic policy head of continuous actions: one action a state, squashed into the bounds by a tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import distributions
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.heads.common import Distribution, project
from rlmeta.nn.linear import Linear
from rlmeta.nn.units import ActionUnits


class DeterministicHead(Block):
    """An action for every state: `{"mean": [*L, ..., A]}` in (-1, 1), the policy's units.

    Where a density is asked for (lifelong methods ask), it is that of a Gaussian around it with a deviation of 1 in
    these units, so the divergence of two policies is half the squared distance of their actions.

    Source: Lillicrap et al., "Continuous control with deep reinforcement learning", 2016.
    """

    def __init__(self, features: int, units: ActionUnits, initial_scale: float = 0.01) -> None:
        """Create the head.

        Args:
            features: D.
            units: of the A components of an action.
            initial_scale: gain of the orthogonal initial weights.

        Raises:
            SettingError: a component has no two different bounds.
        """
        super().__init__()
        if not units.bounded:
            raise SettingError("a component of the actions has no two different bounds to be squashed into")
        self.units = units
        self.linear = Linear(features, units.centre.numel(), initialiser="orthogonal", gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` to the action in the policy's units."""
        return {"mean": project(params, x, ctx, prefix).tanh()}

    def mode(self, d: Distribution) -> Tensor:
        """The action in the environment's units."""
        return self.units.to_environment(d["mean"])

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log density of a Gaussian of deviation 1 around the action."""
        return distributions.normal_log_prob(d["mean"], torch.zeros_like(d["mean"]), self.units.to_policy(action))

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """Half the squared distance of the actions."""
        return 0.5 * (d["mean"] - other["mean"]).square().sum(-1)
