"""Deterministic policy head (DDPG, TD3): one action per state, squashed into the bounds by a tanh."""

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
    """Deterministic policy head: `{"mean": [*L, ..., A]}` in (-1, 1), the policy's units.

    Densities, which lifelong methods need, are those of a Gaussian around the action with standard deviation 1 in these
    units, so the KL divergence of two policies is half the squared distance of their actions.

    Source: Lillicrap et al., "Continuous control with deep reinforcement learning", 2016.
    """

    def __init__(self, features: int, units: ActionUnits, initial_scale: float = 0.01) -> None:
        """Create the head.

        Args:
            features: D, the number of input features.
            units: of the A components of an action.
            initial_scale: gain of the orthogonal initial weights.

        Raises:
            SettingError: a component of the actions lacks two different finite bounds.
        """
        super().__init__()
        if not units.bounded:
            raise SettingError("a component of the actions has no two different bounds to be squashed into")
        self.units = units
        self.linear = Linear(features, units.centre.numel(), initialiser="orthogonal", gain=initial_scale)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Distribution:
        """Features `[*L, ..., D]` -> the action in the policy's units, `[*L, ..., A]`."""
        return {"mean": project(params, x, ctx, prefix).tanh()}

    def mode(self, d: Distribution) -> Tensor:
        """Action in the environment's units, `[*L, ..., *shape]`."""
        return self.units.to_environment(d["mean"])

    def log_prob(self, d: Distribution, action: Tensor) -> Tensor:
        """Log-density of a Gaussian with standard deviation 1 around the policy's action, `[*L, ...]`."""
        return distributions.normal_log_prob(d["mean"], torch.zeros_like(d["mean"]), self.units.to_policy(action))

    def kl(self, d: Distribution, other: Distribution) -> Tensor:
        """KL divergence: half the squared distance of the actions, `[*L, ...]`."""
        return 0.5 * (d["mean"] - other["mean"]).square().sum(-1)
