"""Hindsight experience replay (HER): what was achieved is taken for what was desired.

Of the transitions drawn from a replay memory k in k + 1 get another goal: one that was achieved at their own end or
later in the same episode (strategy "future"). Their rewards, and where the task tells them their terminations, are
those of that goal. So an episode that failed shows how its own places are reached.

Source: Andrychowicz et al., "Hindsight Experience Replay", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.goals import ACHIEVED, DESIRED, Goals, goals_of, has_goals
from rlmeta.envs.world import World
from rlmeta.errors import SpaceError
from rlmeta.functional import random, tree
from rlmeta.functional.axes import align
from rlmeta.learning import replay
from rlmeta.learning.settings import require, require_finite, require_range
from rlmeta.learning.state import State

HindsightName: TypeAlias = Literal["none", "future"]
"""Goals taken in hindsight: none, or ones that were achieved later in the same episode."""


def check_settings(settings: Any) -> None:
    """Check the settings `hindsight` and `hindsight_goals`.

    Raises:
        SettingError: with what to change.
    """
    name = type(settings).__name__
    require_range(settings, "hindsight_goals", 0.0)
    require_finite(settings, "hindsight_goals")
    require(
        settings.hindsight == "none" or not settings.rewards,
        f"{name}: hindsight pays steps again by the task's compute_reward, which knows no other rewards: leave rewards "
        "empty, or set hindsight='none'",
    )


def check_space(settings: Any, observation_space: gym.Space) -> None:
    """Check that observations have goals, if any are taken in hindsight.

    Raises:
        SpaceError: they have none.
    """
    if settings.hindsight != "none" and not has_goals(observation_space):
        raise SpaceError(
            f"{type(settings).__name__}: hindsight needs observations of a Dict with Boxes {ACHIEVED} and {DESIRED} of "
            f"the same shape and dtype, the task has {observation_space}: set hindsight='none'"
        )


def goals_for(settings: Any, world: World) -> Goals | None:
    """The goals of a world's task, None if the settings take none in hindsight.

    Raises:
        SettingError: the task does not tell what it pays for other goals.
    """
    return None if settings.hindsight == "none" else goals_of(world)


def drawing(goals: Goals | None, state: State) -> Callable[[State, Tensor, int, Tensor, int], tree.Tree]:
    """The function that draws transitions, as `replay.sample`: itself, or where there are goals `sample`.

    Of the transitions k / (k + 1) take another goal, with the setting `hindsight_goals` of each learner for k.
    """
    if goals is None:
        return replay.sample
    k = state["params"]["hyper"]["hindsight_goals"]
    return partial(sample, goals=goals, share=k / (k + 1))


@torch.no_grad()
def sample(
    memory: State, key: Tensor, batch_size: int, gamma: Tensor, n_steps: int = 1, *, goals: Goals, share: Tensor
) -> tree.Tree:
    """Draw transitions uniformly, some with a goal of hindsight.

    reward = r(g', g), discount = gamma (1 - terminated(g', g)) with the goal g' that the transition achieved and, with
    the probability `share`, g = g' of a transition that is drawn uniformly from it and those after it in its episode,
    as far as the memory has them; otherwise the desired goal. Without `goals.terminated` terminations stay.

    Args:
        memory: of `replay.init` and `replay.insert`.
        key: `[*K, *L]`: a minibatch for every one of them.
        batch_size: B.
        gamma: `[*L]`.
        n_steps: 1, for the rewards of later steps would have to be those of another goal, too.
        goals: what the task pays for a goal.
        share: `[*L]`.

    Returns:
        as `replay.sample`
    """
    assert n_steps == 1
    t, env = replay.draw(memory, key, batch_size)
    batch = replay.transitions(memory, t, env, gamma)
    later = replay.rows_of({**memory, "left": _rows_left(memory)}, "left", t, env).clamp(min=1)
    offset = random.integers(key, "hindsight", 1, (batch_size,), later)
    chance = random.uniform(key, "hindsight", 0, (batch_size,))
    taken = batch["valid"] & (chance < share.unsqueeze(-1))

    achieved = batch["next_observation"][ACHIEVED]
    ring = {**memory, ACHIEVED: memory["observation"][ACHIEVED]}
    goal = torch.where(align(taken, achieved), replay.rows_of(ring, ACHIEVED, t + 1 + offset, env), _desired(batch))
    reward = torch.where(taken, goals.reward(achieved, goal).to(batch["reward"].dtype), batch["reward"])
    discount = batch["discount"]
    if goals.terminated is not None:
        discount = torch.where(taken, gamma.unsqueeze(-1) * ~goals.terminated(achieved, goal), discount)
    told = {name: {**batch[name], DESIRED: goal} for name in ("observation", "next_observation")}
    return {**batch, **told, "reward": reward, "discount": discount}


def _desired(batch: tree.Tree) -> Tensor:
    goal: Tensor = batch["observation"][DESIRED]
    return goal


def _rows_left(memory: State) -> Tensor:
    """Rows from every row to the last observation of its episode, `[*L, C, N]`.

    That is the next row in which nothing was done: the final observation, or the newest one.
    """
    valid, axis = memory["valid"], memory["written"].dim() - 1
    capacity = valid.shape[axis]
    place = torch.arange(capacity, dtype=torch.int32, device=valid.device).unsqueeze(-1)
    idle = torch.where(valid, 2 * capacity, place)
    following = idle.flip(axis).cummin(axis).values.flip(axis)
    around = following.narrow(axis, 0, 1) + capacity  # the first of all, once around the ring
    return (torch.minimum(following, around) - place).long()
