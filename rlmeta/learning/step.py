"""The one gradient step that every learner takes.

losses -> penalties -> projection -> mask -> clip -> optimizer -> restore frozen
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import tree
from rlmeta.functional.optim import Optimizer
from rlmeta.functional.packed import Packed
from rlmeta.learning import hooks
from rlmeta.learning.gradients import HasLosses, StepContext, all_gradients, method_key
from rlmeta.learning.method import Gradients, Method, StepInfo
from rlmeta.learning.minibatch import Minibatches
from rlmeta.learning.optimizer_state import move
from rlmeta.learning.recorded_steps import recorded_descent, recorded_descents
from rlmeta.learning.state import State, select


def step(
    learner: HasLosses,
    state: State,
    batch: tree.Tree,
    optimizer: Optimizer,
    *,
    active: Tensor | None = None,
    max_grad_norm: float | Tensor | None = None,
    methods: Sequence[Method] = (),
    key: Tensor | None = None,
    report: bool = True,
) -> tuple[State, dict[str, Tensor]]:
    """One step of gradient descent for all learners at once.

    A learner that is not `active`, or whose gradient is not finite, comes out bit-identical; the others never notice.

    Args:
        learner: gives the losses.
        state: with `params` and `optimizer`; consumed.
        batch: a minibatch `[*L, B, ...]`.
        optimizer: an `(init, update)` pair.
        active: `[*L]` bool, or None when all are; combined with the state's own.
        max_grad_norm: clip each learner's gradient to this norm.
        methods: lifelong methods, in order; their memories are `state["methods"]`.
        key: `[*L]`, for dropout and the like.
        report: whether diagnostics are wanted.

    Returns:
        The new state and `{name: [*L]}`: the losses, the learner's diagnostics, and the norm of the gradient before it
        was clipped; nothing where no report is wanted.
    """
    params, axes = state["params"], state["key"].dim()
    weights = Packed.of(params["weights"], axes)
    max_norm = torch.inf if max_grad_norm is None else max_grad_norm
    capture: Capture | None = getattr(learner, "capture", None)
    if capture is None or methods or key is not None or optimizer.recipe is None:
        ctx = StepContext(training=True, key=key, report=report)
        found = _descent(learner, state, weights, batch, optimizer, max_norm, methods, ctx)
    else:
        found = recorded_descent(capture, learner, state, weights, batch, optimizer.recipe, max_norm, report)
    with torch.no_grad():
        flat, moments = found["flat"], found["moments"]
        state["active"] = state["active"] & found["finite"]
        keep = state["active"] if active is None else state["active"] & active
        if not bool(keep.all()):
            flat = torch.where(keep.unsqueeze(-1), flat, weights.flat)
            moments = select(keep, moments, state["optimizer"])
        state["params"] = {**params, "weights": Packed.view(flat, weights, axes)}
        if found["buffers"]:
            buffers = {**params["buffers"], **found["buffers"]}
            state["params"]["buffers"] = select(keep, buffers, params["buffers"])
        state["optimizer"] = moments
        if methods:
            _after_step(learner, state, StepInfo(found["gradient"], flat - weights.flat, batch), methods, keep)
    count = state["count"]
    state["count"] = {**count, "gradient_steps": count["gradient_steps"] + 1}
    return state, {**found["reported"], "losses/grad_norm": found["norm"]} if report else {}


def steps(
    learner: HasLosses,
    state: State,
    batches: Minibatches,
    constants: tree.Tree,
    optimizer: Optimizer,
    *,
    active: Tensor | None = None,
    max_grad_norm: float | Tensor | None = None,
    methods: Sequence[Method] = (),
) -> State:
    """`step` on one minibatch after another, without reports: the same bits, as one program where there is no method.

    Args:
        learner: gives the losses.
        state: with `params` and `optimizer`; consumed.
        batches: the minibatches.
        constants: what every one of them contains besides, every leaf `[*L, ...]`.
        optimizer, active, max_grad_norm, methods: as for `step`.
    """
    capture: Capture | None = getattr(learner, "capture", None)
    if capture is None or methods or optimizer.recipe is None:
        for batch in batches:
            full = {**batch, **constants}
            given: dict[str, Any] = {"active": active, "max_grad_norm": max_grad_norm, "methods": methods}
            state, _ = step(learner, state, full, optimizer, **given, report=False)
        return state
    if batches.count:
        max_norm = torch.inf if max_grad_norm is None else max_grad_norm
        keep = torch.ones_like(state["active"]) if active is None else active
        found = recorded_descents(capture, learner, state, batches, constants, keep, optimizer.recipe, max_norm)
        weights, axes = state["params"]["weights"], state["key"].dim()
        state["params"] = {
            **state["params"],
            "weights": Packed.view(found["flat"], weights, axes),
            "buffers": found["buffers"],
        }
        state["active"], state["optimizer"] = found["active"], found["moments"]
        count = state["count"]
        state["count"] = {**count, "gradient_steps": count["gradient_steps"] + batches.count}
    return state


def _descent(
    learner: HasLosses,
    state: State,
    weights: Packed,
    batch: tree.Tree,
    optimizer: Optimizer,
    max_norm: float | Tensor,
    methods: Sequence[Method],
    ctx: StepContext,
) -> tree.Tree:
    """Where the step leads: `flat` and `moments`, whether they are `finite`, the `norm` and the task's `gradient`."""
    memories, task = state.get("methods", {}), state.get("task", {})
    found = all_gradients(learner, state, batch, methods, ctx)
    with torch.no_grad():
        task_gradient, seen = found["gradient"], found.pop("seen")
        total = task_gradient + found["penalty"] if "penalty" in found else task_gradient
        for method in methods:
            found_total = method.grads(learner, Gradients(task_gradient, total), seen, memories[method.name], task)
            total = hooks.tensor_like(method, "grads", found_total, task_gradient)
        frozen = _union(
            [hooks.mask(method, method.frozen(seen, memories[method.name], task), total) for method in methods]
        )
        if frozen is not None:
            total = total.masked_fill(frozen, 0.0)
        axes = state["key"].dim()
        return {**found, **move(weights.flat, state["optimizer"], total, max_norm, axes, optimizer, frozen)}


def _after_step(learner: Any, state: State, info: StepInfo, methods: Sequence[Method], keep: Tensor) -> None:
    """Let the methods look at the step; the memory of a learner that took none stays as it is."""
    memories, task = state["methods"], state["task"]
    after = {
        m.name: hooks.memory(
            m,
            "after_step",
            m.after_step(learner, info, state["params"], memories[m.name], task, method_key(state, m)),
        )
        for m in methods
    }
    state["methods"] = {**memories, **(after if bool(keep.all()) else select(keep, after, memories))}



def _union(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    return torch.stack(present).any(0)
