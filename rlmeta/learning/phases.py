"""Training phases of lifelong methods, in which they may train a module of their own, such as a generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning import hooks
from rlmeta.learning.state import State

EVALUATED = -1
"""Value of `phase` in evaluation."""
TRAINING = 0
"""Value of `phase` while the learner trains; in a phase of method k (from 0) it is k + 1."""


def whose(task: dict[str, Tensor]) -> int:
    """Owner of the current phase, equal for all learners of a batch: EVALUATED, TRAINING, or k + 1 for method k."""
    return int(task["phase"].reshape(-1)[0])


@torch.no_grad()
def own_step(learner: Any, state: State, batch: tree.Tree) -> tuple[State, dict[str, Tensor]] | None:
    """Gradient step of a lifelong method in its own phase, instead of the learner's; None for a step of the learner's.

    A learner that is not active, or whose numbers the step has lost, stays as it is.

    Args:
        learner: whose methods.
        state: with the task and the methods' memories.
        batch: the samples of the step `[*L, B, ...]`, of an agent those of its rollout.

    Returns:
        The new state, and reports `{name: [*L]}`.
    """
    number = whose(state["task"]) - 1
    if number < 0:
        return None
    method, memories = learner.methods[number], state["methods"]
    learned = method.learn(learner, state["params"], memories[method.name], batch, state["task"], state["active"])
    if learned is None:
        return None
    hooks.same_form(method, "learn", learned.memory, memories[method.name], "the memory")
    active = state["active"] & hooks.tensor_like(method, "learn", learned.active, state["active"])
    return {**state, "methods": {**memories, method.name: learned.memory}, "active": active}, learned.reports
