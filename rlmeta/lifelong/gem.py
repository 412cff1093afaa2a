"""Gradient episodic memory, GEM (Lopez-Paz and Ranzato, 2017): gradient projection that keeps old tasks' losses.

A few samples of every task are kept. In each step the gradients gₖ of their losses are found, of all old tasks in one
pass, and the learner's gradient g is replaced by the nearest one with ⟨g̃, gₖ⟩ >= 0 for all k. With plain gradient
descent and a small step no old loss rises; momentum, Adam and clipping come after the projection and bend that promise.

An agent's memory has states and the policy's action distributions in them (see `recall`); only the policy's gradient
is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.functional.projection import projection_weights
from rlmeta.learning.method import Draw, Gradients, Memory, Method, Task
from rlmeta.learning.predictive import predicting
from rlmeta.learning.settings import PerLearner, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import (
    keep_samples,
    per_learner,
    position_of,
    recall_loss,
    room_for_tasks,
)
from rlmeta.nn.sample_gradients import group_gradients


@dataclass(frozen=True)
class GEM(Method):
    """Settings of GEM, and the method itself."""

    memory: int = 256
    """Number of samples kept of every task."""
    margin: PerLearner = 0.5
    """Lower bound of the multipliers where a constraint is violated; above 0 the step leans towards old tasks."""

    name = "gem"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "memory", 0)
        require_range(self, "margin", 0.0)
        require_finite(self, "margin")

    def init(self, learner: Any, state: State) -> Memory:
        """Initial GEM memory: an empty episodic memory, with room for the samples of every task."""
        kept = room_for_tasks(learner, state, self.memory)
        return {"samples": kept, "margin": per_learner(self.margin, state)}

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Add samples of the task that has ended to the episodic memory."""
        return p, {**m, "samples": keep_samples(learner, p, m["samples"], self.memory, task, draw)}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Project the gradient onto the cone in which no old task's loss increases."""
        num_old_tasks, axes = position_of(task), task["index"].dim()
        if num_old_tasks == 0 or not self.memory:
            return gradients.total
        samples = tree.map(lambda x: x.narrow(axes, 0, num_old_tasks), m["samples"])
        names = predicting(learner, p["weights"])
        references = group_gradients(lambda p, batch, ctx: recall_loss(learner, p, batch, ctx), p, samples, axes, names)
        return project_packed(gradients.total, references, p["weights"], m["margin"])


def project_packed(total: Tensor, references: dict[str, Tensor], weights: dict[str, Tensor], margin: Tensor) -> Tensor:
    """Project a packed gradient `[*L, P]` on the reference gradients `{name: [*L, K, ...]}` of K old tasks.

    It is `functional.projection.project` without a copy of the references.
    """
    axes = total.dim() - 1
    parts = Packed.view(total, weights, axes)
    flat = {name: reference.flatten(axes + 1) for name, reference in references.items()}
    gram = torch.stack([r @ r.mT for r in flat.values()]).sum(0)
    products = torch.stack([(r @ parts[n].reshape(*r.shape[:axes], -1, 1)).squeeze(-1) for n, r in flat.items()]).sum(0)
    v = projection_weights(gram, products, total.square().sum(-1), margin)
    if not bool((v != 0).any()):
        return total
    corrections = {name: (v.unsqueeze(-2) @ r).squeeze(-2) for name, r in flat.items()}
    projected = [parts[name].reshape(*total.shape[:axes], -1) + corrections.get(name, 0.0) for name in weights]
    violated = (products < 0).any(-1, keepdim=True)
    return torch.where(violated, torch.cat(projected, -1), total)
