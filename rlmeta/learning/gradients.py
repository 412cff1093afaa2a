"""Gradients of a learner's losses, and of what lifelong methods add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.functional import random, tree
from rlmeta.functional.packed import in_order
from rlmeta.learning import hooks
from rlmeta.learning.method import Method
from rlmeta.learning.state import Params, State
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


def _leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum(0) if len(losses) > 1 else next(iter(losses.values()))


def losses_and_gradient(learner: HasLosses, p: Params, batch: tree.Tree, report: bool) -> tree.Tree:
    """What `all_gradients` finds where there are no methods and no key: a pure function of tensors."""
    leaves, ctx = _leaves(p["weights"]), StepContext(training=True, report=report)
    with torch.enable_grad():
        losses = learner.losses({**p, "weights": leaves}, batch, ctx)
        total = _total(losses)
    return {**_found(losses, ctx), "gradient": _gradient(total, leaves)}


def all_gradients(
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


def method_key(state: State, method: Method) -> Tensor:
    """The random key `[*L]` of a method in this step: adding a method changes no other consumer's numbers."""
    return random.fold(random.fold(state["key"], f"method/{method.name}"), state["count"]["gradient_steps"])
