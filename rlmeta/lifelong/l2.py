"""L2 penalty about the weights of the last task (the baseline of Kirkpatrick et al., 2017): all weights matter alike.

After every task the anchor moves to the weights θ* that it ended with:

    loss + ½ λ Σ (θ - θ*)²

In reinforcement learning the policy is anchored, and the critic is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional.quadratics import replace_quadratic
from rlmeta.learning.method import Draw, Gradients, Memory, Method, Task
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.anchors import held, initial_anchor, is_idle, packed, predictive_mask, pulled


@dataclass(frozen=True)
class L2(Method):
    """Settings of the L2 penalty, and the method itself."""

    strength: PerLearner = 1.0
    """λ: weight of the penalty; inf holds all weights of the prediction after the first task."""

    name = "l2"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: no penalty before the first task has ended."""
        return initial_anchor(learner, self.strength, state)

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Move the anchor to the present weights."""
        if is_idle(self.strength):
            return p, m
        axes = task["index"].dim()
        theta = packed(p, axes)
        everything = predictive_mask(learner, p, axes).to(theta.dtype)
        quadratic = replace_quadratic(m["quadratic"], everything, theta, torch.zeros_like(m["strength"]))
        return p, {**m, "quadratic": quadratic}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Add the gradient of the penalty to the total gradient."""
        return gradients.total if is_idle(self.strength) else pulled(gradients.total, p, m)

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask of the weights that an infinite strength holds."""
        return held(self.strength, m)
