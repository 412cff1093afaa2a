"""Predictive learners: the distribution over targets or actions that a learner predicts, and its last features.

Whoever judges or keeps what a learner knows (Fisher information, distillation, memories of old tasks, prototypes) asks
it through these methods alone, whatever its networks are called and whether it acts or labels.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params
from rlmeta.nn import Context, Distribution


class Predictive(Protocol):
    """Predictive learner: it predicts a distribution; where there is none, `predicts` is ()."""

    acts: bool
    """Whether samples come from acting, so that they become outdated; else they are labelled."""
    classes: int
    """Number of classes of the targets; 0 for regression and for agents."""

    @property
    def predicts(self) -> tuple[str, ...]:
        """Names of the networks that the distribution depends on; () where it predicts none."""
        ...

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """Predicted distribution: parameters for the batch's inputs, `{name: [*L, B, ...]}`: logits, or means and
        deviations."""
        ...

    def features(self, p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        """Last hidden features, the input of the output layer, `[*L, B, D]`."""
        ...

    def blank(self, learners: tuple[int, ...], device: torch.device) -> tree.Tree:
        """Zero sample `[*L, 1, ...]` of the learners `*L`, with the names, shapes and dtypes of what `draw` returns."""
        ...


class PredictiveActor(Predictive, Protocol):
    """Protocol of agents whose policy is a distribution over actions.

    A sample of it is a step, or a whole sequence `[*L, B, T, ...]` with the memory before its first step; its
    distribution and features then are those of every step, `[*L, B, T, ...]`.
    """

    head: Any
    """Head of the policy, which computes samples, log probabilities and divergences."""

    @property
    def sequential(self) -> bool:
        """Whether a sample is a whole sequence."""
        ...

    def log_prob(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Log probability (or density) of every sample's actions, `[*L, B]`; of a sequence the sum over its
        steps."""
        ...

    def divergence(self, then: Distribution, now: Distribution) -> Tensor:
        """KL divergence KL(then || now) in nats of every sample, `[*L, B]`; of a sequence the mean over its steps."""
        ...


@runtime_checkable
class Stepwise(Protocol):
    """Protocol of meta-learners that adapt to a task by gradient steps."""

    def adaptation(self, p: Params, world: Any, key: Tensor, tasks: int, steps: int) -> Tensor:
        """Adaptation curves: scores on held-out tasks after 0 ... `steps` inner steps, `[*L, E, steps + 1]` float64."""
        ...


class Adaptive(Protocol):
    """Protocol of meta-learners, which predict queries of a task from its support samples."""

    classes: int
    """Number of classes of the targets of a task; 0 for regression."""

    def answer(self, p: Params, support: tree.Tree, query: tree.Tree, steps: int | None = None) -> Tensor:
        """Predict the query's targets after adaptation to the support, `[*L, K, B, outputs]`.

        Args:
            p: the effective parameters, `[*L, ...]`.
            support: `observation` and `target` of every task, `[*L, K, n, ...]`.
            query: `observation` of every task, `[*L, K, B, ...]`.
            steps: of adaptation; by default as many as in training.
        """
        ...


def check_predictive(learner: Any) -> None:
    """Check that a learner predicts a distribution, before anything is trained.

    Raises:
        SettingError: with those that do.
    """
    require(
        bool(learner.predicts),
        f"{type(learner.settings).__name__} gives no distribution over actions or targets, which lifelong methods "
        "need to say what was learned: use an agent with a policy, a Classifier or a Regressor",
    )


def predicting(learner: Predictive, weights: dict[str, Tensor]) -> list[str]:
    """Names of the weights that a learner's distribution depends on."""
    return [name for name in weights if name.partition(".")[0] in learner.predicts]
