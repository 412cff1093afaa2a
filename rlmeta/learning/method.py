"""Base class of lifelong methods: hooks into tasks, phases and every gradient step of every learner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.state import Params, State

Memory = State
"""A method's own memory: a nested dictionary of tensors that start with `*L`, kept in `state["methods"]`. Its shapes
never change in a run: what grows with the tasks is made for `learner.num_tasks` of them."""

Task = dict[str, Tensor]
"""Current task, as tensors `[*L]`: `index` (its place in the stream, int64), `identity` (which one, int64; differs
from learner to learner where their orders do), `progress` (the fraction of its phase that is done, float64), `phase`
(int64: -1 in evaluation, 0 in training, k + 1 in a phase of the learner's method k; see `learning.phases`).

It says what the stream reveals and nothing else. In training `index` is -1 where boundaries are hidden (and `progress`
then of the whole run), `identity` is -1 where "train_id" is; in evaluation both are -1 where "test_id" is."""

Draw = Callable[[int], tree.Tree]
"""Sampling function: `draw(n)` gives n samples `[*L, n, ...]` of the task that has just ended."""


class Gradients(NamedTuple):
    """Gradients for the `grads` hook, of the losses and in total, `[*L, P]` over the packed weights."""

    task: Tensor
    """Gradient of the learner's own losses alone; to read."""
    total: Tensor
    """Gradient of everything added up so far; a method returns a changed one."""


class StepInfo(NamedTuple):
    """Data of the `after_step` hook."""

    gradient: Tensor
    """Gradient of the task's loss, `[*L, P]`."""
    delta: Tensor
    """Change of the weights in the step, `[*L, P]`: after clipping, the optimizer and the frozen entries."""
    batch: tree.Tree
    """The minibatch of the step."""
    before: Params
    """Effective parameters of its losses, from before the step."""


class Learned(NamedTuple):
    """Result of the `learn` hook."""

    memory: Memory
    """The method's memory after the step."""
    active: Tensor
    """Whether each learner goes on, `[*L]`; False stops it, as its loss is not finite."""
    reports: dict[str, Tensor]
    """Metrics of the step, `[*L]` each."""


class Method:
    """Base class of lifelong methods; override the hooks it needs. Hooks return changes and never write in place.

    Where a stream hides its boundaries there are no tasks and no phases: `phases`, `task_start`, `phase_start` and
    `task_end` are not called.

    `p` is the state's params, `m` the method's own memory, `task` which task it is, `key` `[*L]` its own random key,
    another one in every step.
    """

    name: str = "method"
    needs: frozenset[str] = frozenset()
    """Information that a stream must reveal: some of `boundaries`, `train_id`, `test_id`."""
    recordable: bool = False
    """Whether the hooks of a gradient step (`params`, `batch`, `batches`, `loss`, `grads`, `frozen`, `after_step`)
    depend on the tensors that they are handed, and on settings, alone: then whole steps are recorded and replayed
    without Python. It is to stand in the method's own class, for a class derived from it may do anything."""

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory of the method."""
        return {}

    def phases(self, iterations: int) -> Sequence[tuple[str, int]]:
        """Training phases (name, iterations) that follow `("train", iterations)` in every task."""
        return ()

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """Hook before the first step on a task."""
        return p, m

    def phase_start(self, learner: Any, p: Params, m: Memory, task: Task, phase: str) -> tuple[Params, Memory]:
        """Hook before the first step of a phase, "train" or one of any method's."""
        return p, m

    def learn(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, active: Tensor) -> Learned | None:
        """Train the method's own module (see `learning.owners`) for a step in one of its phases.

        The learner stays as it is then; None for a step of the learner's.

        `batch` `[*L, B, ...]` are labelled samples, or all steps of an agent's rollout (with a memory whole sequences
        `[*L, B, T, ...]`), as `draw` gives them.
        """
        return None

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Hook after the last step on a task."""
        return p, m

    def params(self, learner: Any, p: Params, m: Memory, task: Task) -> Params:
        """Effective parameters of every forward pass, in training and evaluation."""
        return p

    def batch(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task) -> tree.Tree:
        """Minibatch for the learner's own loss; the other hooks get the original one."""
        return batch

    def batches(
        self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor
    ) -> Sequence[tuple[tree.Tree, float | Tensor]]:
        """Further minibatches (replay), and the weight `[*L]` of their losses beside the learner's own."""
        return ()

    def loss(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor) -> Tensor | None:
        """Penalty: a further loss `[*L]`, or None."""
        return None

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """Gradient penalty or projection: the new total gradient `[*L, P]`."""
        return gradients.total

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """Mask `[*L, P]` (bool) of frozen entries, which stay bit-identical in the step, or None."""
        return None

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Hook after a gradient step; returns the new memory."""
        return m

    def predict(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task) -> Tensor | None:
        """Prediction rule in evaluation: logits `[*L, B, C]` that replace the learner's own, or None."""
        return None


def recordable(method: Method) -> bool:
    """Whether the method's own class declares `recordable = True`: its hooks are functions of tensors."""
    return vars(type(method)).get("recordable", False) is True


def effective_params(learner: Any, state: State, task: Task | None = None) -> Params:
    """Effective parameters: the weights after the methods' hooks; `task` is the state's own by default.

    Where a method has a decision rule of its own, `memories` and `task` come with them.
    """
    p: Params = state["params"]
    task = state["task"] if task is None else task
    for method in learner.methods:
        p = method.params(learner, p, state["methods"][method.name], task)
    if any(type(method).predict is not Method.predict for method in learner.methods):
        p = {**p, "memories": state["methods"], "task": task}
    return p


def checked_methods(value: Any) -> tuple[Method, ...]:
    """Validate a user's list of lifelong methods.

    Raises:
        SettingError: not a list of methods.
    """
    if isinstance(value, Method) or (isinstance(value, type) and issubclass(value, Method)):
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        raise SettingError(f"lifelong is {name}, expected a list of methods: [{name}()]")
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingError(f"lifelong is {value!r}, expected a list of methods such as [EWC()]")
    methods = tuple(value)
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise SettingError(
                f"lifelong has the class {method.__name__}, expected a method of it: {method.__name__}()"
            )
        if not isinstance(method, Method):
            raise SettingError(f"lifelong has {method!r}, expected methods such as [EWC()]")
    return methods


def check_needs(methods: Sequence[Method], reveals: frozenset[str], stream: str) -> None:
    """Check that the stream reveals everything that the methods need.

    Raises:
        SettingError: also where two methods have one name.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise SettingError(f"lifelong methods repeat: {', '.join(names)}; each keeps one memory, give it once")
    for method in methods:
        require_revealed(method, method.needs, reveals, f"the stream {stream!r}")


def require_revealed(method: Method, needs: frozenset[str], reveals: frozenset[str], stream: str) -> None:
    """Check that a stream gives a method the task boundaries and task identities that it needs.

    Raises:
        SettingError: with what to do.
    """
    words = {
        "boundaries": "when a task ends",
        "train_id": "which task it trains on",
        "test_id": "which task it is tested on",
    }
    for need in sorted(needs - reveals):
        raise SettingError(
            f"{method.name} needs to know {words[need]}, which {stream} hides: choose a stream or scenario that "
            f"reveals {need!r}, or another method"
        )


def method_classes(names: Mapping[str, Any]) -> tuple[type[Method], ...]:
    """Select the lifelong methods among a package's names."""
    classes = [value for value in names.values() if isinstance(value, type)]
    return tuple(cls for cls in classes if issubclass(cls, Method) and cls is not Method)
