"""Recorded gradient steps: functions of tensors alone, for the engine to record and replay."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.descent import descend
from rlmeta.learning.gradients import HasLosses, StepContext
from rlmeta.learning.groups import Group, moving
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import pick
from rlmeta.learning.state import State, select
from rlmeta.learning.targets import Copy, moved


class Source(Protocol):
    """Source of minibatches that depend on the steps before, such as a prioritised replay memory.

    Equal ones hash alike. Both methods are pure functions of tensors: `now` is what the steps change, `fixed` what they
    do not.
    """

    def draw(self, now: tree.Tree, fixed: tree.Tree, key: Tensor) -> tree.Tree:
        """Draw a minibatch `[*L, B, ...]`; the key is `[*L]`."""
        ...

    def update(self, now: tree.Tree, fixed: tree.Tree, batch: tree.Tree, errors: Tensor) -> tree.Tree:
        """What has changed after a step on a minibatch whose samples had errors of these sizes, `[*L, B]`."""
        ...


class Steps(NamedTuple):
    """Several gradient steps, to be recorded as one program."""

    batch: tree.Tree
    """Samples `[*L, M, ...]`, from which `each["index"]` selects minibatches; all samples without an index."""
    constants: tree.Tree
    """Further entries of every minibatch, every leaf `[*L, ...]`."""
    each: tree.Tree
    """Inputs of each step, every leaf `[number, ...]`: `index` or `batch` (none with a source), `key`, the copies'
    `rates`."""
    number: int
    """Number of steps; a multiple of the cycle's length."""
    cycle: tuple[tuple[Group, ...], ...]
    """Groups to update in the first step, the second, ..., and again from the start."""
    copies: tuple[Copy, ...] = ()
    """Target networks to update after every step."""
    keep: Tensor | None = None
    """Mask `[*L]` of the learners to update; None for all."""
    report: bool = False
    """Whether the last step of every cycle computes metrics."""
    methods: tuple[Method, ...] = ()
    """Lifelong methods, in order."""
    source: Source | None = None
    """Source of the minibatches, if they depend on the steps before; its `fixed` is `batch`, its `now` the state's
    `source`."""


def recorded_descents(
    capture: Capture, learner: HasLosses, state: State, work: Steps
) -> tuple[State, dict[str, Tensor]]:
    """Take several recorded gradient steps; returns the new state and their metrics, `[cycles, *L]` each.

    To hold back learners that stop costs time, so the steps are taken without first, and again where one stopped.
    """
    params, axes = state["params"], state["key"].dim()
    weights = Packed.of(params["weights"], axes)
    descents = [
        _descent(learner, weights, axes, groups, work.methods, work.report and number == len(work.cycle) - 1)
        for number, groups in enumerate(work.cycle)
    ]
    carried = {
        "flat": weights.flat,
        "moments": state["optimizer"],
        "buffers": params["buffers"],
        "active": state["active"],
        "methods": {method.name: state["methods"][method.name] for method in work.methods},
        "count": {"gradient_steps": state["count"]["gradient_steps"]} if work.methods else {},
        "source": {} if work.source is None else state["source"],
    }
    keep = torch.ones_like(state["active"]) if work.keep is None else work.keep
    fixed = {
        "params": {**params, "weights": {}, "buffers": {}},
        "batch": work.batch,
        "constants": work.constants,
        "settings": {str(number): descent.tensors for number, descent in enumerate(descents)},
        "keep": keep,
        "stream": {name: state[name] for name in ("task", "key") if work.methods},
    }
    length = len(work.cycle)
    each = work.each if length == 1 else tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), work.each)
    name = ("gradient steps", *weights, work.copies, work.source, *(descent.name for descent in descents))

    def follow(held: bool) -> tuple[tree.Tree, tree.Tree]:
        body = _cycle(descents, weights, axes, work, held)
        return capture.scan((*name, held), body, carried, fixed, each, work.number // length)

    everyone = bool((state["active"] & keep).all())
    last, reports = follow(held=not everyone)
    if everyone and not bool(last["active"].all()):
        last, reports = follow(held=True)
    new = {"weights": Packed.view(last["flat"], weights, axes), "buffers": last["buffers"]}
    state["params"] = {**params, **new}
    state["active"], state["optimizer"] = last["active"], last["moments"]
    if work.methods:
        state["methods"] = {**state["methods"], **last["methods"]}
    if work.source is not None:
        state["source"] = last["source"]
    return state, reports


class _Descent(NamedTuple):
    """Gradient step as a function of tensors alone."""

    call: Callable[[tree.Tree], tree.Tree]
    tensors: dict[str, dict[str, Tensor]]
    """Tensor settings of every group's optimizer."""
    name: Hashable
    """Name of the recorded program, with the settings that are numbers."""


def _cycle(
    descents: Sequence[_Descent], weights: Packed, axes: int, work: Steps, held: bool
) -> Callable[[tree.Tree], tree.Tree]:
    """Build the steps for `Capture.scan`; learners that are `held` back keep their tensors."""

    def single(number: int, old: tree.Tree, fixed: tree.Tree, each: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
        if work.source is not None:
            batch = work.source.draw(old["source"], fixed["batch"], each["key"])
        else:
            batch = each["batch"] if "batch" in each else pick(fixed["batch"], each.get("index"))
        now = {
            "params": {**fixed["params"], "buffers": old["buffers"]},
            "batch": {**batch, **fixed["constants"]},
            "settings": fixed["settings"][str(number)],
            "flat": old["flat"],
            "moments": old["moments"],
            "stream": {**fixed["stream"], "methods": old["methods"], "count": old["count"]},
            **({"key": each["key"]} if "key" in each else {}),
        }
        outputs = descents[number].call(now)
        active = old["active"] & outputs["finite"]
        buffers = {**old["buffers"], **outputs["buffers"]}
        for copy in work.copies:
            online = Packed.view(outputs["flat"], weights, axes)
            buffers = {**buffers, **moved(copy, each["rates"][copy.name], online, buffers)}
        new = {
            "flat": outputs["flat"],
            "moments": outputs["moments"],
            "buffers": buffers,
            "methods": outputs["memories"],
            "source": {},
        }
        if work.source is not None:
            new["source"] = work.source.update(old["source"], fixed["batch"], batch, outputs["errors"]["size"])
        if held:
            new = select(active & fixed["keep"], new, {name: old[name] for name in new})
        return {**new, "active": active, "count": tree.map(lambda x: x + 1, old["count"])}, _reported(outputs)

    def call(inputs: tree.Tree) -> tree.Tree:
        carried = inputs["carried"]
        report: tree.Tree = {}
        for number in range(len(descents)):
            each = inputs["each"]
            each = each if len(descents) == 1 else tree.map(lambda x: x[number], each)  # noqa: B023 - used at once
            carried, report = single(number, carried, inputs["fixed"], each)
        return {"carried": carried, "row": report}

    return call


def _reported(outputs: tree.Tree) -> dict[str, Tensor]:
    return {**outputs["reported"], "losses/grad_norm": outputs["norm"]} if outputs["reported"] else {}


def _descent(
    learner: HasLosses,
    weights: Packed,
    axes: int,
    groups: Sequence[Group],
    methods: Sequence[Method],
    report: bool,
) -> _Descent:
    """Build a gradient step, with its settings as an argument."""
    tensors: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for group in groups:
        recipe = group.optimizer.recipe
        settings = {**({} if recipe is None else recipe.settings), "max_norm": group.max_norm}
        tensors[group.name] = {name: value for name, value in settings.items() if isinstance(value, Tensor)}
        numbers[group.name] = {name: value for name, value in settings.items() if not isinstance(value, Tensor)}

    def call(inputs: tree.Tree) -> tree.Tree:
        now = [_with_settings(group, {**numbers[group.name], **inputs["settings"][group.name]}) for group in groups]
        state = {
            **inputs["stream"],
            "params": {**inputs["params"], "weights": Packed.view(inputs["flat"], weights, axes)},
            "optimizer": inputs["moments"],
        }
        ctx = StepContext(training=True, key=inputs.get("key"), report=report, moving=moving(now))
        return descend(learner, state, inputs["batch"], now, methods, ctx, axes)

    apart = [
        (group.name, group.weights, group.losses, _recipe(group), *numbers[group.name].items()) for group in groups
    ]
    bound = tuple(method.after_step for method in methods)  # two are equal where they are of the same object
    return _Descent(call, tensors, (report, bound, *apart))


def _recipe(group: Group) -> Any:
    """What makes a group's optimizer of its settings; the optimizer itself where it does not follow from settings."""
    return group.optimizer if group.optimizer.recipe is None else group.optimizer.recipe.make


def _with_settings(group: Group, settings: dict[str, Any]) -> Group:
    """Replace the settings of a group's optimizer, and its bound on the gradient norm."""
    settings = dict(settings)
    max_norm = settings.pop("max_norm")
    optimizer = group.optimizer if group.optimizer.recipe is None else _recipe(group)(**settings)
    return group._replace(optimizer=optimizer, max_norm=max_norm)


def recorded_descent(
    capture: Capture,
    learner: HasLosses,
    state: State,
    weights: Packed,
    batch: tree.Tree,
    groups: Sequence[Group],
    methods: Sequence[Method],
    key: Tensor | None,
    report: bool,
) -> tree.Tree:
    """Take a gradient step as `descend` does, recorded and replayed."""
    descent = _descent(learner, weights, state["key"].dim(), groups, methods, report)
    inputs = {
        "params": {**state["params"], "weights": {}},
        "batch": batch,
        "flat": weights.flat,
        "moments": state["optimizer"],
        "settings": descent.tensors,
        "stream": {
            **{name: state[name] for name in ("methods", "task", "key") if methods},
            "count": {"gradient_steps": state["count"]["gradient_steps"]} if methods else {},
        },
        **({"key": key} if key is not None else {}),
    }
    return capture(("a gradient step", *weights, descent.name), descent.call, inputs)
