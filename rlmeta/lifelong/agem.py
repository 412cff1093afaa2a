"""Averaged GEM, A-GEM (Chaudhry et al., 2019): gradient projection by one reference gradient of all old tasks.

g̃ = g - ⟨g, r⟩ / ⟨r, r⟩ r where ⟨g, r⟩ < 0: the average loss over old tasks may not rise, each single one may. A step
costs one more gradient, however many tasks there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import random, tree
from rlmeta.functional.projection import project_average
from rlmeta.learning.method import Draw, Gradients, Memory, Method, StepInfo, Task
from rlmeta.learning.minibatch import gather
from rlmeta.learning.predictive import predicting
from rlmeta.learning.settings import require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import (
    check_room,
    keep_samples,
    recall_loss,
    room_for_tasks,
)
from rlmeta.nn.sample_gradients import group_gradients


@dataclass(frozen=True)
class AGEM(Method):
    """Settings of A-GEM, and the method itself."""

    memory: int = 256
    """Number of samples kept of every task."""
    batch_size: int = 256
    """Number of samples drawn in every step from the memory of all old tasks."""

    name = "agem"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "memory", 0)
        require_range(self, "batch_size", 1)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial A-GEM memory: an empty episodic memory, with room for the samples of every task."""
        check_room(learner, state, self.batch_size, "batch_size")
        return {
            "samples": room_for_tasks(learner, state, self.memory),
            "key": random.fold(state["key"], "agem"),
            "steps": torch.zeros_like(state["key"]),
        }

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Add samples of the task that has ended to the episodic memory."""
        return p, {**m, "samples": keep_samples(learner, p, m["samples"], self.memory, task, draw)}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Project the gradient so that the mean loss on samples of old tasks does not increase."""
        tasks, axes = task["index"].clamp(min=0), task["index"].dim()
        if not self.memory or not bool((tasks > 0).any()):
            return gradients.total
        rows = random.integers(m["key"], "rows", m["steps"], (self.batch_size,), (tasks * self.memory).unsqueeze(-1))
        samples = gather(tree.map(lambda x: x.flatten(axes, axes + 1), m["samples"]), rows)
        reference = group_gradients(
            lambda p, batch, ctx: recall_loss(learner, p, batch, ctx),
            p,
            tree.map(lambda x: x.unsqueeze(axes), samples),
            axes,
            predicting(learner, p["weights"]),
        )
        shape = gradients.total.shape[:axes]
        whole = [
            (reference[name] if name in reference else torch.zeros_like(weight)).reshape(*shape, -1)
            for name, weight in p["weights"].items()
        ]
        return project_average(gradients.total, torch.cat(whole, -1))

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Count the gradient step, so that the next one draws other samples."""
        return {**m, "steps": m["steps"] + 1}
