"""Rows of a gymnasium VectorEnv, in any of the three autoreset modes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from rlmeta.data.spaces import Array, Layout, pick
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import Buffers, MaskSource, has_own_mask, mask_length, masked_space
from rlmeta.envs.gymnasium.sources import VectorSource, is_envpool
from rlmeta.errors import SettingError, SpaceError


class VectorRows:
    """R environments of a VectorEnv, with the interface of `Rows`.

    | autoreset mode | an episode that ends at step t |
    |---|---|
    | NEXT_STEP | returns its final observation at t; step t + 1 ignores the action (not `valid`) and resets |
    | SAME_STEP | is reset at t; the final observation is in `infos["final_obs"]` |
    | DISABLED | is reset here, with `options={"reset_mask": ...}`: the same as SAME_STEP |

    A final observation without an action mask in `infos` allows every action. Infos may also be a list with a
    dictionary per row, as of gymnasium's `DictInfoToList`.

    Args:
        source: the VectorEnv, perhaps with its constructor.
        count: R.

    Raises:
        SettingError: the VectorEnv has another number of environments, or none of the three autoreset modes.
        SpaceError: its spaces are not supported.
    """

    def __init__(self, source: VectorSource, count: int) -> None:
        self.env = env = source.env
        self.name, self._remake = source.name, source.remake
        if env.num_envs != count:
            raise SettingError(
                f"{self.name} has {env.num_envs} environments, expected {count}, one for each environment of each "
                f"learner: give a function with a parameter num_envs that makes as many"
            )
        self.mode = _autoreset_mode(env, self.name)
        self.mask = self._find_mask()
        observation_space, self.action_space = env.single_observation_space, env.single_action_space
        masked = self.mask is not None
        self.observation_space = masked_space(observation_space, self.action_space) if masked else observation_space
        self.observations, self.actions = Layout(self.observation_space), Layout(self.action_space, "action")
        self.buffers = Buffers.allocate(self.observations, count)
        self.seeds_rows = True
        """Whether `reset` takes a list of seeds, one per row."""
        self._pending = np.zeros(count, np.bool_)
        self.max_episode_steps = _time_limit(env)
        """Time limit of episodes in steps, None if the VectorEnv declares none."""

    @property
    def reseeds(self) -> bool:
        """Whether every episode starts from a seed of `reset`, and not only the first."""
        return self.mode is AutoresetMode.DISABLED and self.seeds_rows

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Reset every row; `rows` are all of them."""
        with failures.converting(self.name):
            value, infos = self._begin([int(seed) for seed in seeds])
        self._pending = np.zeros(self.env.num_envs, np.bool_)
        self.buffers.observation = self._read(value, infos, self._pending)

    def _begin(self, seeds: list[int]) -> Any:
        """Reset the VectorEnv with these seeds: observations and infos."""
        if self._remake is not None:
            failures.close(self.env, self.name)
            self.env = self._remake(seeds)
            return self.env.reset()
        try:
            first = self.env.reset(seed=seeds)  # type: ignore[arg-type]
            self.seeds_rows = True
        except (TypeError, ValueError, AssertionError, gym.error.Error):
            first = self.env.reset(seed=seeds[0])
            self.seeds_rows = False
            warnings.warn(
                f"{self.name} takes one seed for all its rows, that of the first: what a learner meets depends on the "
                "learners beside it; let its reset() take a list of seeds",
                stacklevel=2,
            )
        return first

    def step(self, actions: Sequence[Array], next_seeds: Array) -> None:
        """Step every environment.

        Args:
            actions: environment actions, `[R, ...]` per leaf.
            next_seeds: seeds of the next episodes `[R]`, used if `reseeds`.
        """
        with failures.converting(self.name):
            value, reward, terminated, truncated, infos = self.env.step(self.actions.assemble(actions))
        buffers, ignored = self.buffers, self._pending
        buffers.valid = ~ignored
        buffers.reward = np.where(ignored, np.float32(0), self._per_row(reward, "reward").astype(np.float32))
        buffers.terminated = self._per_row(terminated, "terminated").astype(np.bool_) & ~ignored
        buffers.truncated = self._per_row(truncated, "truncated").astype(np.bool_) & ~ignored
        done = buffers.terminated | buffers.truncated
        buffers.begins = ignored if self.mode is AutoresetMode.NEXT_STEP else done
        buffers.observation = self._read(value, infos, done)
        if self.mode is AutoresetMode.NEXT_STEP:
            self._pending = done
        elif done.any():
            if self.mode is AutoresetMode.SAME_STEP:
                self._read_final(infos, done)
            else:
                self._reset_done(done, next_seeds)

    def close(self) -> None:
        """Close the VectorEnv; see `failures.close`."""
        failures.close(self.env, self.name)

    def _reset_done(self, done: Array, next_seeds: Array) -> None:
        seeds = [int(seed) for seed in next_seeds] if self.seeds_rows else None
        # a new dictionary and mask each time: gymnasium removes the mask from the dictionary
        with failures.converting(self.name):
            value, infos = self.env.reset(seed=seeds, options={"reset_mask": done.copy()})  # type: ignore[arg-type]
        self.buffers.final = self.buffers.observation
        fresh = self._read(value, infos, ~done)
        self.buffers.observation = [
            np.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(fresh, self.buffers.final)
        ]

    def _per_row(self, value: Any, what: str) -> Array:
        array = np.asarray(value)
        if array.shape != (self.env.num_envs,):
            raise SpaceError(f"{self.name} gave {what} of shape {array.shape}, expected {(self.env.num_envs,)}")
        return array

    def _read(self, value: Any, infos: Any, lenient: Array) -> list[Array]:
        """Read the observation of every row; those with `lenient` `[R]` may lack an action mask."""
        if self.mask is not None:
            value = {"observation": value, "action_mask": self._masks(infos, lenient)}
        return self.observations.read(value, (self.env.num_envs,), self.name)

    def _read_final(self, infos: Any, done: Array) -> None:
        final, inner = _column(infos, "final_obs"), () if self.mask is None else ("observation",)
        if final is None:
            raise SpaceError(
                f'{self.name} resets in the same step but gave no infos["final_obs"], which that mode needs'
            )
        for leaf, buffer in zip(self.observations.leaves, self.buffers.final):
            if leaf.path == ("action_mask",) and self.mask is not None:
                buffer[done] = self._final_masks(infos)[done]
                continue
            path = leaf.path[len(inner) :]
            by_row = isinstance(final, list) or (isinstance(final, np.ndarray) and final.dtype == object)
            for row in np.flatnonzero(done):
                value = final[row] if by_row else pick(final, path, self.name)[row]
                if value is None:
                    raise SpaceError(f'{self.name} ended row {row} but left a hole in infos["final_obs"] there')
                buffer[row] = leaf.read(pick(value, path, self.name) if by_row else value, (), self.name)

    # ------------------------------------------------------------------------------------------------- action masks

    def _find_mask(self) -> MaskSource:
        base = self.env.unwrapped
        if has_own_mask(self.env.single_observation_space):
            return None
        within = getattr(base, "envs", None) or []  # a SyncVectorEnv's
        if hasattr(base, "action_masks") or (within and all(env.has_wrapper_attr("action_masks") for env in within)):
            return "method"
        if isinstance(self.env.single_action_space, spaces.Discrete | spaces.MultiDiscrete):
            with failures.converting(self.name):
                first = self.env.reset() if self._remake else self.env.reset(seed=0)
            return None if _column(first[1], "action_mask") is None else "info"
        return None

    def _masks(self, infos: Any, lenient: Array) -> Array:
        base: Any = self.env.unwrapped
        if self.mask == "method":
            return np.asarray(base.action_masks() if hasattr(base, "action_masks") else base.call("action_masks"))
        masks, has_mask = self._masks_of(infos)
        if not (has_mask | lenient).all():
            raise SpaceError(f'{self.name} gave infos without the "action_mask" that its first ones had')
        return masks

    def _final_masks(self, infos: Any) -> Array:
        return self._masks_of(_column(infos, "final_info") or {})[0]

    def _masks_of(self, infos: Any) -> tuple[Array, Array]:
        """Read action masks `[R, A]`, all ones in rows without one, and whether each row has one, `[R]`."""
        count = self.env.num_envs
        ones = np.ones((count, mask_length(self.action_space)), np.int8)
        column = _column(infos, "action_mask")
        if column is None:
            return ones, np.zeros(count, np.bool_)
        if isinstance(infos, dict) and "_action_mask" in infos:
            has_mask = np.asarray(infos["_action_mask"])
        else:
            has_mask = np.array([mask is not None for mask in column])
        for row in np.flatnonzero(has_mask):
            ones[row] = column[row]
        return ones, has_mask


def _time_limit(env: VectorEnv[Any, Any, Any]) -> int | None:
    """Time limit of episodes in steps: of gymnasium's spec, or of EnvPool's configuration, where 2^31 - 1 is none."""
    if not is_envpool(env.unwrapped):
        return getattr(env.spec, "max_episode_steps", None)
    steps = int(env.unwrapped.config["max_episode_steps"])  # type: ignore[attr-defined]
    return None if steps == 2**31 - 1 else steps


def _column(infos: Any, name: str) -> Any:
    """Look up an entry in the infos of all rows, a dictionary or a list of dictionaries; None if absent.

    From a list it is a list, with None in rows without the entry.
    """
    if isinstance(infos, dict):
        return infos.get(name)
    column = [info.get(name) if isinstance(info, dict) else None for info in infos]
    return None if all(entry is None for entry in column) else column


def _autoreset_mode(env: VectorEnv[Any, Any, Any], name: str) -> AutoresetMode:
    declared = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(declared)
    except ValueError:
        modes = ", ".join(str(mode) for mode in AutoresetMode)
        problem = "declares no autoreset mode" if declared is None else f"declares the autoreset mode {declared!r}"
        raise SettingError(
            f'{name} {problem} in metadata["autoreset_mode"], expected one of {modes}: set it to what it does'
        ) from None
