"""Gradient steps without lifelong methods, as functions of tensors alone that are recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import tree
from rlmeta.functional.optim import Recipe
from rlmeta.functional.packed import Packed
from rlmeta.learning.gradients import HasLosses, losses_and_gradient
from rlmeta.learning.minibatch import Minibatches, pick
from rlmeta.learning.optimizer_state import move
from rlmeta.learning.state import State, select


def recorded_descents(
    capture: Capture,
    learner: HasLosses,
    state: State,
    batches: Minibatches,
    constants: tree.Tree,
    keep: Tensor,
    recipe: Recipe,
    max_norm: float | Tensor,
) -> tree.Tree:
    """Several recorded gradient steps: the weights, moments and buffers after them, and which learners are finite.

    To hold back learners that stop costs time, so the steps are taken without first, and again where one stopped.
    """
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
    """A gradient step without methods and key, as a function of tensors alone; the optimizer's settings that are
    numbers, and those that are among the tensors."""
    settings = {**recipe.settings, "max_norm": max_norm}
    tensors = {name: value for name, value in settings.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in settings.items() if name not in tensors}

    def descend(inputs: tree.Tree) -> tree.Tree:
        given = {**numbers, **inputs["settings"]}
        max_norm = given.pop("max_norm")
        seen = {**inputs["params"], "weights": Packed.view(inputs["flat"], weights, axes)}
        found = losses_and_gradient(learner, seen, inputs["batch"], report)
        gradient, optimizer = found.pop("gradient"), recipe.make(**given)
        return {**found, **move(inputs["flat"], inputs["moments"], gradient, max_norm, axes, optimizer)}

    return descend, numbers, tensors


def recorded_descent(
    capture: Capture,
    learner: HasLosses,
    state: State,
    weights: Packed,
    batch: tree.Tree,
    recipe: Recipe,
    max_norm: float | Tensor,
    report: bool,
) -> tree.Tree:
    """A gradient step where there are no methods and no key, for `capture` to replay."""
    descend, numbers, tensors = _descend(learner, weights, state["key"].dim(), recipe, max_norm, report)
    inputs = {
        "params": {**state["params"], "weights": {}},
        "batch": batch,
        "flat": weights.flat,
        "moments": state["optimizer"],
        "settings": tensors,
    }
    return capture(("a gradient step", report, *weights, recipe.make, *numbers.items()), descend, inputs)
