"""Gradients of a learner's losses, and of the penalties of lifelong methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.functional import random, tree
from rlmeta.functional.packed import in_order
from rlmeta.learning import hooks
from rlmeta.learning.groups import Group
from rlmeta.learning.method import Method
from rlmeta.learning.state import Params, State
from rlmeta.nn import Context


@dataclass(slots=True)
class StepContext(Context):
    """Context of the forward passes of a gradient step.

    Attributes:
        report: whether diagnostics are wanted; computing them for every minibatch would cost as much as a small loss.
        info: where they go, `{name: [*L]}`.
        moving: None where every loss is differentiated, or the names of the groups that move: a loss that only others
            need may be left out.
        errors: where the learner puts the size of every sample's error, `[*L, B]`, for a prioritised replay memory.
    """

    report: bool = True
    info: dict[str, Tensor] = field(default_factory=dict)
    moving: frozenset[str] | None = None
    errors: Tensor | None = None

    def moves(self, group: str) -> bool:
        """Whether a group's losses are differentiated."""
        return self.moving is None or group in self.moving


class HasLosses(Protocol):
    """Protocol of learners that `step` can train: `losses`."""

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Compute the losses `{group: [*L]}` of a minibatch `[*L, B, ...]`; diagnostics go into `ctx.info`."""
        ...


def _leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def all_gradients(
    learner: HasLosses,
    state: State,
    batch: tree.Tree,
    groups: Sequence[Group],
    methods: Sequence[Method],
    ctx: StepContext,
) -> dict[str, Any]:
    """Compute the gradients of the losses and of the methods' penalties: a pure function of tensors if the hooks are.

    Args:
        learner: gives the losses.
        state: its `params`, and where there are methods `methods`, `task`, `key` and `count`.
        batch: a minibatch `[*L, B, ...]`.
        groups: whose losses are differentiated.
        methods: lifelong methods, in order.
        ctx: of the learner's own losses.

    Returns:
        `gradients` by group, `reported` values, new `buffers` and the samples' `errors`; with methods the parameters as
        they are through them, and the `penalties`' gradients by group where they add losses.
    """
    params = state["params"]
    leaves = _leaves(params["weights"])
    effective = {**params, "weights": leaves}
    with torch.enable_grad():
        for method in methods:
            effective = method.params(learner, effective, state["methods"][method.name], state["task"])
            effective = {**effective, "weights": in_order(effective["weights"], leaves)}
        own = batch
        for method in methods:
            value = method.batch(learner, effective, state["methods"][method.name], own, state["task"])
            own = hooks.own_batch(method, value)
        losses = learner.losses(effective, own, ctx)
        totals = [group.total(losses) for group in groups]
        extra = _further_losses(learner, state, effective, batch, groups, methods, ctx, totals[0])
        added = [torch.stack([losses[number] for losses in extra]).sum(0) for number in range(len(groups)) if extra]
    outputs = {**_outputs(losses, ctx), "gradients": _gradients(totals, groups, leaves, retain_graph=bool(extra))}
    if methods:
        outputs["seen"] = effective
    if extra:
        outputs["penalties"] = _gradients(added, groups, leaves)
    return outputs


def _further_losses(
    learner: HasLosses,
    state: State,
    seen: Params,
    batch: tree.Tree,
    groups: Sequence[Group],
    methods: Sequence[Method],
    ctx: StepContext,
    like: Tensor,
) -> list[list[Tensor]]:
    """Penalties of the lifelong methods for every group, `[*L]`: losses of further minibatches, then their own."""
    further: list[list[Tensor]] = []
    for method in methods:
        memory, task, key = state["methods"][method.name], state["task"], method_key(state, method)
        quiet = StepContext(training=True, key=ctx.key, report=False, moving=ctx.moving)
        replayed = method.batches(learner, seen, memory, batch, task, key)
        for more, weight in hooks.further_batches(method, replayed):
            losses = learner.losses(seen, more, quiet)
            further.append([weight * group.total(losses) for group in groups])
        own = method.loss(learner, seen, memory, batch, task, key)
        if own is not None:
            further.append([hooks.further_loss(method, own, like)] * len(groups))
    return further


def _outputs(losses: dict[str, Tensor], ctx: StepContext) -> dict[str, dict[str, Tensor]]:
    values = {**losses, **ctx.info} if ctx.report else {}
    return {
        "reported": {name: value.detach() for name, value in values.items()},
        "buffers": dict(ctx.new_buffers),
        "errors": {} if ctx.errors is None else {"size": ctx.errors.detach()},
    }


def _gradients(
    totals: Sequence[Tensor], groups: Sequence[Group], leaves: dict[str, Tensor], retain_graph: bool = False
) -> dict[str, Tensor]:
    """Differentiate every group's loss `[*L]` with respect to its own weights, packed `[*L, G]`."""
    gradients = {}
    for number, (total, group) in enumerate(zip(totals, groups)):
        own = torch.autograd.grad(
            total.sum(),  # for a sum torch.autograd need not import a second of symbolic mathematics
            [leaves[name] for name in group.own(leaves)],
            retain_graph=retain_graph or number + 1 < len(groups),
            allow_unused=True,
            materialize_grads=True,
        )
        gradients[group.name] = torch.cat([gradient.reshape(*total.shape, -1) for gradient in own], -1)
    return gradients


def method_key(state: State, method: Method) -> Tensor:
    """Random key `[*L]` of a method in this step: adding a method changes no other consumer's numbers."""
    return random.fold(random.fold(state["key"], f"method/{method.name}"), state["count"]["gradient_steps"])
