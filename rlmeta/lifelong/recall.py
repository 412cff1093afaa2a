"""Episodic memory of task samples, and the rehearsal loss on them, for replay and GEM.

A supervised learner remembers inputs and targets. An agent remembers observations and what its policy made of them when
the task ended: transitions would go stale, since returns and ratios belong to the policy that made them, while the
divergence from a stored policy stays a loss for ever (behaviour cloning, as in CLEAR and ClonEx). Of an agent with a
memory one sample is a whole sequence, with the memory before its first step: what it remembered later is made anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.method import Draw
from rlmeta.learning.predictive import check_predictive
from rlmeta.learning.settings import values_of
from rlmeta.learning.state import Params, State
from rlmeta.nn import Context


def recall_loss(learner: Any, p: Params, remembered: tree.Tree, ctx: Context) -> Tensor:
    """Rehearsal loss `[*L, B]`: the learner's loss on stored samples, or the divergence from an old policy.

    Supervised: minus the log-likelihood of the target. Agents: KL(π then ‖ π now), in nats.
    """
    now = learner.distribution(p, remembered, ctx)
    if learner.acts:
        divergence: Tensor = learner.divergence(remembered["taught"], now)
        return divergence
    if learner.classes:
        target = remembered["target"].unsqueeze(-1)
        return -now["logits"].log_softmax(-1).gather(-1, target).squeeze(-1)
    return 0.5 * (now["mean"] - remembered["target"]).square().sum(-1)


def remember(learner: Any, p: Params, samples: tree.Tree) -> tree.Tree:
    """Convert samples `[*L, n, ...]` to entries of an episodic memory."""
    if learner.acts:
        kept = {"observation": samples["observation"]}
        with torch.no_grad():
            return {**kept, "taught": learner.distribution(p, kept, Context())}
    kept = {name: samples[name] for name in ("observation", "target", "identity")}
    if learner.classes:
        allowed = samples.get("allowed")
        shape = (*kept["identity"].shape, learner.classes)
        kept["allowed"] = kept["identity"].new_ones(shape, dtype=torch.bool) if allowed is None else allowed
    return kept


def draw_memories(learner: Any, p: Params, draw: Draw, count: int, axes: int) -> tree.Tree:
    """Draw `count` samples of the task that has just ended, as entries of an episodic memory `[*L, count, ...]`.

    Raises:
        SettingError: the task has fewer samples.
    """
    samples = draw(count)
    check_count(count, next(tree.leaves(samples)).shape[axes])
    return remember(learner, p, samples)


def check_count(count: int, available: int) -> None:
    """Check that a task has enough samples for the episodic memory."""
    if count > available:
        raise SettingError(
            f"a memory of {count} samples a task is more than the {available} that the smallest has: choose a smaller "
            "memory"
        )


def blank_memories(learner: Any, state: State, *slots: int) -> tree.Tree:
    """Allocate an empty episodic memory `[*L, *slots, ...]`; its shapes stay for the whole run.

    Raises:
        SettingError: more than the machine has memory for.
    """
    check_room(learner, state, math.prod(slots), "memory")
    axes = state["key"].dim()

    def room(x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:axes], *slots, *x.shape[axes + 1 :]))

    return tree.map(room, _one_memory(learner, state))


def check_room(learner: Any, state: State, count: int, setting: str) -> None:
    """Check that RAM suffices for `count` samples of every learner, before anything is allocated."""
    each = sum(x.numel() * x.element_size() for x in tree.leaves(_one_memory(learner, state)))
    device = state["key"].device
    most = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _machine_memory()
    if count * each > most:
        raise SettingError(
            f"{count:,} samples of {state['key'].numel()} learners take {count * each / 1e9:,.0f} GB, more than the "
            f"{most / 1e9:,.0f} GB of this machine: choose a smaller {setting}"
        )


def _machine_memory() -> float:
    """Bytes of RAM; infinite if the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _one_memory(learner: Any, state: State) -> tree.Tree:
    """Zero entry of an episodic memory, `[*L, 1, ...]`."""
    check_predictive(learner)
    return remember(learner, state["params"], learner.blank(tuple(state["key"].shape), state["key"].device))


def room_for_tasks(learner: Any, state: State, count: int) -> tree.Tree:
    """Allocate an episodic memory of `count` samples for every task of the stream, `[*L, T, count, ...]`; {} for none.

    Raises:
        SettingError: a task has fewer.
    """
    check_count(count, learner.task_samples or count)
    return blank_memories(learner, state, learner.num_tasks, count) if count else {}


def keep_samples(
    learner: Any, p: Params, memories: tree.Tree, count: int, task: dict[str, Tensor], draw: Draw
) -> tree.Tree:
    """Add `count` samples of the task that has just ended to an episodic memory `[*L, T, M, ...]`."""
    if not count:
        return memories
    axes = task["index"].dim()
    return put_memories(memories, position_of(task), draw_memories(learner, p, draw, count, axes), axes)


def put_memories(memories: tree.Tree, slot: int, kept: tree.Tree, axes: int) -> tree.Tree:
    """Write `kept` `[*L, M, ...]` to a slot of `memories` `[*L, T, M, ...]`, in a copy."""

    def write(room: Tensor, value: Tensor) -> Tensor:
        room = room.clone()
        room.select(axes, slot).copy_(value)
        return room

    return tree.map(write, memories, kept)


def per_learner(setting: float | Sequence[float], state: State) -> Tensor:
    """Convert a setting to a tensor `[*L]` of the weights' dtype; a list has a value per learner, or per equal block.

    Raises:
        SettingError: the list does not fit the number of learners.
    """
    values, key = values_of(setting), state["key"]
    if key.numel() % len(values):
        raise SettingError(f"{len(values)} values for {key.numel()} learners: give one for each, or for equal blocks")
    dtype = next(iter(state["params"]["weights"].values())).dtype
    per_value = torch.tensor(values, dtype=dtype, device=key.device)
    if any(math.isfinite(value) for value, kept in zip(values, per_value.tolist()) if not math.isfinite(kept)):
        raise SettingError(f"{setting!r} is more than {dtype} can hold: choose a smaller number")
    return per_value.repeat_interleave(key.numel() // len(values)).reshape(key.shape)


def position_of(task: dict[str, Tensor]) -> int:
    """Position of the task in the stream, which all learners of a batch share whatever their orders."""
    return int(task["index"].reshape(-1)[0])
