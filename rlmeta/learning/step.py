"""The one gradient step that every learner takes.

losses -> penalties -> projection -> mask -> clip -> optimizer -> restore frozen
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import tree
from rlmeta.functional.optim import Optimizer
from rlmeta.functional.packed import Packed
from rlmeta.learning.descent import descend
from rlmeta.learning.gradients import HasLosses, StepContext
from rlmeta.learning.groups import Group, moving
from rlmeta.learning.method import Method, recordable
from rlmeta.learning.minibatch import Minibatches
from rlmeta.learning.optimizer_state import as_groups
from rlmeta.learning.recorded_steps import Source, Steps, recorded_descent, recorded_descents
from rlmeta.learning.state import State, select
from rlmeta.learning.targets import Copy


def step(
    learner: HasLosses,
    state: State,
    batch: tree.Tree,
    optimizer: Optimizer | Sequence[Group],
    *,
    active: Tensor | None = None,
    max_grad_norm: float | Tensor | None = None,
    methods: Sequence[Method] = (),
    key: Tensor | None = None,
    report: bool = True,
) -> tuple[State, dict[str, Tensor]]:
    """Take one gradient step with all learners at once.

    A learner that is not `active`, or whose gradient is not finite, comes out bit-identical; the others never notice.

    Args:
        learner: gives the losses.
        state: with `params` and `optimizer`; consumed.
        batch: a minibatch `[*L, B, ...]`.
        optimizer: an `(init, update)` pair for all weights, or the groups that move.
        active: `[*L]` bool, or None when all are; combined with the state's own.
        max_grad_norm: clip each learner's gradient to this norm; groups have their own.
        methods: lifelong methods, in order; their memories are `state["methods"]`.
        key: `[*L]`, for dropout and the like.
        report: whether diagnostics are wanted.

    Returns:
        The new state and `{name: [*L]}`: the losses, the learner's diagnostics, and the norm of the gradient before it
        was clipped; nothing where no report is wanted.
    """
    params, axes = state["params"], state["key"].dim()
    weights = Packed.of(params["weights"], axes)
    groups = as_groups(optimizer, max_grad_norm)
    capture = _capture(learner, groups, methods)
    if capture is None:
        ctx = StepContext(training=True, key=key, report=report, moving=moving(groups))
        packed = {**state, "params": {**params, "weights": weights}}
        outputs = descend(learner, packed, batch, groups, methods, ctx, axes)
    else:
        outputs = recorded_descent(capture, learner, state, weights, batch, groups, methods, key, report)
    with torch.no_grad():
        flat, moments, memories = outputs["flat"], outputs["moments"], outputs["memories"]
        state["active"] = state["active"] & outputs["finite"]
        keep = state["active"] if active is None else state["active"] & active
        if not bool(keep.all()):
            flat = torch.where(keep.unsqueeze(-1), flat, weights.flat)
            moments = select(keep, moments, state["optimizer"])
            memories = select(keep, memories, {name: state["methods"][name] for name in memories})
        state["params"] = {**params, "weights": Packed.view(flat, weights, axes)}
        if outputs["buffers"]:
            buffers = {**params["buffers"], **outputs["buffers"]}
            state["params"]["buffers"] = select(keep, buffers, params["buffers"])
        state["optimizer"] = moments
        if methods:
            state["methods"] = {**state["methods"], **memories}
    _count_steps(state, 1)
    return state, {**outputs["reported"], "losses/grad_norm": outputs["norm"]} if report else {}


def steps(
    learner: HasLosses,
    state: State,
    batches: Minibatches,
    constants: tree.Tree,
    optimizer: Optimizer | Sequence[Group],
    *,
    active: Tensor | None = None,
    max_grad_norm: float | Tensor | None = None,
    methods: Sequence[Method] = (),
    report: bool = False,
) -> tuple[State, dict[str, Tensor]]:
    """Take gradient steps on one minibatch after another, equal to `step` bit for bit; one program if it is recorded.

    Args:
        learner: gives the losses.
        state: with `params` and `optimizer`; consumed.
        batches: the minibatches.
        constants: what every one of them contains besides, every leaf `[*L, ...]`.
        optimizer, active, max_grad_norm, methods: as for `step`.
        report: whether diagnostics are wanted.

    Returns:
        The new state, and the reports of all steps, `{name: [count, *L]}`; nothing where none are wanted.
    """
    groups = as_groups(optimizer, max_grad_norm)
    capture = _capture(learner, groups, methods)
    if not batches.count:
        return state, {}
    if capture is None:
        rows = []
        for batch in batches:
            full = {**batch, **constants}
            state, info = step(learner, state, full, groups, active=active, methods=methods, report=report)
            rows.append(info)
        return state, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    keep = torch.ones_like(state["active"]) if active is None else active
    each = {} if batches.order is None else {"index": batches.order}
    work = Steps(batches.batch, constants, each, batches.count, (groups,), (), keep, report, tuple(methods))
    state, reports = recorded_descents(capture, learner, state, work)
    _count_steps(state, batches.count)
    return state, reports


def replay_steps(
    learner: HasLosses,
    state: State,
    batches: tree.Tree,
    keys: Tensor,
    cycle: Sequence[Sequence[Group]],
    *,
    copies: Mapping[Copy, Tensor] | None = None,
    methods: Sequence[Method] = (),
    source: Source | None = None,
) -> tuple[State, dict[str, Tensor]]:
    """Take gradient steps on minibatches of a replay memory, and update target networks after each.

    Args:
        learner: gives the losses.
        state: with `params` and `optimizer`, and `source` if there is one; consumed.
        batches: minibatches, every leaf `[K, *L, B, ...]`; or what the source draws them from, every leaf `[*L, ...]`.
        keys: `[K, *L]`, what the losses, and the source, draw from; K is a multiple of the cycle's length.
        cycle: the groups that move in the first step, the second, ..., and again from the start.
        copies: which copies move after each step, and how far, `[K, *L]` each.
        methods: lifelong methods, in order.
        source: draws every minibatch after the step before, and is told the errors of its samples.

    Returns:
        The new state, and the means of the reports of the cycles' last steps, `{name: [*L]}`.
    """
    copies, count = copies or {}, len(keys)
    capture = _capture(learner, [group for groups in cycle for group in groups], methods)
    each = {"key": keys, "rates": {copy.name: rate for copy, rate in copies.items()}}
    work = Steps(
        {} if source is None else batches,
        {},
        each if source is not None else {**each, "batch": batches},
        count,
        tuple(map(tuple, cycle)),
        tuple(copies),
        report=True,
        methods=tuple(methods),
        source=source,
    )
    state, reports = recorded_descents(capture or Capture(backends=()), learner, state, work)
    _count_steps(state, count)
    return state, {name: values.mean(0) for name, values in reports.items()}


def _capture(learner: HasLosses, groups: Sequence[Group], methods: Sequence[Method]) -> Capture | None:
    """Capture that records the learner's steps; None if they cannot be recorded."""
    capture: Capture | None = getattr(learner, "capture", None)
    if capture is None or any(group.optimizer.recipe is None for group in groups):
        return None
    for method in methods:
        if not recordable(method):
            capture.refuse(f"gradient steps under {method.name}", "its class does not say recordable = True")
            return None
    return capture


def _count_steps(state: State, steps: int) -> None:
    state["count"] = {**state["count"], "gradient_steps": state["count"]["gradient_steps"] + steps}
