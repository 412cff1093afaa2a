"""What a budget amounts to on a problem: iterations of every task, and evaluations that cost no more than a part.

Everything here is a function of the budget, the settings and the declared time limits, never of the clock or of how
long episodes turn out: a run can be repeated and resumed, and a learner's evaluations don't depend on its company.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from rlmeta.data.samples import DataTask
from rlmeta.envs.streams import TaskStream
from rlmeta.errors import SettingError
from rlmeta.learning.learner import Learner
from rlmeta.learning.settings import name_of
from rlmeta.runs.experiment import Budget, Problem

SHARE = 5
"""Periodic evaluations, and the final one, take at most one step for so many of training, by default."""
FEWEST_EPISODES = 4
"""Of an evaluation, however small the budget."""
EVALUATIONS, EPISODES, FINAL_EPISODES = 9, 16, 64
"""How many periodic evaluations there are, of how many episodes, and episodes at the end, where they are affordable."""


def iterations_of(problem: Problem, learner: Learner, world: Any, budget: Budget) -> tuple[int, ...]:
    """Iterations of training on every task of the problem, in the order it is met.

    Raises:
        SettingError: epochs of a problem without samples, or tasks of different sizes in several orders.
    """
    tasks = len(problem) if isinstance(problem, TaskStream) else 1
    if not budget.epochs:
        return (math.ceil(budget.steps / (world.num_envs * learner.steps_per_iteration)),) * tasks
    members = problem.tasks if isinstance(problem, TaskStream) else (problem,)
    if not all(isinstance(one, DataTask) for one in members):
        raise SettingError(
            f"epochs is {budget.epochs:g}, but {problem.name!r} has no samples to pass over: give steps instead"
        )
    orders = problem.orders() if isinstance(problem, TaskStream) else ((0,),)
    each = [math.ceil(budget.epochs * (len(one.train.target) // world.num_envs)) for one in members]
    counts = {tuple(math.ceil(each[task] / learner.steps_per_iteration) for task in order) for order in orders}
    if len(counts) > 1:
        raise SettingError(
            f"epochs is {budget.epochs:g}, but tasks of {problem.name!r} differ in size and learners meet them in "
            "several orders, which are trained side by side: give steps instead, or one order"
        )
    return counts.pop()


def check_learns(problem: Problem, learner: Learner, iterations: tuple[int, ...], budget: Budget) -> None:
    """Refuse a budget, its steps settled, that ends before anything is learned.

    Raises:
        SettingError: the first gradient step would come after the end.
    """
    steps, waits = min(iterations) * learner.steps_per_iteration, learner.idle_steps
    if steps < waits:
        settings, where = learner.settings, " on every task" if isinstance(problem, TaskStream) else ""
        raise SettingError(
            f"{name_of(type(settings))} takes its first gradient step after {waits * settings.num_envs:,} steps, the "
            f"budget is {budget.steps:,}{where}: give more steps, or less to wait for (learning_starts, n_steps)"
        )


def warn_of_rounding(budget: Budget, iterations: tuple[int, ...], every: int) -> None:
    """Say so where a single iteration takes more than the whole budget."""
    if not budget.epochs and budget.steps < every and max(iterations) == 1:
        text = f"steps is {budget.steps:,}, but an iteration takes {every:,}: one is trained for"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def settled(budget: Budget, problem: Problem, world: Any, iterations: tuple[int, ...], every: int) -> Budget:
    """The budget with a number in the place of what was left to be chosen: when to evaluate, and on how many episodes.

    Where episodes are stepped one by one and have a declared limit of H steps, evaluations are made fewer and smaller
    until even the longest episodes take at most a fifth of the steps of training (in the end as much once more), but
    never smaller than `FEWEST_EPISODES`; native environments and samples cost little, and there is no telling without
    a limit.

    Args:
        budget: as it was given.
        problem: what is trained on.
        world: of the problem.
        iterations: of every task.
        every: steps of each learner in an iteration.
    """
    steps = max(iterations) * every if budget.epochs else budget.steps
    limit = None if problem.native else world.episode_limit
    affordable = math.inf if limit is None else steps // (SHARE * limit)
    final = budget.final_episodes or _episodes(affordable, FINAL_EPISODES)
    if isinstance(problem, TaskStream):
        episodes = budget.eval_episodes or _episodes(affordable // (len(problem) + 1), EPISODES)
        times = EVALUATIONS
    else:
        episodes = budget.eval_episodes or _episodes(affordable // EVALUATIONS, EPISODES)
        times = int(min(EVALUATIONS, affordable // episodes))
    between = max(1, steps // (EVALUATIONS + 1))
    if times < EVALUATIONS:
        between = math.ceil(max(iterations) / (times + 1)) * every
    return dataclasses.replace(
        budget,
        steps=steps,
        eval_every=budget.eval_every or between,
        eval_episodes=episodes,
        final_episodes=final,
    )


def _episodes(affordable: float, most: int) -> int:
    """As many as are affordable and divide over rows, within the bounds."""
    return int(max(FEWEST_EPISODES, min(most, affordable // FEWEST_EPISODES * FEWEST_EPISODES)))
