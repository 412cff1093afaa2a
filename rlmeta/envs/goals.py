"""Goals: what a step would have been paid for another goal than its own, as Gymnasium-Robotics' GoalEnv tells it.

Observations of a goal-conditioned task are a Dict of `observation`, `achieved_goal` and `desired_goal`. Its environment
has `compute_reward(achieved_goal, desired_goal, info)`, vectorised over leading axes, and may have
`compute_terminated(achieved_goal, desired_goal, info)`. A native one takes tensors, and no info.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import NativeWorld
from rlmeta.envs.world import World
from rlmeta.errors import SettingError

ACHIEVED, DESIRED = "achieved_goal", "desired_goal"
"""Entries of an observation."""


@runtime_checkable
class PaysGoals(Protocol):
    """Environment that tells what a step would have been paid for another goal."""

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, *info: Any) -> Any:
        """Reward of steps that end at `achieved_goal` `[*B, ...]`, for the goals `desired_goal`: `[*B]`."""
        ...


@runtime_checkable
class EndsAtGoals(Protocol):
    """Environment that tells whether a step would have terminated the episode for another goal."""

    def compute_terminated(self, achieved_goal: Any, desired_goal: Any, *info: Any) -> Any:
        """Whether steps that end at `achieved_goal` `[*B, ...]` terminate for the goals `desired_goal`: `[*B]`."""
        ...


class Goals(NamedTuple):
    """What a goal-conditioned task pays for any goal: functions of achieved and desired goals `[*B, ...]`."""

    reward: Callable[[Tensor, Tensor], Tensor]
    """Reward of a step that ends at the achieved goal, `[*B]` float32."""
    terminated: Callable[[Tensor, Tensor], Tensor] | None
    """Whether that step terminates the episode, `[*B]` bool; None if the task does not tell."""


def has_goals(space: gym.Space) -> bool:
    """Whether observations are a Dict with an achieved and a desired goal, Boxes of the same shape and dtype."""
    entries = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {}
    achieved, desired = entries.get(ACHIEVED), entries.get(DESIRED)
    if not isinstance(achieved, gym.spaces.Box) or not isinstance(desired, gym.spaces.Box):
        return False
    return achieved.shape == desired.shape and achieved.dtype == desired.dtype


def goals_of(world: World) -> Goals:
    """What a world's task pays for any goal.

    Raises:
        SettingError: it does not tell, or its goals are paid differently in different environments.
    """
    if isinstance(world, NativeWorld):
        return _native(world)
    if not isinstance(world, GymnasiumWorld):
        raise SettingError(f"hindsight is for the goals of one task, got {world.name}: set hindsight='none'")
    asked = world.asked()
    if asked is None:
        raise SettingError(
            f"hindsight asks an environment for compute_reward, but {world.name} is a VectorEnv, which has none for "
            "single ones: give a function that makes one environment, or set hindsight='none'"
        )
    env: Any = asked.unwrapped
    if not isinstance(env, PaysGoals):
        raise _silent(world.name)
    return _live(env, world.observation_space[DESIRED], world.name)  # type: ignore[index]


def _silent(name: str) -> SettingError:
    return SettingError(
        f"hindsight pays steps for other goals, but {name} has no compute_reward(achieved_goal, desired_goal, info): "
        "give it one, or set hindsight='none'"
    )


def _native(world: NativeWorld) -> Goals:
    env: Any = world.env
    if not isinstance(env, PaysGoals):
        raise _silent(world.name)
    if world.varies or world.trial_episodes > 1:
        raise SettingError(
            f"hindsight pays steps by the constants of {world.name}, which here differ between environments or "
            "episodes: give a task with fixed constants, of single episodes, or set hindsight='none'"
        )
    return Goals(env.compute_reward, env.compute_terminated if isinstance(env, EndsAtGoals) else None)


# ------------------------------------------------------------------------------------------- gymnasium environments


def _live(env: Any, space: gym.Space[Any], name: str) -> Goals:
    """The goals of a gymnasium environment, in arrays of one row a step."""

    shape, dtype = space.shape or (), space.dtype

    def rows(achieved: Tensor, desired: Tensor) -> tuple[Any, Any]:
        first, second = (goal.reshape(-1, *shape).cpu().numpy().astype(dtype) for goal in (achieved, desired))
        return first, second

    def reward(achieved: Tensor, desired: Tensor) -> Tensor:
        first, second = rows(achieved, desired)
        with failures.converting(f"compute_reward of {name}"):
            paid = np.asarray(env.compute_reward(first, second, {}), np.float32)
        if paid.shape != first.shape[:1]:
            raise SettingError(
                f"compute_reward of {name} gave shape {paid.shape} for goals {first.shape}, expected "
                f"{first.shape[:1]}: let it take goals with a leading axis, as GoalEnv has it"
            )
        return _shaped(paid, achieved, first)

    def terminated(achieved: Tensor, desired: Tensor) -> Tensor:
        first, second = rows(achieved, desired)
        with failures.converting(f"compute_terminated of {name}"):
            ends = np.asarray(env.compute_terminated(first, second, {}))
            if ends.shape != first.shape[:1]:  # GoalEnv asks only for compute_reward to be vectorised
                ends = np.array([bool(env.compute_terminated(a, b, {})) for a, b in zip(first, second)])
        return _shaped(ends.astype(np.bool_), achieved, first)

    return Goals(reward, terminated if isinstance(env, EndsAtGoals) else None)


def _shaped(values: Any, goal: Tensor, flat: Any) -> Tensor:
    """Values `[B]` of flattened goals, on the axes of the goals as they were."""
    return torch.from_numpy(values).reshape(goal.shape[: goal.dim() - flat.ndim + 1]).to(goal.device)
