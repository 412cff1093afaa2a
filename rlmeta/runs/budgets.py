"""The training budget in iterations, and a default evaluation schedule that costs at most a fifth of training.

Everything is computed from the budget, the settings and the declared time limits, never from the clock or from episode
lengths, so runs can be repeated and resumed, and a learner's evaluations do not depend on the others in its batch.
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
from rlmeta.learning.populations import Population
from rlmeta.learning.settings import name_of
from rlmeta.runs.experiment import Budget, Problem

SHARE = 5
"""By default all periodic evaluations together take at most one step per `SHARE` training steps; so does the final."""
FEWEST_EPISODES = 4
"""Minimum number of episodes in an evaluation, however small the budget."""
EVALUATIONS, EPISODES, FINAL_EPISODES = 9, 16, 64
"""Default number of periodic evaluations, their episodes, and the episodes of the final evaluation."""


def iterations_of(problem: Problem, learner: Learner, world: Any, budget: Budget) -> tuple[int, ...]:
    """Number of training iterations on every task, in task order; a single problem is one task.

    Raises:
        SettingError: epochs of a problem without samples, or tasks of different sizes in several orders.
    """
    tasks = len(problem) if isinstance(problem, TaskStream) else 1
    if not budget.epochs:
        return (math.ceil(budget.steps / (world.num_envs * learner.steps_per_iteration)),) * tasks
    members = problem.tasks if isinstance(problem, TaskStream) else (problem,)
    if not all(isinstance(task_data, DataTask) for task_data in members):
        raise SettingError(
            f"epochs is {budget.epochs:g}, but {problem.name!r} has no samples to pass over: give steps instead"
        )
    orders = problem.orders() if isinstance(problem, TaskStream) else ((0,),)
    each = [math.ceil(budget.epochs * (len(task_data.train.target) // world.num_envs)) for task_data in members]
    counts = {tuple(math.ceil(each[task] / learner.steps_per_iteration) for task in order) for order in orders}
    if len(counts) > 1:
        raise SettingError(
            f"epochs is {budget.epochs:g}, but tasks of {problem.name!r} differ in size and learners meet them in "
            "several orders, which are trained side by side: give steps instead, or one order"
        )
    return counts.pop()


def check_learns(problem: Problem, learner: Learner, iterations: tuple[int, ...], budget: Budget) -> None:
    """Refuse a budget that ends before the first gradient step.

    Raises:
        SettingError: the learner waits for more steps than the budget has.
    """
    steps, waits = min(iterations) * learner.steps_per_iteration, learner.idle_steps
    if steps < waits:
        settings, where = learner.settings, " on every task" if isinstance(problem, TaskStream) else ""
        raise SettingError(
            f"{name_of(type(settings))} takes its first gradient step after {waits * settings.num_envs:,} steps, the "
            f"budget is {budget.steps:,}{where}: give more steps, or less to wait for (learning_starts, n_steps)"
        )


def periods(budget: Budget, population: Population | None, iterations: int, every: int) -> tuple[int, int]:
    """Iterations between two periodic evaluations, and between two exchanges of a population, which evaluate, too.

    Args:
        budget: the settled budget.
        population: the population, or None, which never exchanges within `iterations`.
        iterations: number of iterations of the run.
        every: steps of each learner in one iteration.
    """
    evaluated = max(1, round(budget.eval_every / every))
    return evaluated, iterations if population is None else max(1, round(int(population.every) / every))


def warn_of_rounding(budget: Budget, iterations: tuple[int, ...], every: int) -> None:
    """Warn when a single iteration takes more steps than the whole budget."""
    if not budget.epochs and budget.steps < every and max(iterations) == 1:
        text = f"steps is {budget.steps:,}, but an iteration takes {every:,}: training takes one iteration"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def settled(budget: Budget, problem: Problem, world: Any, iterations: tuple[int, ...], every: int) -> Budget:
    """Fill in the budget's defaults: steps, evaluation interval, evaluation episodes and final episodes.

    Where environments are stepped one by one and declare a time limit, evaluations are made fewer and smaller until
    even episodes of that length take at most a fifth of the training steps (the final evaluation as much once more),
    but never fewer than `FEWEST_EPISODES` episodes. Native environments, samples and environments without a time limit
    get the full default.

    Args:
        budget: as the user gave it; fields that are set stay as they are.
        problem: the training problem.
        world: the problem's environments.
        iterations: number of iterations on every task.
        every: steps of each learner in one iteration.
    """
    steps = max(iterations) * every if budget.epochs else budget.steps
    limit = None if problem.native else world.longest_episode
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
    """Number of episodes: affordable, a multiple of `FEWEST_EPISODES`, at most `most`."""
    return int(max(FEWEST_EPISODES, min(most, affordable // FEWEST_EPISODES * FEWEST_EPISODES)))
