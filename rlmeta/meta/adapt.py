"""Inner loop of meta-learning: differentiable steps of any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, require_choice, require_count
from rlmeta.functional.optim import Optimizer, State, Tensors, apply_updates
from rlmeta.nn.product import plain_graph

Loss: TypeAlias = Callable[[Tensors, int], Tensor]
"""Function from weights `{name: [*L, ...]}` and the number of the inner step to a loss `[*L]`."""

Order: TypeAlias = Literal["second", "first", "none"]
"""Order of the outer gradient: second; first, with inner gradients as constants; or none, without a graph."""


class Adapted(NamedTuple):
    """Result of the inner loop: adapted weights, the state of the optimizer and the losses."""

    weights: Tensors
    """Weights after the last step, `{name: [*L, ...]}`."""
    state: State
    """State of the optimizer, to go on from; empty if there was no step."""
    losses: list[Tensor]
    """Loss before each step, `[*L]`."""


def adapt(
    loss: Loss,
    weights: Tensors,
    optimizer: Optimizer,
    steps: int,
    *,
    order: Order = "second",
    state: State | None = None,
) -> Adapted:
    """Take `steps` steps of the optimizer on the loss: w ← w + update(∇ loss(w)), for all learners at once.

    Tasks are learners: weights `[*L, K, ...]` adapt to K tasks in one go. Nothing that is passed in is changed. A
    module's frozen parameter (an `nn.Parameter` with `requires_grad=False`) reaches the loss and stays as it is.

    Args:
        loss: see `Loss`; learners share no weight, so each gets the gradient of its own.
        weights: where to start, `{name: [*L, ...]}`.
        optimizer: of `functional.optim`, or a learned one.
        steps: how many.
        order: see `Order`. "first" is what first-order MAML does; "none" keeps no graph from step to step, so that
            memory does not grow with the steps.
        state: of the optimizer; None for a fresh one.

    Raises:
        SettingError: the loss does not depend on the weights, or steps is no whole number from 0 on.
    """
    require_choice("order", order, Order)
    require_count("steps", steps, 0)
    names = list(weights)
    frozen = {n: w for n, w in weights.items() if isinstance(w, nn.Parameter) and not w.requires_grad}
    weights = {n: w for n, w in weights.items() if n not in frozen}
    losses: list[Tensor] = []
    with torch.enable_grad():
        for step in range(steps):
            weights = weights if order != "none" else {name: weight.detach() for name, weight in weights.items()}
            leaves = {n: w if w.requires_grad else w.detach().requires_grad_() for n, w in weights.items()}
            with plain_graph() if order == "second" else nullcontext():
                value = loss({**frozen, **leaves}, step)
            gradients = inner_gradient(value, leaves, order)
            state = optimizer.init(weights, value.shape) if state is None else state
            with torch.set_grad_enabled(order != "none"):
                updates, state = optimizer.update(gradients, state, leaves)
                weights = apply_updates(leaves, updates)
            losses.append(value.detach() if order == "none" else value)
    if order == "none":
        weights = {name: weight.detach() for name, weight in weights.items()}
    adapted = {**frozen, **weights}
    return Adapted({name: adapted[name] for name in names}, state or {}, losses)


def inner_gradient(loss: Tensor, weights: Tensors, order: Order = "second") -> Tensors:
    """Gradient of a loss `[*L]` with respect to each weight `[*L, ...]`; zero for those it does not depend on.

    Raises:
        SettingError: it depends on none of them.
    """
    require_choice("order", order, Order)
    if not loss.requires_grad:
        raise SettingError(
            "the inner loss does not depend on the weights it was given: compute it from them, without detach or item"
        )
    gradients = torch.autograd.grad(
        loss,
        list(weights.values()),
        torch.ones_like(loss),
        create_graph=order == "second",
        retain_graph=order != "none",
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(weights, gradients))


def expand_tasks(tensors: Tensors, learner_axes: int, tasks: int) -> Tensors:
    """Expand tensors `{name: [*L, ...]}` to tasks, `{name: [*L, K, ...]}`: each starts from its learner's.

    A view: the gradient of the original is the sum over tasks.
    """
    return {
        name: value.unsqueeze(learner_axes).expand(
            *value.shape[:learner_axes], tasks, *(-1,) * (value.dim() - learner_axes)
        )
        for name, value in tensors.items()
    }
