"""The stages of a run: one for a single problem; for a stream, the phases of every task in turn.

What a stream hides stays here: methods and learners are handed a `task` that says only what it reveals, and where it
hides its boundaries they are told of none. `identity` in the state is which task it really is, for the world.

Everything a stage does is in the state, and which stages have begun too, so a run may be killed anywhere.
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
from rlmeta.learning.method import Method, Task, seen
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.phases import EVALUATED, TRAINING
from rlmeta.learning.state import State
from rlmeta.runs.experiment import Problem


class Stage(NamedTuple):
    """Iterations `first` to below `last` of a run."""

    number: int
    """Of the stage in the run."""
    position: int
    """Of the task in the stream."""
    phase: str
    """"train", or what a lifelong method has asked for."""
    whose: int
    """TRAINING, or k + 1 where method k has asked for it."""
    first: int
    last: int
    begins_task: bool
    ends_task: bool
    announced: bool
    """Whether learner and methods are told that it begins."""
    span: tuple[int, int]
    """The iterations that its progress is of: its own, or those of the whole run where no boundary is announced."""

    def progress(self, iteration: int) -> float:
        """The fraction of its span that is done before this iteration."""
        begin, end = self.span
        return (iteration - begin) / (end - begin)


def stages_of(problem: Problem, methods: Sequence[Method], iterations: Sequence[int]) -> list[Stage]:
    """The stages of a run; `iterations` are those of training on every task, in the order they are met."""
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
    """What a run on a stream keeps besides its learner's state.

    `matrix` `[*L, T + 1, T]`: the score on the task at position j after training up to position i - 1; NaN until then.
    """
    tasks, shape = len(stream), state["key"].shape
    matrix = torch.full((*shape, tasks + 1, tasks), torch.nan, dtype=torch.float64, device=state["key"].device)
    zero = torch.zeros_like(state["count"]["iterations"])
    return {**state, "stage": zero, "identity": zero.clone(), "matrix": matrix}


def set_task(state: State, world: Any, stream: TaskStream, orders: Tensor, position: int) -> State:
    """Set world and learners to train on the task at this position of every learner's order `[*L, T]`."""
    identity = orders[..., position].to(state["key"].device)
    world.select(identity)
    index = torch.full_like(identity, position)
    shows = "boundaries" in stream.revealed, "train_id" in stream.revealed
    told = _told(state, index, identity, *shows, TRAINING)
    return {**state, "identity": identity, "task": told}


def tested_task(state: State, world: Any, stream: TaskStream, orders: Tensor, position: int) -> Task:
    """Set a world to the task at this position of every learner's order; what is told of it in evaluation."""
    identity = orders[..., position].to(state["key"].device)
    world.select(identity)
    told = "test_id" in stream.revealed
    return _told(state, torch.full_like(identity, position), identity, told, told, EVALUATED)


def _told(state: State, index: Tensor, identity: Tensor, shows_index: bool, shows_identity: bool, phase: int) -> Task:
    """What methods hear of a task: HIDDEN stands for what they may not know."""
    return {
        "index": index if shows_index else torch.full_like(index, HIDDEN),
        "identity": identity if shows_identity else torch.full_like(identity, HIDDEN),
        "progress": torch.zeros_like(state["progress"]),
        "phase": torch.full_like(index, phase),
    }


def turn_to(
    learner: Learner, state: State, world: Any, stream: TaskStream, orders: Tensor, position: int, told: bool = True
) -> State:
    """Begin the task at this position of every learner's order `[*L, T]`; the learner may be `told` of it or not."""
    state, key = set_task(state, world, stream, orders, position), random.fold(state["key"], "world")
    key = random.fold(key, position) if position else key
    return learner.begin_task(state, world, key) if told else learner.enter(state, world, key)


def begin(learner: Learner, state: State, world: Any, stream: TaskStream, orders: Tensor, stage: Stage) -> State:
    """Begin a stage: turn to its task if it is the task's first, then let the methods prepare.

    Where boundaries are hidden the world changes and nobody is told. Moments start anew where the stream says so.
    """
    begun = torch.full_like(state["stage"], stage.number + 1)
    if not stage.announced:
        state = turn_to(learner, state, world, stream, orders, stage.position, told=stage.number == 0)
        hooks.seen_parameters(learner.methods, state, state["task"])
        return {**state, "stage": begun}
    if stage.begins_task:
        state = turn_to(learner, state, world, stream, orders, stage.position)
        for method in learner.methods:
            state = _changed(state, method, "task_start", method.task_start(learner, *_given(state, method)))
    phase = torch.full_like(state["task"]["phase"], stage.whose)
    state = {**state, "task": {**state["task"], "phase": phase}}
    for method in learner.methods:
        found = method.phase_start(learner, *_given(state, method), stage.phase)
        state = _changed(state, method, "phase_start", found)
    hooks.seen_parameters(learner.methods, state, state["task"])
    return {**(reset_optimizer(state) if stream.restarts else state), "stage": begun}


def end_task(learner: Learner, state: State, world: Any) -> State:
    """Let the methods keep what they need of the task that has ended."""
    for method in learner.methods:
        p, m, task = _given(state, method)
        drawn = state

        def draw(n: int, drawn: State = drawn) -> tree.Tree:
            return learner.draw(drawn, world, n)

        state = _changed(state, method, "task_end", method.task_end(learner, p, m, task, draw))
    return state


def _given(state: State, method: Method) -> tuple[Any, Any, Any]:
    return state["params"], state["methods"][method.name], state["task"]


def _changed(state: State, method: Method, hook: str, found: tuple[Any, Any]) -> State:
    p, m = hooks.changed(method, hook, found, *_given(state, method)[:2])
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
    """An evaluation on the task at every position of each learner's order."""
    found = []
    for position in range(orders.shape[-1]):
        p = seen(learner.methods, state, tested_task(state, world, stream, orders, position))
        fresh = random.fold(key, position)
        found.append(learner.evaluate(p, world, fresh, episodes, deterministic=deterministic))
    return found


def score_tasks(
    learner: Learner, state: State, world: Any, stream: TaskStream, orders: Tensor, key: Tensor, episodes: int
) -> Tensor:
    """A row of the matrix: the mean score on the task at every position of each learner's order, `[*L, T]`."""
    found = evaluate_tasks(learner, state, world, stream, orders, key, episodes)
    return torch.stack([one.returns.mean(-1) for one in found], -1)
