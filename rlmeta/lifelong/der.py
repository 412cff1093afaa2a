"""Dark experience replay, DER and DER++ (Buzzega et al., 2020): replay of old samples with the outputs of that time.

A reservoir of all samples met so far keeps each with the outputs z that the network had for it just before the step in
which it was met. They are the targets when it is replayed, and with β > 0 (DER++) other replayed samples have their
labels as targets:

    loss + α mean (f(x) - z)² + β loss(x', y')        (x, z) and (x', y') drawn from the reservoir, each anew

f and z are all outputs of the network, of classes that are not known yet, too. The learner's own loss of x' is taken,
with the classes that were allowed then. An agent's outputs go stale in another way: replay (`lifelong.replay`) distils
its policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.method import Memory, Method, StepInfo, Task
from rlmeta.learning.predictive import check_predictive
from rlmeta.learning.settings import PerLearner, require_finite, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import blank_memories, check_room, per_learner, remember
from rlmeta.lifelong.replay import draw_from_reservoir, reservoir
from rlmeta.nn import Context


@dataclass(frozen=True)
class DER(Method):
    """Settings of dark experience replay, and the method itself."""

    size: int = 200
    """Capacity of the reservoir in samples."""
    distillation: PerLearner = 0.5
    """α: weight of the squared error to the stored outputs."""
    strength: PerLearner = 0.5
    """β: weight of the loss of the labels; 0 for DER without them."""
    batch_size: int = 0
    """Replayed samples of each kind in every step; 0 for the size of the minibatch."""

    name = "der"
    recordable = True

    def __post_init__(self) -> None:
        require_range(self, "size", 0)
        require_range(self, "distillation", 0.0)
        require_range(self, "strength", 0.0)
        require_range(self, "batch_size", 0)
        require_finite(self, "distillation", "strength")

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: an empty reservoir.

        Raises:
            SettingError: the learner is an agent.
        """
        check_predictive(learner)
        if learner.acts:
            raise SettingError(
                "DER keeps outputs of labelled samples: with an agent use Replay, which distils policies"
            )
        m = {name: per_learner(value, state) for name, value in (("alpha", self.distillation), ("beta", self.strength))}
        m["met"] = torch.zeros(*state["key"].shape, 1, dtype=torch.int64, device=state["key"].device)
        if self.size:
            check_room(learner, state, max(self.size, self.batch_size), "size or batch_size")
            m["samples"] = blank_memories(learner, state, self.size)
            blank = learner.blank(tuple(state["key"].shape), state["key"].device)
            output = learner.output(state["params"], blank)
            m["outputs"] = output.new_zeros(*output.shape[:-2], self.size, output.shape[-1])
        return m

    def _replays(self, m: Memory, weight: PerLearner) -> bool:
        """Whether there is something to replay, for a learner whose weight is not 0."""
        return self.size > 0 and any(values_of(weight)) and bool(m["met"].any())

    def loss(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor) -> Tensor | None:
        """Distillation loss `[*L]`: the mean squared error to stored outputs."""
        if not self._replays(m, self.distillation):
            return None
        kept = {**m["samples"], "outputs": m["outputs"]}
        drawn = draw_from_reservoir(kept, m["met"], self._count(batch, task), random.fold(key, "outputs"))
        error = learner.output(p, drawn, Context(training=True)) - drawn["outputs"]
        return m["alpha"] * error.square().mean((-2, -1))

    def batches(
        self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor
    ) -> Sequence[tuple[tree.Tree, float | Tensor]]:
        """Draw a minibatch with labels from the reservoir (DER++)."""
        if not self._replays(m, self.strength):
            return ()
        return [(draw_from_reservoir(m["samples"], m["met"], self._count(batch, task), key), m["beta"])]

    def _count(self, batch: tree.Tree, task: Task) -> int:
        return self.batch_size or next(tree.leaves(batch)).shape[task["index"].dim()]

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Offer the minibatch, with the outputs of before the step, to the reservoir."""
        if not self.size:
            return m
        new = {**remember(learner, p, info.batch), "outputs": learner.output(info.before, info.batch)}
        kept, group = {**m["samples"], "outputs": m["outputs"]}, torch.zeros_like(info.batch["identity"])
        kept, met = reservoir(kept, m["met"], new, group, key)
        return {**m, "outputs": kept.pop("outputs"), "samples": kept, "met": met}
