"""Regression by least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from rlmeta.agents.supervised import OptimizerName, Supervised, require_target
from rlmeta.functional import losses, tree
from rlmeta.learning.learner import Score
from rlmeta.learning.method import Method
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params
from rlmeta.learning.step import StepContext


@dataclass(frozen=True)
class Regressor:
    """Settings of a regressor. A list for a number marked per learner compares its values."""

    batch_size: int = 32
    """Samples in a minibatch."""
    num_steps: int = 10
    """Gradient steps in an iteration, the grain of budgets and records."""
    optimizer: OptimizerName = "adam"
    """Which optimizer."""
    learning_rate: PerLearner = 1e-3
    """The optimizer's step size."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget (of each task of a stream)."""
    momentum: PerLearner = 0.0
    """Of the optimizers sgd and rmsprop."""
    weight_decay: PerLearner = 0.0
    """L2 in the gradient; decoupled for optimizer="adamw"."""
    max_grad_norm: PerLearner = math.inf
    """Clip each learner's gradient to this norm."""
    hidden_sizes: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: Callable[[gym.Space], nn.Module] | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""

    def __post_init__(self) -> None:
        require_range(self, "learning_rate", 0.0, above=True)
        require_range(self, "max_grad_norm", 0.0, above=True)
        require_range(self, "momentum", 0.0, 1.0)
        require_range(self, "weight_decay", 0.0)
        for name in ("batch_size", "num_steps"):
            require_range(self, name, 1)

    @property
    def num_envs(self) -> int:
        """Rows of a world: samples in a minibatch."""
        return self.batch_size

    def bind(
        self, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> RegressorLearner:
        """The learner for inputs and targets of these spaces."""
        return RegressorLearner(self, observation_space, target_space, methods)


class RegressorLearner(Supervised):
    """A regressor on given spaces."""

    score = Score("squared error", maximise=False)

    def __init__(
        self, settings: Any, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        require_target(target_space, gym.spaces.Box, "Regressor", "Classifier")
        super().__init__(settings, observation_space, target_space, methods)

    def outputs(self) -> int:
        """One for every component of a target."""
        return int(np.prod(self.target_space.shape or (1,)))

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """The mean squared error, `[*L]`."""
        loss = losses.squared_loss(self.output(p, batch, ctx), batch["target"], batch.get("valid"))
        ctx.info["losses/loss"] = loss.detach()
        return {"net": loss}

    def log_prob(self, p: Params, batch: tree.Tree) -> Tensor:
        """log density of the target under a normal of deviation 1 about the prediction, up to a constant, `[*L, B]`."""
        return -0.5 * (self.output(p, batch) - batch["target"]).square().sum(-1)

    def score_of(self, output: Tensor, batch: tree.Tree) -> Tensor:
        """The squared error of every sample, `[*L, B]`."""
        return (output - batch["target"]).square().mean(-1)
