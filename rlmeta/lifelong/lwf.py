"""Learning without forgetting, LwF (Li & Hoiem, 2016): distillation keeps the old network's answers to new samples.

The teacher is the network as it was when the last task ended; nothing of old tasks is stored:

    loss + λ T² mean over heads, samples of KL(softmax(z_teacher / T) ‖ softmax(z / T))

z are the logits of the classes of a head: where the task is known at test, of every old task; else of all classes known
to the teacher. T² keeps the gradient's size whatever the temperature T (Hinton et al., 2015). A regressor keeps its
outputs by their squared error, and an agent its policy in the states that it meets now, KL(π_teacher ‖ π).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning.method import Draw, Memory, Method, Task
from rlmeta.learning.predictive import check_predictive, predicting
from rlmeta.learning.settings import PerLearner, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.anchors import is_idle
from rlmeta.lifelong.recall import per_learner, position_of
from rlmeta.nn import Context

BESIDE_WEIGHTS = ("buffers", "normalisers")
"""What of the parameters the teacher keeps besides its weights."""


@dataclass(frozen=True)
class LwF(Method):
    """Settings of learning without forgetting, and the method itself."""

    strength: PerLearner = 1.0
    """λ: weight of the distillation loss."""
    temperature: float = 2.0
    """T: how much softer the distributions are in the distillation loss; of classifiers alone."""

    name = "lwf"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        require_range(self, "strength", 0.0)
        require_range(self, "temperature", 0.0, above=True)
        require_finite(self, "strength")

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: room for the teacher, and no head."""
        check_predictive(learner)
        m = {"strength": per_learner(self.strength, state), "teacher": _copy(_seen(learner, state["params"]))}
        if learner.classes:
            heads = (learner.num_tasks, learner.classes)
            m["heads"] = torch.zeros(*state["key"].shape, *heads, dtype=torch.bool, device=state["key"].device)
        return m

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Take the present network for the teacher."""
        teacher = {kind: {name: _copy(p[kind][name]) for name in kept} for kind, kept in m["teacher"].items()}
        m = {**m, "teacher": teacher}
        if not learner.classes:
            return p, m
        allowed, heads = draw(1).get("allowed"), m["heads"].clone()
        place = 0 if allowed is None else position_of(task)
        known = p["buffers"].get("known_classes", torch.ones_like(heads[..., 0, :]))
        heads[..., place, :] = known if allowed is None else allowed.squeeze(-2)
        return p, {**m, "heads": heads}

    def loss(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor) -> Tensor | None:
        """Distillation loss `[*L]`."""
        if is_idle(self.strength) or not bool((task["index"] > 0).any()):
            return None
        everywhere = {name: x for name, x in batch.items() if name != "allowed"}
        with torch.no_grad():
            teacher = {**p, **{kind: {**p[kind], **kept} for kind, kept in m["teacher"].items()}}
            then = learner.distribution(teacher, everywhere, Context())
        now = learner.distribution(p, everywhere, Context(training=True))
        if learner.acts:
            difference = learner.divergence(then, now)
        elif learner.classes:
            difference = head_divergence(then["logits"], now["logits"], m["heads"], self.temperature)
        else:
            difference = 0.5 * (then["mean"] - now["mean"]).square().sum(-1)
        return m["strength"] * difference.flatten(task["index"].dim()).mean(-1)


def head_divergence(teacher: Tensor, student: Tensor, heads: Tensor, temperature: float) -> Tensor:
    """Temperature-scaled distillation loss T² KL(teacher ‖ student) of every sample, `[*L, B]`, a mean over the heads.

    Args:
        teacher: logits `[*L, B, C]`.
        student: logits `[*L, B, C]`.
        heads: classes of every head, `[*L, H, C]` bool; heads without a class do not count.
        temperature: T.
    """
    inside = heads.unsqueeze(-2)

    def log_probabilities(logits: Tensor) -> Tensor:
        scaled = logits.unsqueeze(-3) / temperature
        return scaled.masked_fill(~inside, torch.finfo(scaled.dtype).min).log_softmax(-1)

    then, now = log_probabilities(teacher), log_probabilities(student)
    terms = torch.where(inside, then.exp() * (then - now), 0.0).sum(-1)
    count = heads.any(-1).sum(-1).clamp(min=1)
    return temperature**2 * terms.sum(-2) / count.unsqueeze(-1)


def _seen(learner: Any, p: Params) -> State:
    """What the learner's distribution depends on: weights, buffers, statistics of observations."""
    names = predicting(learner, p["weights"])
    return {"weights": {n: p["weights"][n] for n in names}, **{kind: p[kind] for kind in BESIDE_WEIGHTS if kind in p}}


def _copy(x: tree.Tree) -> tree.Tree:
    return tree.map(lambda leaf: leaf.detach().clone(), x)
