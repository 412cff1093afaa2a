"""Registration of the native environments with gymnasium, as `rlmeta/CartPole-v1` and so on, on import.

A name of two parts has a dash in its id, `rlmeta/MinAtar-Breakout-v1`, for gymnasium allows one slash.

`gymnasium.make("rlmeta.envs.native.register:rlmeta/CartPole-v1")` imports it. Constants are passed as a dictionary:
`gymnasium.make("rlmeta/CartPole-v1", constants={"gravity": 1.6})`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlmeta.envs.goals import PaysGoals
from rlmeta.envs.native import NATIVE, NativeEnv, NativeWorld
from rlmeta.envs.world import State
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys
from rlmeta.functional.tree import Tree


def gym_id(name: str) -> str:
    """Gymnasium id of a native environment's name."""
    return f"rlmeta/{name.replace('/', '-')}"


def _environment(name: str, constants: Mapping[str, Any] | None, max_episode_steps: int | None) -> NativeEnv:
    if name not in NATIVE:
        raise unknown_name("native environment", name, NATIVE)
    env: Any = NATIVE[name]
    for constant in constants or {}:
        if constant not in {f.name for f in dataclasses.fields(env)}:
            raise unknown_name(f"constant of {name}", constant, [f.name for f in dataclasses.fields(env)])
    return dataclasses.replace(env, **{**(constants or {}), "max_episode_steps": max_episode_steps})


def _draw_key(generator: np.random.Generator) -> Tensor:
    """Random key, such that a single environment equals the row of a VectorEnv with the same seed."""
    return make_keys([int(generator.integers(2**63))])[0]


class NativeGymEnv(gym.Env[Any, Any]):
    """Native environment as a gymnasium environment; its time limit is gymnasium's wrapper.

    Args:
        name: of `NATIVE`.
        constants: fields of the environment's dataclass to change.
        render_mode: None, since native environments are not rendered.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium declares it so

    def __init__(self, name: str, constants: Mapping[str, Any] | None = None, render_mode: str | None = None) -> None:
        if render_mode is not None:
            raise SettingError(f"render_mode={render_mode!r}: native environments draw nothing; make {name!r} instead")
        self.render_mode = None
        self._world = NativeWorld(_environment(name, constants, None))
        self.observation_space, self.action_space = self._world.observation_space, self._world.action_space
        self._key: Tensor | None = None
        self._state: State | None = None
        self._next_episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episode 0 of a seed; without a seed, the next episode of the last one."""
        super().reset(seed=seed)
        if seed is not None or self._key is None:
            self._key, self._next_episode = _draw_key(self.np_random), 0
        self._state = self._world.start(self._key, self._next_episode)
        self._next_episode += 1
        return _first_row(self._world.observation(self._state)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment; at the end of an episode the final observation is returned."""
        if self._state is None:
            raise SettingError("step() before the first reset(): call reset() to start an episode")
        _check_action(self.action_space, action)
        self._state, transition = self._world.step(self._state, torch.from_numpy(np.array(action)).unsqueeze(0))
        observation = _first_row(transition.next_observation)
        return observation, float(transition.reward), bool(transition.terminated), False, {}


class NativeGoalEnv(NativeGymEnv):
    """Native environment of a task with goals, with the interface of Gymnasium-Robotics' GoalEnv.

    `compute_reward` and `compute_terminated` take goals `[*B, ...]` in NumPy; the info is not looked at.
    """

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """Reward `[*B]` of steps that end at the achieved goals."""
        return _of_goals(self._goals().compute_reward, achieved_goal, desired_goal)

    def compute_terminated(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        """Whether the steps that end at the achieved goals terminate the episode, `[*B]`."""
        return _of_goals(self._goals().compute_terminated, achieved_goal, desired_goal)

    def _goals(self) -> Any:
        return self._world.env


def _of_goals(function: Callable[[Tensor, Tensor], Tensor], achieved_goal: Any, desired_goal: Any) -> Any:
    return function(torch.as_tensor(np.array(achieved_goal)), torch.as_tensor(np.array(desired_goal))).numpy()[()]


class NativeVectorEnv(VectorEnv[Any, Any, Any]):
    """Native environments as a gymnasium VectorEnv with SAME_STEP autoreset.

    Row i of `reset(seed=s)` is the single environment after `reset(seed=s + i)`.

    Args:
        name: of `NATIVE`.
        num_envs: number of environments.
        constants: fields of the environment's dataclass to change.
        max_episode_steps: time limit, None for none.
        render_mode: None.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as above

    def __init__(
        self,
        name: str,
        num_envs: int = 1,
        constants: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            raise SettingError(f"render_mode={render_mode!r}: native environments draw nothing; make {name!r} instead")
        self.num_envs = num_envs
        self._world = NativeWorld(_environment(name, constants, max_episode_steps), (num_envs,), 1)
        self.single_observation_space = self._world.observation_space
        self.single_action_space = self._world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: State | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset every row i: from seed + i, from its entry of a list of seeds, or at random."""
        seeds = self._seeds(seed)
        self._state = self._world.reset(torch.stack([_draw_key(seeding.np_random(s)[0]) for s in seeds]))
        return _rows(self._world.observation(self._state)), {}

    def _seeds(self, seed: int | list[int | None] | None) -> list[int | None]:
        if isinstance(seed, int):
            super().reset(seed=seed)
            return [seed + i for i in range(self.num_envs)]
        seeds = [None] * self.num_envs if seed is None else seed
        if len(seeds) != self.num_envs:
            raise SettingError(f"{len(seeds)} seeds for {self.num_envs} environments: pass one each, or one number")
        return [int(self.np_random.integers(2**31)) if s is None else s for s in seeds]

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every environment; final observations are in `final_obs` of the infos."""
        if self._state is None:
            raise SettingError("step() before the first reset(): call reset() to start the episodes")
        _check_action(self.action_space, actions)
        self._state, transition = self._world.step(self._state, torch.from_numpy(np.array(actions)).unsqueeze(1))
        observation, final = _rows(transition.observation), _rows(transition.next_observation)
        reward, terminated, truncated, _, done = (x.squeeze(1).numpy() for x in transition[2:])
        infos: dict[str, Any] = {}
        if done.any():
            infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
            for row in done.nonzero()[0]:
                infos["final_obs"][row] = tree.map(lambda leaf, row=row: leaf[row].copy(), final)
            infos |= {"_final_obs": done.copy(), "final_info": {}, "_final_info": done.copy()}
        return observation, reward.astype(np.float64), terminated, truncated, infos


def _check_action(space: gym.Space, action: Any) -> None:
    """Refuse actions outside a discrete space; Box actions are clipped."""
    if not isinstance(space, gym.spaces.Box) and not space.contains(action):
        raise SettingError(f"action {action!r}: expected one of {space}")


def _rows(observation: Tree) -> Any:
    """Copy observations `[R, 1, ...]` to arrays `[R, ...]`."""
    return tree.map(lambda leaf: leaf.squeeze(1).numpy().copy(), observation)


def _first_row(observation: Tree) -> Any:
    """Extract the observation of the first row: an array, an int of a discrete space, or a dictionary of them."""
    return tree.map(lambda leaf: leaf[0].numpy().copy() if leaf.dim() > 1 else int(leaf[0]), observation)


for _name, _env in NATIVE.items():
    _single = NativeGoalEnv if isinstance(_env, PaysGoals) else NativeGymEnv
    if gym_id(_name) not in gym.registry:
        gym.register(
            id=gym_id(_name),
            entry_point=f"rlmeta.envs.native.register:{_single.__name__}",
            vector_entry_point="rlmeta.envs.native.register:NativeVectorEnv",
            max_episode_steps=_env.max_episode_steps,
            reward_threshold=gym.registry[_name].reward_threshold if _name in gym.registry else None,
            kwargs={"name": _name},
        )
