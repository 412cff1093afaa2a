"""Experience replay, rehearsal of stored samples in every step (Chaudhry et al., 2019, "On Tiny Episodic Memories").

A supervised learner's buffer is a reservoir: every sample met so far is in it with the same chance (Vitter, 1985), in
each class on its own where the buffer is balanced; nothing needs to be known of tasks. An agent's buffer is a set of
states of every task and its policy's answers in them, and what is replayed is the divergence from those (see `recall`);
old transitions would be stale for an on-policy learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align
from rlmeta.functional.reservoir import last_on_place, reservoir_places
from rlmeta.learning.method import Draw, Memory, Method, StepInfo, Task, require_revealed
from rlmeta.learning.minibatch import gather
from rlmeta.learning.predictive import check_predictive
from rlmeta.learning.settings import PerLearner, check_choices, require_finite, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import (
    blank_memories,
    check_room,
    keep_samples,
    per_learner,
    recall_loss,
    remember,
)
from rlmeta.nn import Context


@dataclass(frozen=True)
class Replay(Method):
    """Settings of replay, and the method itself."""

    size: int = 200
    """Capacity of the buffer in samples: in equal parts for every class, or with an agent for every task."""
    strength: PerLearner = 1.0
    """Weight of the replay loss beside the learner's own."""
    batch_size: int = 0
    """Replayed samples in every step; 0 for the size of the minibatch."""
    balance: Literal["class", "none"] = "class"
    """A reservoir for every class, or one for all samples; regression and agents have no classes."""

    name = "replay"
    recordable = True

    def __post_init__(self) -> None:
        require_range(self, "size", 0)
        require_range(self, "strength", 0.0)
        require_range(self, "batch_size", 0)
        require_finite(self, "strength")
        check_choices(self)

    @property
    def _idle(self) -> bool:
        """Whether the weight is 0 for every learner."""
        return self.size == 0 or not any(values_of(self.strength))

    def init(self, learner: Any, state: State) -> Memory:
        """Initial replay memory: an empty buffer."""
        check_predictive(learner)
        if learner.acts:
            require_revealed(self, frozenset({"boundaries"}), learner.reveals, "the stream")
        m = {"strength": per_learner(self.strength, state)}
        classes = learner.classes if self.balance == "class" else 0
        groups = learner.num_tasks if learner.acts else classes or 1
        share = self._share(groups, "tasks" if learner.acts else "classes")
        if self.size:
            check_room(learner, state, max(self.size, self.batch_size), "size or batch_size")
            slots = (groups, share) if learner.acts else (groups * share,)
            m["samples"] = blank_memories(learner, state, *slots)
        if not learner.acts:
            m["met"] = torch.zeros(*state["key"].shape, groups, dtype=torch.int64, device=state["key"].device)
        return m

    def _share(self, groups: int, kind: str) -> int:
        """Capacity of the reservoir of each group."""
        if 0 < self.size < groups:
            raise SettingError(f"Replay: size is {self.size}, less than the {groups} {kind}: give it one for each")
        return self.size // groups

    # ------------------------------------------------------------------ supervised learners

    def batches(
        self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor
    ) -> Sequence[tuple[tree.Tree, float | Tensor]]:
        """Draw a minibatch from the replay buffer uniformly."""
        if self._idle or learner.acts or not bool(m["met"].any()):
            return ()
        size = self.batch_size or next(tree.leaves(batch)).shape[task["index"].dim()]
        return [(draw_from_reservoir(m["samples"], m["met"], size, key), m["strength"])]

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Add the minibatch to the reservoirs by reservoir sampling."""
        if self._idle or learner.acts:
            return m
        groups = m["met"].shape[-1]
        group = info.batch["target"] if groups > 1 else torch.zeros_like(info.batch["identity"])
        samples, met = reservoir(m["samples"], m["met"], remember(learner, p, info.batch), group, key)
        return {**m, "samples": samples, "met": met}

    # ------------------------------------------------------------------ agents

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Store states of the task and the agent's action distributions in them."""
        if self._idle or not learner.acts:
            return p, m
        return p, {**m, "samples": keep_samples(learner, p, m["samples"], self.size // learner.num_tasks, task, draw)}

    def loss(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor) -> Tensor | None:
        """Distillation loss `[*L]`: the divergence from the policies of old tasks in some of their states."""
        tasks, axes = task["index"].clamp(min=0), task["index"].dim()
        if self._idle or not learner.acts or not bool((tasks > 0).any()):
            return None
        size = self.batch_size or next(tree.leaves(batch)).shape[axes]
        kept = tasks * (self.size // learner.num_tasks)
        rows = random.integers(key, "rows", 0, (size,), kept.unsqueeze(-1))
        samples = gather(tree.map(lambda x: x.flatten(axes, axes + 1), m["samples"]), rows)
        return m["strength"] * recall_loss(learner, p, samples, Context(training=True)).mean(-1)


def draw_from_reservoir(samples: tree.Tree, met: Tensor, size: int, key: Tensor) -> tree.Tree:
    """Draw `size` samples `[*L, size, ...]` uniformly, with replacement, of all that the reservoirs hold.

    `samples` and `met` are those of `reservoir`, and something was offered to every learner's before.
    """
    axes, groups = key.dim(), met.shape[-1]
    share = next(tree.leaves(samples)).shape[axes] // groups
    filled = torch.arange(share, device=key.device) < met.clamp(max=share).unsqueeze(-1)
    ends = filled.flatten(axes).cumsum(-1)
    chosen = random.integers(key, "rows", 0, (size,), ends[..., -1:])
    return gather(samples, torch.searchsorted(ends, chosen, right=True))


def reservoir(samples: tree.Tree, met: Tensor, new: tree.Tree, group: Tensor, key: Tensor) -> tuple[tree.Tree, Tensor]:
    """Reservoir sampling of a minibatch, a reservoir for each group, by Vitter's algorithm R but all samples at once.

    The n-th sample of a group is taken while there is room; later it replaces a place drawn from n, if that is one of
    the reservoir's. Where several samples of the minibatch fall on one place the last stays, as in a loop.

    Args:
        samples: `[*L, G * M, ...]`, M places for each of G groups.
        met: how many samples of each group were offered before, `[*L, G]`.
        new: the minibatch `[*L, B, ...]`.
        group: of each of its samples, `[*L, B]` in [0, G).
        key: `[*L]`.

    Returns:
        The new samples and counts.
    """
    axes, groups = key.dim(), met.shape[-1]
    places = next(tree.leaves(samples)).shape[axes]
    room, count = places // groups, group.shape[-1]
    member = torch.nn.functional.one_hot(group, groups)
    number = (met.unsqueeze(-2) + member.cumsum(-2)).gather(-1, group.unsqueeze(-1)).squeeze(-1)
    drawn = random.integers(key, "place", 0, (count,), number)
    place = reservoir_places(number, drawn, room)
    winner = last_on_place(torch.where(place < room, group * room + place, places), places)
    taken = winner >= 0
    chosen = gather(new, winner.clamp(min=0))

    def write(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(align(taken, new), new, old)

    return tree.map(write, chosen, samples), met + member.sum(-2)
