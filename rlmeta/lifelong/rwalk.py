"""Riemannian walk, RWalk (Chaudhry et al., 2018): EWC's Fisher information and SI's path integral in one penalty.

The Fisher information F is a moving average over training, so that a task's end costs nothing. A weight's score is what
its movement lowered the loss by, over how far it moved in the metric of the KL divergence, summed up between moments
that are `every` steps apart:

    F ← α g² + (1 - α) F                                          after every step
    s ← s + max(Σ -g Δθ, 0) / (½ F Δ² + ε),   Δ the movement since the last such moment
    S ← ½ (S + s) after every task but the first, where S is s;   loss + λ Σ (F̂ + Ŝ) (θ - θ*)²

g is the gradient of the task's loss of a minibatch, as in the authors' code (its square is the empirical Fisher of the
batch's mean). F̂ and Ŝ are divided by their largest entry in the network, as there, for they have no common scale. θ*
are the weights at the last task's end. In reinforcement learning the policy's weights are anchored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional.quadratics import replace_quadratic
from rlmeta.learning.method import Draw, Gradients, Memory, Method, StepInfo, Task
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.anchors import held, initial_anchor, is_idle, packed, predictive_mask, pulled

EPSILON = 1e-8
"""ε: keeps the score of weights finite that did not move."""


@dataclass(frozen=True)
class RWalk(Method):
    """Settings of Riemannian walk, and the method itself."""

    strength: PerLearner = 1.0
    """λ: weight of the penalty; inf holds every weight whose importance is not 0."""
    rate: float = 0.9
    """α: weight of the newest gradient in the Fisher information."""
    every: int = 10
    """Gradient steps between two moments at which scores are added up."""

    name = "rwalk"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)
        require_range(self, "rate", 0.0, 1.0, above=True)
        require_range(self, "every", 1)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: no penalty, no Fisher information, no scores."""
        theta = packed(state["params"], state["key"].dim()).clone()
        zeros = {name: torch.zeros_like(theta) for name in ("fisher", "path", "score", "past_score")}
        count = torch.zeros_like(state["key"])
        return {**initial_anchor(learner, self.strength, state), **zeros, "moment": theta, "steps": count}

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """Start the scores of the task from the present weights."""
        theta, zero = packed(p, task["index"].dim()).clone(), torch.zeros_like(m["score"])
        return p, {**m, "path": zero, "score": zero.clone(), "moment": theta, "steps": torch.zeros_like(m["steps"])}

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Update the Fisher information and the path; at a moment add its score."""
        if is_idle(self.strength):
            return m
        fisher = torch.lerp(m["fisher"], info.gradient.square(), self.rate)
        path, steps = m["path"] - info.gradient * info.delta, m["steps"] + 1
        theta, now = packed(p, steps.dim()), (steps % self.every == 0).unsqueeze(-1)
        score = m["score"] + path.clamp(min=0.0) / (0.5 * fisher * (theta - m["moment"]).square() + EPSILON)
        return {
            **m,
            "fisher": fisher,
            "path": torch.where(now, 0.0, path),
            "score": torch.where(now, score, m["score"]),
            "moment": torch.where(now, theta, m["moment"]),
            "steps": steps,
        }

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Join the scores of the task with those of earlier ones, and move the anchor to the present weights."""
        if is_idle(self.strength):
            return p, m
        axes = task["index"].dim()
        own = predictive_mask(learner, p, axes)
        fisher, score = (torch.where(own, m[name], 0.0) for name in ("fisher", "score"))
        first = (task["index"] == 0).unsqueeze(-1)
        score = torch.where(first, score, 0.5 * (m["past_score"] + score))
        importance = 2.0 * (_scaled(fisher) + _scaled(score))
        nothing = torch.zeros_like(m["strength"])
        quadratic = replace_quadratic(m["quadratic"], importance, packed(p, axes), nothing)
        return p, {**m, "quadratic": quadratic, "past_score": score}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Add the gradient of the penalty to the total gradient."""
        return gradients.total if is_idle(self.strength) else pulled(gradients.total, p, m)

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask of the weights that an infinite strength holds."""
        return held(self.strength, m)


def _scaled(x: Tensor) -> Tensor:
    """Entries `[*L, P]` over the largest of each learner, in [0, 1]."""
    return x / x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
