"""The stages of a run: one for a single problem; for a stream, the phases of every task in turn.

Everything a stage does is in the state, and which stages have begun too, so a run may be killed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmeta.envs.streams import TaskStream
from rlmeta.functional import random, tree
from rlmeta.lab.experiment import Problem
from rlmeta.learning import hooks
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method, seen
from rlmeta.learning.state import Packed, State
from rlmeta.learning.step import reset_optimizer


class Stage(NamedTuple):
    """Iterations `first` to below `last` of a run."""

    number: int
    """Of the stage in the run."""
    position: int
    """Of the task in the stream."""
    phase: str
    """"train", or what a lifelong method has asked for."""
    first: int
    last: int
    begins_task: bool
    ends_task: bool

    def progress(self, iteration: int) -> float:
        """The fraction of the stage that is done before this iteration."""
        return (iteration - self.first) / (self.last - self.first)


def stages_of(problem: Problem, methods: Sequence[Method], iterations: Sequence[int]) -> list[Stage]:
    """The stages of a run; `iterations` are those of training on every task, in the order they are met."""
    stages: list[Stage] = []
    first = 0
    for position, of_training in enumerate(iterations):
        phases = [("train", of_training)]
        if isinstance(problem, TaskStream):
            phases += [phase for method in methods for phase in hooks.phases(method, method.phases(of_training))]
        for i, (phase, count) in enumerate(phases):
            begins, ends = i == 0, i == len(phases) - 1
            stages.append(Stage(len(stages), position, phase, first, first + count, begins, ends))
            first += count
    return stages


def start(state: State, stream: TaskStream) -> State:
    """What a run on a stream keeps besides its learner's state.

    `matrix` `[*L, T + 1, T]`: the score on the task at position j after training up to position i - 1; NaN until then.
    """
    tasks, shape = len(stream), state["key"].shape
    matrix = torch.full((*shape, tasks + 1, tasks), torch.nan, dtype=torch.float64, device=state["key"].device)
    return {**state, "stage": torch.zeros_like(state["count"]["iterations"]), "matrix": matrix}


def set_task(state: State, world: Any, orders: Tensor, position: int) -> State:
    """Set learners and world to the task at this position of every learner's order `[*L, T]`."""
    identity = orders[..., position].to(state["key"].device)
    world.select(identity)
    task = {"index": torch.full_like(identity, position), "identity": identity}
    return {**state, "task": {**task, "progress": torch.zeros_like(state["progress"])}}


def turn_to(learner: Learner, state: State, world: Any, orders: Tensor, position: int) -> State:
    """Begin the task at this position of every learner's order `[*L, T]`."""
    state, key = set_task(state, world, orders, position), random.fold(state["key"], "world")
    return learner.begin_task(state, world, random.fold(key, position) if position else key)


def begin(learner: Learner, state: State, world: Any, orders: Tensor, stage: Stage) -> State:
    """Begin a stage: turn to its task if it is the task's first, then let the methods prepare; moments start anew."""
    if stage.begins_task:
        state = turn_to(learner, state, world, orders, stage.position)
        for method in learner.methods:
            state = _changed(state, method, "task_start", method.task_start(learner, *_given(state, method)))
    for method in learner.methods:
        found = method.phase_start(learner, *_given(state, method), stage.phase)
        state = _changed(state, method, "phase_start", found)
    hooks.seen_parameters(learner.methods, state, state["task"])
    return {**reset_optimizer(state), "stage": torch.full_like(state["stage"], stage.number + 1)}


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
    orders: Tensor,
    key: Tensor,
    episodes: int,
    *,
    deterministic: bool = True,
) -> list[Evaluation]:
    """An evaluation on the task at every position of each learner's order."""
    found = []
    for position in range(orders.shape[-1]):
        at = set_task(state, world, orders, position)
        p = seen(learner.methods, state, at["task"])
        fresh = random.fold(key, position)
        found.append(learner.evaluate(p, world, fresh, episodes, deterministic=deterministic))
    return found


def score_tasks(learner: Learner, state: State, world: Any, orders: Tensor, key: Tensor, episodes: int) -> Tensor:
    """A row of the matrix: the mean score on the task at every position of each learner's order, `[*L, T]`."""
    found = evaluate_tasks(learner, state, world, orders, key, episodes)
    return torch.stack([one.returns.mean(-1) for one in found], -1)
