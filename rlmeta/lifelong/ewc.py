"""Elastic weight consolidation, EWC (Kirkpatrick et al., 2017): a quadratic penalty weighted by Fisher information.

After each task k the diagonal Fisher information Fₖ of the learner's predictive distribution says how much the weights
θₖ matter to it; later losses get the penalty ½ λ Σₖ Fₖ (θ - θₖ)². The sum of the tasks' quadratics is one quadratic
about their weighted mean, so memory and time do not grow with the number of tasks (Huszár, 2018, has the sum):

    Σₖ Fₖ (θ - θₖ)² = A (θ - c)² + constant,   A = Σ Fₖ,   c = Σ Fₖ θₖ / A

The penalty's gradient λ A (θ - c) is added in closed form, so the losses' own gradient stays visible to other methods.
In reinforcement learning F is of the policy in states that it visits itself, and the critic is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import random, tree
from rlmeta.functional.quadratics import add_quadratic, replace_quadratic
from rlmeta.learning.method import Draw, Gradients, Memory, Method, Task
from rlmeta.learning.predictive import predicting
from rlmeta.learning.settings import PerLearner, check_choices, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.anchors import held, initial_anchor, is_idle, packed, pulled
from rlmeta.lifelong.recall import check_room, per_learner, position_of
from rlmeta.nn import CategoricalHead, Context, GaussianHead
from rlmeta.nn.fisher import FisherKind, categorical_fisher, gaussian_fisher, score_fisher


@dataclass(frozen=True)
class EWC(Method):
    """Settings of EWC, and the method itself."""

    strength: PerLearner = 1e3
    """λ: weight of the penalty ½ λ Σ F (θ - θₖ)², with F averaged per sample; inf holds every weight with F > 0."""
    samples: int = 500
    """Number of samples for the Fisher information of a task, at most all of its training samples."""
    fisher: FisherKind = "exact"
    """Labels of the Fisher information: expectation, samples of the model, or the data's (an agent's actions)."""
    online: bool = False
    """Online EWC (Schwarz et al., 2018): one anchor at the latest weights and F <- decay F + new F."""
    decay: PerLearner = 1.0
    """Decay γ of the Fisher information of online EWC."""

    name = "ewc"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)
        require_range(self, "samples", 1)
        require_range(self, "decay", 0.0, 1.0)
        check_choices(self)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial EWC memory before the first task: a quadratic penalty of zero for every weight."""
        anchor = initial_anchor(learner, self.strength, state)
        if learner.acts:
            check_room(learner, state, self.samples, "samples")
        return {**anchor, "decay": per_learner(self.decay, state), "key": random.fold(state["key"], "ewc")}

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Add the Fisher information of the task that has ended to the quadratic penalty."""
        if is_idle(self.strength):
            return p, m
        axes = task["index"].dim()
        key = random.fold(m["key"], position_of(task))
        fisher = information(learner, p, draw(self.samples), axes, self.fisher, key)
        theta = packed(p, axes)
        if self.online:
            quadratic = replace_quadratic(m["quadratic"], fisher, theta, m["decay"])
        else:
            quadratic = add_quadratic(m["quadratic"], fisher, theta)
        return p, {**m, "quadratic": quadratic}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Add the gradient of the quadratic penalty to the total gradient."""
        return gradients.total if is_idle(self.strength) else pulled(gradients.total, p, m)

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask of the weights that an infinite strength holds."""
        return held(self.strength, m)


# ---------------------------------------------------------------------- Fisher information of a learner


def information(learner: Any, p: Params, batch: tree.Tree, axes: int, kind: FisherKind, key: Tensor) -> Tensor:
    """Diagonal Fisher information `[*L, P]` of a learner's predictive distribution on samples `[*L, n, ...]`.

    "exact" is in closed form for categorical and Gaussian distributions; where there is none, and for an agent with any
    other kind, it is estimated with the actions of the batch, which the policy drew itself.

    So it is of sequences, too: the squared gradient of Σₜ log π(aₜ | hₜ), with the memory hₜ made anew from the first
    one, over the T steps. The policy drew the actions, so the steps' scores are uncorrelated, E ∇ log π(aₜ | hₜ) = 0
    whatever came before, and the square of their sum has the mean of the sum of their squares: F is that of a step on
    average, as without a memory, by one pass back through time instead of one for every step and action.
    """
    names = predicting(learner, p["weights"])

    def parameters(p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        distribution = learner.distribution(p, batch, ctx)
        if "logits" in distribution:
            logits: Tensor = distribution["logits"]
            return logits
        mean = distribution["mean"]
        return torch.cat([mean, distribution.get("log_std", torch.zeros_like(mean))], -1)

    if learner.classes:
        target = batch["target"] if kind == "empirical" else None
        return categorical_fisher(parameters, p, batch, axes, kind, target=target, key=key, names=names)
    if not learner.acts:
        return gaussian_fisher(parameters, p, batch, axes, names=names)
    acted = {name: batch[name] for name in ("observation", "action")}
    if learner.sequential:
        return score_fisher(learner.log_prob, p, acted, axes, names=names) / batch["action"].shape[axes + 1]
    if kind == "exact" and isinstance(learner.head, CategoricalHead):
        return categorical_fisher(parameters, p, acted, axes, names=names)
    if kind == "exact" and isinstance(learner.head, GaussianHead):
        return gaussian_fisher(parameters, p, acted, axes, names=names)
    return score_fisher(learner.log_prob, p, acted, axes, names=names)
