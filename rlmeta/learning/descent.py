"""Gradient step as a function of tensors: gradients, lifelong methods' penalties and projections, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning import hooks
from rlmeta.learning.gradients import HasLosses, StepContext, all_gradients, method_key
from rlmeta.learning.groups import Group, entries, spans, with_entries
from rlmeta.learning.method import Gradients, Method, StepInfo
from rlmeta.learning.optimizer_state import move
from rlmeta.learning.state import State


def descend(
    learner: HasLosses,
    state: State,
    batch: tree.Tree,
    groups: Sequence[Group],
    methods: Sequence[Method],
    ctx: StepContext,
    axes: int,
) -> tree.Tree:
    """Gradient step: losses -> penalties -> projection -> mask -> clip -> optimizer -> restore frozen -> memories.

    Args:
        learner: gives the losses.
        state: its `params`, with packed weights, and `optimizer`; where there are methods also `methods`, `task`, `key`
            and `count`. It stays as it is.
        batch: a minibatch `[*L, B, ...]`.
        groups: those that move.
        methods: lifelong methods, in order.
        ctx: of the learner's own losses.
        axes: how many leading axes are learner axes.

    Returns:
        Weights, moments and memories after the step, `flat`, `moments` and `memories`, new `buffers`, whether all is
        `finite`, the `norm` of the gradient before it was clipped, `reported` values, and the samples' `errors` if the
        learner says them.
    """
    weights = state["params"]["weights"]
    outputs = all_gradients(learner, state, batch, groups, methods, ctx)
    gradients, seen, penalties = outputs.pop("gradients"), outputs.pop("seen", None), outputs.pop("penalties", None)
    with torch.no_grad():
        if not methods:
            return {**outputs, **move(weights, state["optimizer"], gradients, groups, axes), "memories": {}}
        task_gradient = _packed(gradients, groups, weights)
        total = task_gradient if penalties is None else task_gradient + _packed(penalties, groups, weights)
        memories, task = state["methods"], state["task"]
        for method in methods:
            changed = method.grads(learner, Gradients(task_gradient, total), seen, memories[method.name], task)
            total = hooks.tensor_like(method, "grads", changed, task_gradient)
        masks = [hooks.mask(method, method.frozen(seen, memories[method.name], task), total) for method in methods]
        frozen = _union(masks)
        if frozen is not None:
            total = total.masked_fill(frozen, 0.0)
        totals = {group.name: entries(total, spans(group, weights)) for group in groups}
        outputs |= move(weights, state["optimizer"], totals, groups, axes, frozen)
        info = StepInfo(task_gradient, outputs["flat"] - weights.flat, batch, seen)
        return {**outputs, "memories": _memories_after(learner, state, outputs, info, methods)}


def _packed(gradients: dict[str, Tensor], groups: Sequence[Group], weights: Packed) -> Tensor:
    """Join the gradients of groups to one over all weights `[*L, P]`, 0 where no group is updated."""
    return with_entries(
        torch.zeros_like(weights.flat), [(spans(group, weights), gradients[group.name]) for group in groups]
    )


def _union(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.stack(present).any(0)


def _memories_after(
    learner: HasLosses, state: State, moved: tree.Tree, info: StepInfo, methods: Sequence[Method]
) -> State:
    """Update the memories of the lifelong methods after a gradient step."""
    params, axes = state["params"], info.delta.dim() - 1
    new = {
        **params,
        "weights": Packed.view(moved["flat"], params["weights"], axes),
        "buffers": {**params["buffers"], **moved["buffers"]},
    }
    return {
        method.name: hooks.memory(
            method,
            "after_step",
            method.after_step(
                learner, info, new, state["methods"][method.name], state["task"], method_key(state, method)
            ),
        )
        for method in methods
    }
