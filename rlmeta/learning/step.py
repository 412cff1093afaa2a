"""The one gradient step that every learner takes.

losses -> penalties -> projection -> mask -> clip -> optimizer -> restore frozen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import random, tree
from rlmeta.functional.optim import Optimizer, Recipe, apply_updates, clip_by_norm
from rlmeta.functional.packed import Packed, in_order
from rlmeta.learning import hooks
from rlmeta.learning.method import Gradients, Method, StepInfo
from rlmeta.learning.minibatch import Minibatches, pick
from rlmeta.learning.state import Params, State, select
from rlmeta.nn import Context


@dataclass(slots=True)
class StepContext(Context):
    """The context of the forward passes of a gradient step.

    Attributes:
        report: whether diagnostics are wanted; computing them for every minibatch would cost as much as a small loss.
        info: where they go, `{name: [*L]}`.
    """

    report: bool = True
    info: dict[str, Tensor] = field(default_factory=dict)


class HasLosses(Protocol):
    """What `step` needs of a learner."""

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """The losses `{group: [*L]}` of a minibatch `[*L, B, ...]`; diagnostics go into `ctx.info`."""
        ...


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
        found = _recorded_descent(capture, learner, state, weights, batch, optimizer.recipe, max_norm, report)
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
        found = _recorded_descents(capture, learner, state, batches, constants, keep, optimizer.recipe, max_norm)
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


def _recorded_descents(
    capture: Capture,
    learner: HasLosses,
    state: State,
    batches: Minibatches,
    constants: tree.Tree,
    keep: Tensor,
    recipe: Recipe,
    max_norm: float | Tensor,
) -> tree.Tree:
    """Where the steps lead. To hold learners back costs time, so it is first hoped that nobody need be."""
    params, axes = state["params"], state["key"].dim()
    weights = Packed.of(params["weights"], axes)
    descend, numbers, tensors = _descend(learner, weights, axes, recipe, max_norm, report=False)
    carried = {
        "flat": weights.flat,
        "moments": state["optimizer"],
        "buffers": params["buffers"],
        "active": state["active"],
    }
    fixed = {
        "params": {**params, "weights": {}, "buffers": {}},
        "batch": batches.batch,
        "constants": constants,
        "settings": tensors,
        "keep": keep,
    }
    each = {} if batches.order is None else {"index": batches.order}

    def follow(held: bool) -> tree.Tree:
        name = ("gradient steps", held, *weights, recipe.make, *numbers.items())
        return capture.scan(name, _one_of_many(descend, held), carried, fixed, each, batches.count)[0]

    if bool((state["active"] & keep).all()):
        found = follow(held=False)
        if bool(found["active"].all()):
            return found
    return follow(held=True)


def _one_of_many(descend: Callable[[tree.Tree], tree.Tree], held: bool) -> Callable[[tree.Tree], tree.Tree]:
    """A step for `Capture.scan`; where learners are `held` back, those that are not to move keep what they had."""

    def call(inputs: tree.Tree) -> tree.Tree:
        old, given = inputs["carried"], inputs["fixed"]
        batch = {**pick(given["batch"], inputs["each"].get("index")), **given["constants"]}
        seen = {**given["params"], "buffers": old["buffers"]}
        now = {"params": seen, "batch": batch, "settings": given["settings"]}
        found = descend({**now, "flat": old["flat"], "moments": old["moments"]})
        active = old["active"] & found["finite"]
        new = {"flat": found["flat"], "moments": found["moments"]}
        new["buffers"] = {**old["buffers"], **found["buffers"]}
        if held:
            new = select(active & given["keep"], new, {name: old[name] for name in new})
        return {"carried": {**new, "active": active}, "row": {}}

    return call


def _descend(
    learner: HasLosses, weights: Packed, axes: int, recipe: Recipe, max_norm: float | Tensor, report: bool
) -> tuple[Callable[[tree.Tree], tree.Tree], dict[str, Any], dict[str, Tensor]]:
    """`_descent` where there are no methods and no key, as a function of tensors alone; the optimizer's settings that
    are numbers, and those that are among the tensors."""
    settings = {**recipe.settings, "max_norm": max_norm}
    tensors = {name: value for name, value in settings.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in settings.items() if name not in tensors}

    def descend(inputs: tree.Tree) -> tree.Tree:
        given = {**numbers, **inputs["settings"]}
        max_norm = given.pop("max_norm")
        seen = {**inputs["params"], "weights": Packed.view(inputs["flat"], weights, axes)}
        found = _losses_and_gradient(learner, seen, inputs["batch"], report)
        gradient, optimizer = found.pop("gradient"), recipe.make(**given)
        return {**found, **_move(inputs["flat"], inputs["moments"], gradient, max_norm, axes, optimizer)}

    return descend, numbers, tensors


def _recorded_descent(
    capture: Capture,
    learner: HasLosses,
    state: State,
    weights: Packed,
    batch: tree.Tree,
    recipe: Recipe,
    max_norm: float | Tensor,
    report: bool,
) -> tree.Tree:
    """`_descent` where there are no methods and no key, for `capture` to replay."""
    descend, numbers, tensors = _descend(learner, weights, state["key"].dim(), recipe, max_norm, report)
    inputs = {
        "params": {**state["params"], "weights": {}},
        "batch": batch,
        "flat": weights.flat,
        "moments": state["optimizer"],
        "settings": tensors,
    }
    return capture(("a gradient step", report, *weights, recipe.make, *numbers.items()), descend, inputs)


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
    found = _gradients(learner, state, batch, methods, ctx)
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
        return {**found, **_move(weights.flat, state["optimizer"], total, max_norm, axes, optimizer, frozen)}


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


def method_key(state: State, method: Method) -> Tensor:
    """The random key `[*L]` of a method in this step: adding a method changes no other consumer's numbers."""
    return random.fold(random.fold(state["key"], f"method/{method.name}"), state["count"]["gradient_steps"])


def _leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum(0) if len(losses) > 1 else next(iter(losses.values()))


def _losses_and_gradient(learner: HasLosses, p: Params, batch: tree.Tree, report: bool) -> tree.Tree:
    """What `_gradients` finds where there are no methods and no key: a pure function of tensors."""
    leaves, ctx = _leaves(p["weights"]), StepContext(training=True, report=report)
    with torch.enable_grad():
        losses = learner.losses({**p, "weights": leaves}, batch, ctx)
        total = _total(losses)
    return {**_found(losses, ctx), "gradient": _gradient(total, leaves)}


def _gradients(
    learner: HasLosses, state: State, batch: tree.Tree, methods: Sequence[Method], ctx: StepContext
) -> dict[str, Any]:
    """The packed `gradient` of the losses, the methods' `penalty`, the parameters `seen`, `reported`, `buffers`."""
    params, memories, task = state["params"], state.get("methods", {}), state.get("task", {})
    leaves = _leaves(params["weights"])
    seen = {**params, "weights": leaves}
    for method in methods:
        seen = method.params(seen, memories[method.name], task)
        seen = {**seen, "weights": in_order(seen["weights"], leaves)}
    losses = learner.losses(seen, batch, ctx)
    total = _total(losses)
    extra = _further_losses(learner, state, seen, batch, methods, ctx, total)
    gradient = _gradient(total, leaves, retain_graph=bool(extra))
    penalty = {"penalty": _gradient(torch.stack(extra).sum(0), leaves)} if extra else {}
    return {**_found(losses, ctx), "gradient": gradient, **penalty, "seen": seen}


def _further_losses(
    learner: HasLosses,
    state: State,
    seen: Params,
    batch: tree.Tree,
    methods: Sequence[Method],
    ctx: StepContext,
    like: Tensor,
) -> list[Tensor]:
    """What the methods add to the losses, `[*L]` each like the losses: of further minibatches, then their own."""
    found: list[Tensor] = []
    for method in methods:
        memory, task = state["methods"][method.name], state["task"]
        quiet = StepContext(training=True, key=ctx.key, report=False)
        given = method.batches(learner, seen, memory, batch, task, method_key(state, method))
        for further, weight in hooks.further_batches(method, given):
            found.append(weight * _total(learner.losses(seen, further, quiet)))
        own = method.loss(learner, seen, memory, batch, task)
        if own is not None:
            found.append(hooks.further_loss(method, own, like))
    return found


def _found(losses: dict[str, Tensor], ctx: StepContext) -> dict[str, dict[str, Tensor]]:
    values = {**losses, **ctx.info} if ctx.report else {}
    return {"reported": {name: value.detach() for name, value in values.items()}, "buffers": dict(ctx.new_buffers)}


def _gradient(loss: Tensor, leaves: dict[str, Tensor], retain_graph: bool = False) -> Tensor:
    """The gradient of a loss `[*L]` of named weights, packed `[*L, P]`."""
    found = torch.autograd.grad(
        loss.sum(),  # for a sum torch.autograd need not import a second of symbolic mathematics
        list(leaves.values()),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([gradient.reshape(*loss.shape, -1) for gradient in found], -1)


def reset_optimizer(state: State) -> State:
    """The optimizer's moments as at the start of a run: every one of them starts at zero."""
    return {**state, "optimizer": tree.map(torch.zeros_like, state["optimizer"])}


def init_optimizer(optimizer: Optimizer, state: State) -> State:
    """The optimizer's moments for the packed weights of a state."""
    packed = Packed.of(state["params"]["weights"], state["key"].dim())
    return optimizer.init({"weights": packed.flat}, state["key"].shape)


def _move(
    flat: Tensor,
    moments: State,
    gradient: Tensor,
    max_norm: float | Tensor,
    axes: int,
    optimizer: Optimizer,
    frozen: Tensor | None = None,
) -> tree.Tree:
    """Clip, then the optimizer's move; frozen entries, and the moments under them, are written back."""
    clipped, norm = clip_by_norm({"weights": gradient}, max_norm, axes)
    updates, new_moments = optimizer.update(clipped, moments, {"weights": flat})
    new_flat = apply_updates({"weights": flat}, updates)["weights"]
    if frozen is not None:
        new_flat = torch.where(frozen, flat, new_flat)
        new_moments = tree.map(
            lambda new: new.masked_fill(frozen, 0.0) if new.shape == flat.shape else new, new_moments
        )
    finite = torch.isfinite(norm + new_flat.sum(-1))  # one not finite entry makes the sum so
    return {"flat": new_flat, "moments": new_moments, "norm": norm, "finite": finite}


def _union(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    return torch.stack(present).any(0)
