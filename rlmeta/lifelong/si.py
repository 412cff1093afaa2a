"""Synaptic intelligence, SI (Zenke et al., 2017): a quadratic penalty weighted by what each weight did for the loss.

While a task is learned, every weight sums up how much its own movement lowered the loss, and at the end that is divided
by how far it moved:

    ω ← ω - g Δθ  after every step,   Ω ← Ω + max(ω, 0) / ((θ - θ_start)² + ξ)  after every task
    loss + c Σ Ω (θ - θ*)²,  θ* the weights at the last task's end

g is the gradient of the task's loss alone, without this penalty or another one; Δθ is the step that was taken, with the
optimizer, the clip and what other methods make of it. In reinforcement learning the policy's weights are anchored.
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


@dataclass(frozen=True)
class SI(Method):
    """Settings of synaptic intelligence, and the method itself."""

    strength: PerLearner = 1.0
    """c: weight of the penalty; inf holds every weight whose importance is not 0."""
    damping: float = 0.1
    """ξ: keeps the importance of weights finite that hardly moved."""

    name = "si"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)
        require_range(self, "damping", 0.0, above=True)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: no penalty, an empty path integral, and the weights that the first task starts from."""
        start = packed(state["params"], state["key"].dim()).clone()
        return {**initial_anchor(learner, self.strength, state), "path": torch.zeros_like(start), "start": start}

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """Start the path integral of the task from the present weights."""
        theta = packed(p, task["index"].dim())
        return p, {**m, "path": torch.zeros_like(theta), "start": theta.clone()}

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Add what the step lowered the task's loss by, to first order, weight by weight."""
        return m if is_idle(self.strength) else {**m, "path": m["path"] - info.gradient * info.delta}

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Add the importance of the weights for this task, and move the anchor to them."""
        if is_idle(self.strength):
            return p, m
        axes = task["index"].dim()
        theta = packed(p, axes)
        importance = m["path"].clamp(min=0.0) / ((theta - m["start"]).square() + self.damping)
        own = torch.where(predictive_mask(learner, p, axes), importance, 0.0)
        quadratic = replace_quadratic(m["quadratic"], 2.0 * own, theta, torch.ones_like(m["strength"]))
        return p, {**m, "quadratic": quadratic}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Add the gradient of the penalty to the total gradient."""
        return gradients.total if is_idle(self.strength) else pulled(gradients.total, p, m)

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask of the weights that an infinite strength holds."""
        return held(self.strength, m)
