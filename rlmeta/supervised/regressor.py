"""Regression by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from rlmeta.functional import losses, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Score
from rlmeta.learning.method import Method
from rlmeta.learning.state import Params
from rlmeta.nn import Context, Distribution
from rlmeta.supervised.learner import Supervised, SupervisedSettings, require_target


@dataclass(frozen=True)
class Regressor(SupervisedSettings):
    """Settings of a regressor. A list for a number marked per learner compares its values."""

    hidden_sizes: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers of the default network."""

    def bind(
        self, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> RegressorLearner:
        """Create the regressor for an input and a target space."""
        return RegressorLearner(self, observation_space, target_space, methods)


class RegressorLearner(Supervised):
    """Regressor by least squares."""

    score = Score("squared error", maximise=False)

    def __init__(
        self, settings: Any, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        require_target(target_space, gym.spaces.Box, "Regressor", "Classifier")
        super().__init__(settings, observation_space, target_space, methods)

    def outputs(self) -> int:
        """Number of outputs: one per component of a target."""
        return int(np.prod(self.target_space.shape or (1,)))

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """Predictive distribution: `mean` of a Gaussian with standard deviation 1, `[*L, B, D]`."""
        return {"mean": self.output(p, batch, ctx)}

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Mean squared error, `[*L]`."""
        loss = losses.squared_loss(self.output(p, batch, ctx), batch["target"], batch.get("valid"))
        ctx.info["losses/loss"] = loss.detach()
        return {"net": loss}

    def log_prob(self, p: Params, batch: tree.Tree) -> Tensor:
        """Log-density of the targets under a Gaussian around the prediction, up to a constant, `[*L, B]`."""
        return -0.5 * (self.output(p, batch) - batch["target"]).square().sum(-1)

    def score_of(self, output: Tensor, batch: tree.Tree) -> Tensor:
        """Squared error of every sample, `[*L, B]`."""
        return (output - batch["target"]).square().mean(-1)
