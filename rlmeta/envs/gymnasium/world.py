"""World of gymnasium environments, `N` for each of `*L` learners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.spaces import Array, Layout
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.reports import Reports
from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT, Rows, Template
from rlmeta.envs.gymnasium.sources import VectorSource, resolve
from rlmeta.envs.gymnasium.vector_rows import VectorRows
from rlmeta.envs.gymnasium.workers import WorkerRows
from rlmeta.envs.world import State, Transition
from rlmeta.errors import CheckpointError, InexactResumeError, SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.tree import Tree

_SEED_MASK = (1 << 31) - 1  # a range that every random generator accepts


def episode_seed(row_key: Tensor, episode: int | Tensor) -> Tensor:
    """Derive the seed of an episode, in [0, 2^31), of the shape of `row_key`."""
    return random.fold(row_key, episode) & _SEED_MASK


def _vector_rows(source: VectorSource, count: int, mode: str, limit: int | None, ours: bool) -> VectorRows:
    """Create the rows of a VectorEnv; on failure it is closed if it is `ours`, created here.

    Raises:
        SettingError: the options are for single environments alone.
    """
    try:
        if mode == "async":
            raise SettingError(
                f"{source.name} is a VectorEnv, which runs its environments itself: use mode='sync' (on the command "
                "line no --async)"
            )
        if limit is not None:
            raise SettingError(
                f"max_episode_steps is {limit}, but {source.name} is a VectorEnv, whose episodes can't be cut from "
                "outside: let the function that makes it give its environments a limit"
            )
        return VectorRows(source, count)
    except BaseException:
        if ours:
            failures.close(source.env, source.name)
        raise


def _check(mode: str, workers: int | None, num_envs: int, rows: int, max_log: int) -> None:
    """Refuse contradicting settings of a world."""
    if mode not in ("sync", "async"):
        raise SettingError(f"mode is {mode!r}, expected 'sync' or 'async'")
    if mode == "sync" and workers is not None:
        raise SettingError(f"workers is {workers}, but mode='sync' has none: use mode='async'")
    if rows < 1 or max_log < 1:
        raise SettingError(f"num_envs is {num_envs} and max_log {max_log}, expected at least 1")


class GymnasiumWorld:
    """World of gymnasium environments; row r = l N + n of prod(*L) N is environment n of learner l.

    Single environments are stepped in a loop. Every episode starts from a seed that is a hash of the learner's key, the
    environment's index and the episode's, so that it can be replayed from the seed and its actions: this is how
    `restore` brings live environments back. A VectorEnv, of any of gymnasium's autoreset modes, resets its environments
    itself and cannot be brought back.

    Transitions and observations are on the device of the key passed to `reset`, the bookkeeping on the CPU. The state:

        key          [*L, N] int64     key of the row
        seed         [*L, N] int64     seed of the current episode (VectorEnv: the last seed passed to it)
        episode      [*L, N] int64     index of the current episode
        elapsed      [*L, N] int64     its number of steps so far
        observation  [*L, N, ...]      current observation
        actions      [*L, N, C, ...]   actions of the episode so far, in the smallest dtype; C is the time limit, or
                                       `max_log` without one. Absent for a VectorEnv

    Args:
        make: a gymnasium id, `envpool:NAME`, an EnvSpec, a VectorEnv, or a function that returns an environment or a
            VectorEnv. A function with a parameter `num_envs` gets the number of rows; one that also has a parameter
            `seed` gets a list of seeds, and is called again at every reset.
        learner_shape: `*L`.
        num_envs: N.
        mode: "sync" steps the rows in this process, "async" in worker processes; transitions are equal.
        workers: number of processes, with "async"; None takes one per core.
        settings: keyword arguments of the environment.
        max_log: steps for which actions are kept if episodes have no limit; longer ones cannot be resumed exactly.
        max_episode_steps: time limit, by gymnasium's TimeLimit around every environment.
        worker_timeout: with "async", seconds that a call of an environment may take; see `WorkerRows`.

    Raises:
        SettingError, UnknownNameError, MissingExtraError: `make` is no source of environments.
        EnvironmentFailedError: user code raised.
        SpaceError: a space is not supported.
    """

    trial_episodes = 1

    def __init__(
        self,
        make: Any,
        learner_shape: tuple[int, ...],
        num_envs: int,
        mode: Literal["sync", "async"] = "sync",
        workers: int | None = None,
        *,
        settings: dict[str, Any] | None = None,
        max_log: int = 10_000,
        max_episode_steps: int | None = None,
        worker_timeout: float = WORKER_TIMEOUT,
    ) -> None:
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs
        self._batch = (*self.learner_shape, num_envs)
        self._count = math.prod(self._batch)
        _check(mode, workers, num_envs, self._count, max_log)
        source = resolve(make, dict(settings or {}), self._count)
        self.max_episode_steps: int | None
        """Time limit of episodes in steps, None if the environment declares none."""
        self._rows: Rows | WorkerRows | VectorRows
        self._template: Template | None = None
        self._asked: gym.Env[Any, Any] | None = None
        common: Template | VectorRows
        if isinstance(source, Template):
            common = self._template = source if max_episode_steps is None else source.limited(max_episode_steps)
            alone = mode == "sync"
            self._rows = (
                Rows(common, self._count) if alone else WorkerRows(common, self._count, workers, worker_timeout)
            )
            self._capacity, self.max_episode_steps = common.max_episode_steps or max_log, common.max_episode_steps
        else:
            ours = source.env is not make
            common = self._rows = _vector_rows(source, self._count, mode, max_episode_steps, ours)
            self._capacity, self.max_episode_steps = 0, common.max_episode_steps
        self.name = common.name
        self.observation_space, self.action_space = common.observation_space, common.action_space
        self._observations, self._actions = Layout(self.observation_space), Layout(self.action_space, "action")
        self.exact_resume = not isinstance(self._rows, VectorRows)
        """Whether `restore` replays episodes; it reports differences."""
        self._reports = Reports(self.name, self._observations.leaves, self._batch)
        self._initialise_bookkeeping()

    def _initialise_bookkeeping(self) -> None:
        """Bookkeeping before any reset; a state of another position needs `restore`."""
        self._all = np.arange(self._count)
        self._device = torch.device("cpu")
        self._key = np.zeros(self._count, np.int64)
        self._seed, self._episode, self._elapsed = self._key.copy(), self._key - 1, self._key.copy()
        self._next_seed = self._key.copy()
        self._latest: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def longest_episode(self) -> int | None:
        """Largest time limit of the world's tasks in steps: that of the only one."""
        return self.max_episode_steps

    def reset(self, key: Tensor) -> State:
        """Reset: start the first episode of every row.

        Args:
            key: `[*L]` int64.

        Raises:
            SettingError: `key` has another shape or dtype.
        """
        if tuple(key.shape) != self.learner_shape or key.dtype != torch.int64:
            raise SettingError(f"key is {key.dtype} {tuple(key.shape)}, expected int64 {self.learner_shape}")
        self._device = key.device
        number = torch.arange(self.num_envs, device="cpu")
        row_key = random.fold(random.fold(key.cpu(), "environment").unsqueeze(-1), number)
        self._key = row_key.reshape(-1).numpy()
        self._episode = np.full(self._count, -1, np.int64)
        self._next_seed = self._seeds_of(self._all, self._episode + 1)
        self._start(self._all)
        log = [
            torch.from_numpy(np.zeros((*self._batch, self._capacity, *leaf.shape), leaf.log_dtype))
            for leaf in self._actions.leaves
        ]
        return self._state(log)

    def observation(self, state: State) -> Tree:
        """Current observation `[*L, N, ...]`."""
        return state["observation"]

    def step(self, state: State, action: Tree) -> tuple[State, Transition]:
        """Step every environment.

        Args:
            state: the latest state; consumed, since its log of actions is written in place.
            action: a tree of `[*L, N, ...]`; Box actions are clipped to their bounds, discrete ones counted from 0.

        Raises:
            SpaceError: an action or observation does not fit its space.
            SettingError: `state` is not that of the live environments.
        """
        self._check_current(state)
        stored = self._actions.to_stored_actions(action, self._batch)
        log = self._log(state, stored)
        try:
            self._rows.step(self._actions.to_env_actions(stored), self._next_seed)
        except BaseException:
            self._lose_track()
            raise
        buffers = self._rows.buffers
        begins = buffers.begins.copy()
        ended = begins & buffers.valid
        self._reports.step(buffers, ended, self._elapsed)
        observation = self._tree(buffers.observation)
        next_observation = observation
        if ended.any():
            mixed = [seen.copy() for seen in buffers.observation]
            for array, final in zip(mixed, buffers.final):
                array[ended] = final[ended]
            next_observation = self._observations.tree(mixed, self._batch, self._device)
        self._elapsed += 1
        changed = ["elapsed"]
        if begins.any():
            self._count_new_episodes(begins)
            changed += ["seed", "episode"]
        transition = Transition(
            observation,
            next_observation,
            *(
                self._tensor(column)
                for column in (buffers.reward, buffers.terminated, buffers.truncated, buffers.valid, begins)
            ),
        )
        state = {**state, **self._columns(changed), "observation": observation}
        return self._remember(state, log), transition

    def restore(self, state: State, inexact: bool = False) -> State:
        """Bring every live environment to a saved state, by replaying its episode.

        Args:
            state: of a world of the same environments and the same shape.
            inexact: start a new episode in every row that cannot be brought back, instead of raising. Such a row has
                `elapsed` 0 in the returned state, and its agent's memory should be reset.

        Returns:
            The state to continue from: equal to `state` in rows that were brought back.

        Raises:
            CheckpointError: `state` is of another world.
            InexactResumeError: without `inexact`, a row has another observation after its episode was replayed, its
                episode was longer than the log, or the world is a VectorEnv.
        """
        self._adopt(state)
        try:
            lost = self._replay(state)
            if lost.any():
                if not inexact:
                    raise InexactResumeError(self._why_lost(lost))
                self._start(np.flatnonzero(lost))
        except BaseException:
            self._lose_track()
            raise
        log = [part.cpu().contiguous() for part in self._log_leaves(state)]
        return self._state(log)

    def asked(self) -> gym.Env[Any, Any] | None:
        """An environment beside the rows, never stepped, to ask for what depends on its arguments alone.

        None of a VectorEnv.
        """
        if self._asked is None and self._template is not None:
            self._asked = self._template.environment()
        return self._asked

    def close(self) -> None:
        """Close the environments and end worker processes."""
        self._rows.close()
        if self._asked is not None:
            failures.close(self._asked, self.name)

    # ------------------------------------------------------------------------------------------------------- episodes

    def _lose_track(self) -> None:
        """Invalidate the bookkeeping after a failed step: no state fits the environments until restore()."""
        self._latest = (None, None)
        self._elapsed = np.full(self._count, -1, np.int64)

    def _seeds_of(self, rows: Array, episode: Array) -> Array:
        return episode_seed(torch.from_numpy(self._key[rows]), torch.from_numpy(episode[rows])).numpy()

    def _start(self, rows: Array) -> None:
        """Start the next episode of some rows."""
        self._rows.reset(rows.tolist(), self._next_seed[rows].tolist())
        begins = np.zeros(self._count, np.bool_)
        begins[rows] = True
        self._count_new_episodes(begins, reseeded=True)
        self._reports.reset(self._rows.buffers.observation)

    def _count_new_episodes(self, begins: Array, reseeded: bool = False) -> None:
        rows = np.flatnonzero(begins)
        if reseeded or not isinstance(self._rows, VectorRows) or self._rows.reseeds:
            self._seed[rows] = self._next_seed[rows]
        self._episode[rows] += 1
        self._elapsed[rows] = 0
        self._next_seed[rows] = self._seeds_of(rows, self._episode + 1)

    # ---------------------------------------------------------------------------------------------------------- state

    def _tensor(self, column: Array) -> Tensor:
        return torch.from_numpy(column.copy()).view(self._batch).to(self._device)

    def _tree(self, buffers: Sequence[Array]) -> Tree:
        return self._observations.tree([buffer.copy() for buffer in buffers], self._batch, self._device)

    def _columns(self, names: Sequence[str]) -> State:
        live = {"key": self._key, "seed": self._seed, "episode": self._episode, "elapsed": self._elapsed}
        return {name: torch.from_numpy(live[name].copy()).view(self._batch) for name in names}

    def _state(self, log: Sequence[Tensor]) -> State:
        state = self._columns(["key", "seed", "episode", "elapsed"])
        state["observation"] = self._tree(self._rows.buffers.observation)
        return self._remember(state, log)

    def _remember(self, state: State, log: Sequence[Tensor]) -> State:
        if self.exact_resume:
            state["actions"] = self._actions.nest(log)
        self._latest = (state["episode"], state["elapsed"])
        return state

    def _log_leaves(self, state: State) -> list[Tensor]:
        return self._actions.unnest(state["actions"], "a saved log of actions") if self.exact_resume else []

    def _log(self, state: State, stored: Sequence[Array]) -> list[Tensor]:
        """Append actions to the log in place, where there is room."""
        log = [part.contiguous() for part in self._log_leaves(state)]
        rows = self._all[self._elapsed < self._capacity]
        for leaf, part, action in zip(self._actions.leaves, log, stored):
            part.view(self._count, self._capacity, *leaf.shape).numpy()[rows, self._elapsed[rows]] = action[rows]
        return log

    def _check_current(self, state: State) -> None:
        if state["episode"] is self._latest[0] and state["elapsed"] is self._latest[1]:
            return
        for name, live in (("episode", self._episode), ("elapsed", self._elapsed)):
            if not np.array_equal(state[name].cpu().numpy().reshape(-1), live):
                raise SettingError(
                    f"the state given to step() is not where the live environments of {self.name} are, {name} differs: "
                    f"give the latest state, or call restore() first"
                )

    # -------------------------------------------------------------------------------------------------------- restore

    def _adopt(self, state: State) -> None:
        """Set the bookkeeping to that of a saved state, after a check of its shapes."""
        names = {"key", "seed", "episode", "elapsed", "observation"} | ({"actions"} if self.exact_resume else set())
        if set(state) != names:
            raise CheckpointError(
                f"a state with {sorted(state)}, expected {sorted(names)}: it is of another kind of world"
            )
        shapes = {name: tuple(leaf.shape) for name, leaf in tree.flatten(state).items()}
        expected = self._shapes()
        if shapes != expected:
            wrong = next(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))
            raise CheckpointError(
                f"the saved state's {wrong} has shape {shapes.get(wrong)}, expected {expected.get(wrong)} for "
                f"{self.name} with the axes {self._batch}: it is of another world"
            )
        self._device = next(tree.leaves(state["observation"])).device
        self._key, self._seed, self._episode, self._elapsed = (
            state[name].cpu().numpy().reshape(-1).copy() for name in ("key", "seed", "episode", "elapsed")
        )
        self._next_seed = self._seeds_of(self._all, self._episode + 1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        tensor = torch.empty(0, device="cpu")
        shapes = dict.fromkeys(("key", "seed", "episode", "elapsed"), self._batch)
        parts = [("observation", self._observations, self._batch)]
        if self.exact_resume:
            parts.append(("actions", self._actions, (*self._batch, self._capacity)))
        for name, layout, axes in parts:
            flat = tree.flatten({name: layout.nest([tensor] * len(layout.leaves))})
            for path, leaf in zip(flat, layout.leaves):
                shapes[path] = (*axes, *leaf.shape)
        return shapes

    def _replay(self, state: State) -> Array:
        """Replay every row's episode; `[R]` bool, the rows whose observations differ from the saved ones."""
        if isinstance(self._rows, VectorRows):
            return np.ones(self._count, np.bool_)
        log = [part.cpu().flatten(0, len(self._batch) - 1).numpy() for part in self._log_leaves(state)]
        taken = [
            self._actions.to_env_actions(
                [part[row, : self._elapsed[row]].astype(leaf.stored) for part, leaf in zip(log, self._actions.leaves)]
            )
            for row in self._all
        ]
        fits = self._elapsed <= self._capacity
        running = self._rows.replay(self._all.tolist(), self._seed.tolist(), taken)
        same = np.array(running) & fits
        saved = self._observations.unnest(state["observation"], "a saved observation")
        for part, new in zip(saved, self._rows.buffers.observation):
            old = part.detach().cpu().reshape(new.shape).numpy()
            same &= np.array([a.tobytes() == b.tobytes() for a, b in zip(old, new)])
        return ~same

    def _why_lost(self, lost: Array) -> str:
        advice = "resume with inexact=True (on the command line --inexact), which starts new episodes there"
        if isinstance(self._rows, VectorRows):
            return f"{self.name} resets its environments itself, so their state cannot be replayed: {advice}"
        row = int(np.flatnonzero(lost)[0])
        long = int(self._elapsed[row])
        reason = (
            f"is {long} steps long and only {self._capacity} were kept (max_log)"
            if long > self._capacity
            else f"shows another observation after its {long} steps were replayed"
        )
        return (
            f"{int(lost.sum())} of {self._count} rows of {self.name} cannot be brought back; episode "
            f"{int(self._episode[row])} of row {row} {reason}: {advice}"
        )
