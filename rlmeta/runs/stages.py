"""Stages of training: a single one, or for a stream of tasks the phases of every task in turn.

What a stream hides stays here: methods and learners get a `task` with only what it reveals, and no call at a task
boundary if it hides its boundaries. `identity` in the state is the true task, for the world.

Everything that a stage changes is in the state, as is the number of stages begun, so a run may be killed at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmeta.data.samples import HIDDEN
from rlmeta.envs.streams import TaskStream
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning import hooks
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method, Task, effective_params
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.phases import EVALUATED, TRAINING
from rlmeta.learning.state import State
from rlmeta.runs.experiment import Problem


class Stage(NamedTuple):
    """A stage of training: the iterations from `first` to below `last`."""

    number: int
    """Index of the stage in the run."""
    position: int
    """Index of the task in the order of training."""
    phase: str
    """"train", or a phase that a lifelong method has asked for."""
    whose: int
    """TRAINING, or k + 1 for a phase of method k."""
    first: int
    last: int
    begins_task: bool
    ends_task: bool
    announced: bool
    """Whether the learner and the methods are told that it begins; false if the stream hides its boundaries."""
    span: tuple[int, int]
    """Iterations over which progress goes from 0 to 1: the stage's, or the whole run's without announced boundaries."""

    def progress(self, iteration: int) -> float:
        """Fraction of the span that is done before an iteration, in [0, 1)."""
        begin, end = self.span
        return (iteration - begin) / (end - begin)


def stages_of(problem: Problem, methods: Sequence[Method], iterations: Sequence[int]) -> list[Stage]:
    """Stages of a run; `iterations` are the training iterations on every task, in task order; methods add phases."""
    announced = not isinstance(problem, TaskStream) or "boundaries" in problem.revealed
    stages: list[Stage] = []
    first = 0
    for position, of_training in enumerate(iterations):
        phases = [("train", of_training, TRAINING)]
        if isinstance(problem, TaskStream) and announced:
            for k, method in enumerate(methods):
                phases += [(*phase, k + 1) for phase in hooks.phases(method, method.phases(of_training))]
        for i, (phase, count, whose) in enumerate(phases):
            begins, ends, last = i == 0, i == len(phases) - 1, first + count
            span = (first, last) if announced else (0, sum(iterations))
            stages.append(Stage(len(stages), position, phase, whose, first, last, begins, ends, announced, span))
            first = last
    return stages


def start(state: State, stream: TaskStream) -> State:
    """Add a stream's entries to the state: `stage`, `identity` (the current task) `[*L]`, and the score `matrix`.

    `matrix` `[*L, T + 1, T]` holds the score on the task at position j after training on the first i tasks; NaN until
    it is evaluated.
    """
    tasks, shape = len(stream), state["key"].shape
    matrix = torch.full((*shape, tasks + 1, tasks), torch.nan, dtype=torch.float64, device=state["key"].device)
    zero = torch.zeros_like(state["count"]["iterations"])
    return {**state, "stage": zero, "identity": zero.clone(), "matrix": matrix}


def set_task(state: State, world: Any, stream: TaskStream, orders: Tensor, position: int) -> State:
    """Switch the world and the state to the task at a position of every learner's order `[*L, T]`, for training."""
    identity = orders[..., position].to(state["key"].device)
    world.select(identity)
    index = torch.full_like(identity, position)
    shows = "boundaries" in stream.revealed, "train_id" in stream.revealed
    task = _revealed(state, index, identity, *shows, TRAINING)
    return {**state, "identity": identity, "task": task}


def tested_task(state: State, world: Any, stream: TaskStream, orders: Tensor, position: int) -> Task:
    """Switch a world to the task at a position of every learner's order; returns what evaluation reveals of it."""
    identity = orders[..., position].to(state["key"].device)
    world.select(identity)
    shown = "test_id" in stream.revealed
    return _revealed(state, torch.full_like(identity, position), identity, shown, shown, EVALUATED)


def _revealed(state: State, index: Tensor, identity: Tensor, show_index: bool, show_identity: bool, phase: int) -> Task:
    """The task as learners and methods see it; what the stream hides is HIDDEN."""
    return {
        "index": index if show_index else torch.full_like(index, HIDDEN),
        "identity": identity if show_identity else torch.full_like(identity, HIDDEN),
        "progress": torch.zeros_like(state["progress"]),
        "phase": torch.full_like(index, phase),
    }


def turn_to(
    learner: Learner,
    state: State,
    world: Any,
    stream: TaskStream,
    orders: Tensor,
    position: int,
    announced: bool = True,
) -> State:
    """Switch to the task at a position of every learner's order `[*L, T]`; `announced` or not."""
    state, key = set_task(state, world, stream, orders, position), random.fold(state["key"], "world")
    key = random.fold(key, position) if position else key
    return learner.begin_task(state, world, key) if announced else learner.enter(state, world, key)


def begin(learner: Learner, state: State, world: Any, stream: TaskStream, orders: Tensor, stage: Stage) -> State:
    """Begin a stage: switch to its task if it is the task's first stage, then call the methods' hooks.

    If the stream hides its boundaries, the world changes unannounced. Optimizer moments are reset if the stream says
    so.
    """
    begun = torch.full_like(state["stage"], stage.number + 1)
    if not stage.announced:
        state = turn_to(learner, state, world, stream, orders, stage.position, announced=stage.number == 0)
        hooks.check_effective_params(learner, state)
        return {**state, "stage": begun}
    if stage.begins_task:
        state = turn_to(learner, state, world, stream, orders, stage.position)
        for method in learner.methods:
            state = _changed(state, method, "task_start", method.task_start(learner, *_given(state, method)))
    phase = torch.full_like(state["task"]["phase"], stage.whose)
    state = {**state, "task": {**state["task"], "phase": phase}}
    for method in learner.methods:
        changed = method.phase_start(learner, *_given(state, method), stage.phase)
        state = _changed(state, method, "phase_start", changed)
    hooks.check_effective_params(learner, state)
    return {**(reset_optimizer(state) if stream.restarts else state), "stage": begun}


def end_task(learner: Learner, state: State, world: Any) -> State:
    """Call the methods' `task_end` hooks, in which they consolidate the task: Fisher information, rehearsal samples."""
    for method in learner.methods:
        p, m, task = _given(state, method)
        drawn = state

        def draw(n: int, drawn: State = drawn) -> tree.Tree:
            return learner.draw(drawn, world, n)

        state = _changed(state, method, "task_end", method.task_end(learner, p, m, task, draw))
    return state


def _given(state: State, method: Method) -> tuple[Any, Any, Any]:
    return state["params"], state["methods"][method.name], state["task"]


def _changed(state: State, method: Method, hook: str, change: tuple[Any, Any]) -> State:
    p, m = hooks.changed(method, hook, change, *_given(state, method)[:2])
    p = {**p, "weights": Packed.like(p["weights"], state["params"]["weights"], state["key"].dim())}
    return {**state, "params": p, "methods": {**state["methods"], method.name: m}}


def evaluate_tasks(
    learner: Learner,
    state: State,
    world: Any,
    stream: TaskStream,
    orders: Tensor,
    key: Tensor,
    episodes: int,
    *,
    deterministic: bool = True,
) -> list[Evaluation]:
    """Evaluate on the task at every position of each learner's order; returns a list over positions."""
    evaluations = []
    for position in range(orders.shape[-1]):
        p = effective_params(learner, state, tested_task(state, world, stream, orders, position))
        fresh = random.fold(key, position)
        evaluations.append(learner.evaluate(p, world, fresh, episodes, deterministic=deterministic))
    return evaluations


def score_tasks(
    learner: Learner, state: State, world: Any, stream: TaskStream, orders: Tensor, key: Tensor, episodes: int
) -> Tensor:
    """Mean scores on the task at every position of each learner's order, `[*L, T]`: a row of the score matrix."""
    evaluations = evaluate_tasks(learner, state, world, stream, orders, key, episodes)
    return torch.stack([evaluation.returns.mean(-1) for evaluation in evaluations], -1)
