"""PackNet (Mallya and Lazebnik, 2018): every task owns some weights, which no later task may change.

A task trains on all weights that are still free, beside those of earlier tasks, which it may use and not change. Then
the smallest of its own are pruned in every layer, set to 0 and given back, and what is left is trained again without
them. A task is evaluated with its own weights and those of tasks before it; biases, parameters of normalisation and
running statistics are few, so every task has its own copy. So the outputs for a task never change again, bit for bit,
whatever the optimizer does: the mask is part of the forward pass, not a change to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.axes import align
from rlmeta.learning.method import Draw, Memory, Method, StepInfo, Task
from rlmeta.learning.settings import require, require_range
from rlmeta.learning.state import Packed, Params, State
from rlmeta.lifelong.recall import names_of, position_of, put_memories

NOBODYS = -1
"""Owner of entries that are not packed: the copied ones, and with an agent those of the critic."""
FREE = 0
"""Owner of entries that no task has kept; task k (from 0) is owner k + 1."""


@dataclass(frozen=True)
class PackNet(Method):
    """Settings of PackNet, and the method itself."""

    keep: float = 0.0
    """Part of the free weights of every layer that a task keeps; 0 for equal shares, 1 / (tasks left, it included)."""
    retrain: float = 0.5
    """Iterations of training after the pruning, as a part of those before."""
    critic: bool = False
    """With an agent: pack its critic, too, and not its policy alone."""

    name = "packnet"
    needs = frozenset({"boundaries", "train_id", "test_id"})

    def __post_init__(self) -> None:
        require_range(self, "keep", 0.0, 1.0)
        require_range(self, "retrain", 0.0)

    def phases(self, iterations: int) -> Sequence[tuple[str, int]]:
        """Train again after the pruning."""
        count = round(self.retrain * iterations)
        return [("retrain", count)] if count else []

    def init(self, learner: Any, state: State) -> Memory:
        """Every weight is free.

        Raises:
            SettingError: some layer has fewer weights than the tasks need.
        """
        weights, shape, axes = state["params"]["weights"], state["key"].shape, state["key"].dim()
        names = self._names(weights, axes)[0]
        self._check_capacity({name: weights[name] for name in names}, axes, learner.num_tasks)
        owner = [torch.full(w.shape, FREE if n in names else NOBODYS, dtype=torch.int16) for n, w in weights.items()]
        packed = torch.cat([part.reshape(*shape, -1) for part in owner], -1).to(state["key"].device)
        return {
            "owner": packed,
            "moved": torch.zeros_like(packed, dtype=torch.bool),
            "copies": tree.map(
                lambda x: torch.zeros_like(x).unsqueeze(axes).repeat_interleave(learner.num_tasks, axes),
                self._copied(state["params"], axes),
            ),
            "done": torch.zeros(shape, dtype=torch.int64, device=state["key"].device),
            "pruned": torch.zeros(shape, dtype=torch.bool, device=state["key"].device),
        }

    def _check_capacity(self, weights: dict[str, Tensor], axes: int, tasks: int) -> None:
        for name, weight in weights.items():
            size = weight.shape[axes:].numel()
            require(
                self._free(size, tasks - 1, tasks) > 0,
                f"PackNet: {name} has {size} weights, all kept before the last of {tasks} tasks begins (keep is "
                f"{self.keep:g}): choose a smaller keep or a larger network",
            )

    def _free(self, size: int, position: int, tasks: int) -> int:
        """How many of a layer's weights are free when the task at this position begins."""
        for k in range(position):
            size -= self._share(size, tasks - k - 1)
        return size

    def _share(self, free: int, left: int) -> int:
        """How many of the free weights of a layer a task keeps, with so many tasks left after it."""
        return free if left == 0 else math.ceil(free * (self.keep or 1.0 / (left + 1)))

    def _names(self, weights: dict[str, Tensor], axes: int) -> tuple[list[str], list[str]]:
        """The weights that are packed, and those that every task has a copy of."""
        names = names_of(weights, self.critic)
        return [n for n in names if weights[n].dim() - axes > 1], [n for n in names if weights[n].dim() - axes <= 1]

    def _copied(self, p: Params, axes: int) -> Params:
        """What every task has its own copy of: vectors, running statistics and normalisers of what is packed."""
        networks = {name.partition(".")[0] for name in names_of(p["weights"], self.critic)}
        return {
            "weights": {name: p["weights"][name] for name in self._names(p["weights"], axes)[1]},
            "buffers": {name: value for name, value in p["buffers"].items() if name.partition(".")[0] in networks},
            "normalisers": {name: value for name, value in p["normalisers"].items() if name == "observation"},
        }

    # ------------------------------------------------------------------ tasks and phases

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """All free weights take part again."""
        return p, {**m, "pruned": torch.zeros_like(m["pruned"])}

    def phase_start(self, learner: Any, p: Params, m: Memory, task: Task, phase: str) -> tuple[Params, Memory]:
        """Prune before the second training."""
        return self._prune(learner, p, m, task) if phase == "retrain" else (p, m)

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Prune, where there was no second training, and keep the task's copies."""
        p, m = self._prune(learner, p, m, task)
        position, axes = position_of(task), task["index"].dim()
        copies = put_memories(m["copies"], position, self._copied(p, axes), axes)
        return p, {**m, "copies": copies, "done": torch.full_like(m["done"], position + 1)}

    def _prune(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """In every layer the task keeps the largest of the weights that it has moved; the others are 0, and free.

        What is free when a later task begins is 0 already, so `moved` need not tell whose steps moved it.
        """
        if bool(m["pruned"].all()):
            return p, m
        position, axes = position_of(task), task["index"].dim()
        packed = Packed.of(p["weights"], axes)
        owners, moved = Packed.view(m["owner"].clone(), packed, axes), Packed.view(m["moved"], packed, axes)
        for name in self._names(packed, axes)[0]:
            owner, size = owners[name].flatten(axes), (packed[name].abs() * moved[name]).flatten(axes)
            count = self._share(
                self._free(size.shape[-1], position, learner.num_tasks), learner.num_tasks - position - 1
            )
            order = size.masked_fill(owner != FREE, -1.0).argsort(dim=-1, descending=True, stable=True)
            owners[name].copy_(owner.scatter(-1, order[..., :count], position + 1).view(owners[name].shape))
        owner = torch.where(m["pruned"].unsqueeze(-1), m["owner"], owners.flat)
        values = torch.where((owner == FREE) & ~m["pruned"].unsqueeze(-1), 0.0, packed.flat)
        new = {**p, "weights": Packed.view(values, packed, axes)}
        return new, {**m, "owner": owner, "pruned": torch.ones_like(m["pruned"])}

    # ------------------------------------------------------------------ every step

    def params(self, p: Params, m: Memory, task: Task) -> Params:
        """The weights that the task may see; for a task that is done also its own copies."""
        old, axes = task["index"] < m["done"], task["index"].dim()
        if not bool((old | m["pruned"]).any()):
            return p
        owner, last = m["owner"], torch.where(old, task["index"] + 1, torch.iinfo(torch.int16).max)
        seen = ((owner > FREE) & (owner <= last.unsqueeze(-1))) | ((owner == FREE) & ~(old | m["pruned"]).unsqueeze(-1))
        visible = Packed.view(seen, p["weights"], axes)
        weights = dict(p["weights"])
        for name in self._names(weights, axes)[0]:
            weights[name] = torch.where(visible[name], weights[name], 0.0)
        p = {**p, "weights": weights}
        if not bool(old.any()):
            return p
        position, copied = position_of(task), self._copied(p, axes)

        def choose(now: Tensor, kept: Tensor) -> Tensor:
            return torch.where(torch.as_tensor(align(old, now)), kept.select(axes, position), now)

        own = tree.map(choose, copied, m["copies"])
        return {**p, **{part: {**p[part], **own[part]} for part in own}}

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Weights of earlier tasks; after the pruning all but the task's own."""
        owner, pruned = m["owner"], m["pruned"].unsqueeze(-1)
        if position_of(task) == 0 and not bool(pruned.any()):
            return None
        return (owner > FREE) & ~(pruned & (owner == (task["index"] + 1).unsqueeze(-1))) | (pruned & (owner == FREE))

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Note which weights have been moved: initial ones that the first task never needed are not worth keeping."""
        if bool(m["pruned"].all()):
            return m
        return {**m, "moved": m["moved"] | (info.delta != 0)}
