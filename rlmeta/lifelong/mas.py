"""Memory aware synapses, MAS (Aljundi et al., 2018): a quadratic penalty weighted by the sensitivity of the outputs.

After each task the importance of a weight is how much it changes the squared norm of the outputs f, per sample; no
label is needed:

    Ω ← Ω + mean over samples of |∂ ‖f(x)‖² / ∂θ|,   loss + λ Σ Ω (θ - θ*)²,  θ* the weights at the last task's end

f are the logits of the classes that may be chosen, a regressor's means, or the logits or means of a policy in states
that it visits itself. The absolute value is of every sample's gradient: of the gradient of a mean, samples that pull a
weight in opposite directions would cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.quadratics import replace_quadratic
from rlmeta.learning.method import Draw, Gradients, Memory, Method, Task
from rlmeta.learning.predictive import predicting
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.anchors import held, initial_anchor, is_idle, packed, pulled
from rlmeta.lifelong.recall import check_room
from rlmeta.nn import Context, absolute_gradients


@dataclass(frozen=True)
class MAS(Method):
    """Settings of memory aware synapses, and the method itself."""

    strength: PerLearner = 1.0
    """λ: weight of the penalty; inf holds every weight whose importance is not 0."""
    samples: int = 500
    """Number of samples for the importance of a task, at most all of its training samples."""

    name = "mas"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)
        require_range(self, "samples", 1)

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: no penalty before the first task has ended."""
        if learner.acts:
            check_room(learner, state, self.samples, "samples")
        return initial_anchor(learner, self.strength, state)

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Add the importance of the weights for this task, and move the anchor to them."""
        if is_idle(self.strength):
            return p, m
        axes = task["index"].dim()
        own = sensitivity(learner, p, draw(self.samples), axes)
        quadratic = replace_quadratic(m["quadratic"], 2.0 * own, packed(p, axes), torch.ones_like(m["strength"]))
        return p, {**m, "quadratic": quadratic}

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Add the gradient of the penalty to the total gradient."""
        return gradients.total if is_idle(self.strength) else pulled(gradients.total, p, m)

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask of the weights that an infinite strength holds."""
        return held(self.strength, m)


def sensitivity(learner: Any, p: Params, batch: tree.Tree, axes: int) -> Tensor:
    """Mean of |∂ ‖f(x)‖² / ∂θ| over samples `[*L, n, ...]`, `[*L, P]`; of sequences f are the outputs of all steps."""

    def outputs(p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        distribution = learner.distribution(p, batch, ctx)
        values: Tensor = distribution["logits" if "logits" in distribution else "mean"]
        return values.masked_fill(values.isinf() | (values == torch.finfo(values.dtype).min), 0.0).flatten(axes + 1)

    def twice(out: Tensor, batch: tree.Tree) -> Iterator[Tensor]:
        yield 2.0 * out

    samples = {name: x for name, x in batch.items() if name != "target"}
    names, count = predicting(learner, p["weights"]), next(tree.leaves(batch)).shape[axes]
    return absolute_gradients(outputs, p, samples, twice, axes, names) / count
