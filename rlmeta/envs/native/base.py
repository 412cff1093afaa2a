"""Base class of native environments, and the world that vectorises one over rows and learners."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.data.spaces import Layout
from rlmeta.envs import nonfinite
from rlmeta.envs.native.drawing import Drawing, Picture, observed
from rlmeta.envs.world import State, Transition
from rlmeta.errors import SettingError, SpaceError, unknown_name
from rlmeta.functional import random, tree
from rlmeta.functional.tree import Tree

Physics: TypeAlias = Mapping[str, Tensor]
"""Constants of an environment by name, a value per row: `[*L, N, *shape of the constant]`."""

Redraw: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
"""Function from keys of the rows `[*L, N]` to the physics of the episodes that start there."""

_AT_ONCE = 8192  # random numbers drawn at once; with more, their own cost exceeds that of the calls
_FARTHEST = 64  # most counters drawn at once


class NativeEnv(ABC):
    """Native environment: a frozen dataclass of constants with pure methods on tensors of any leading shape.

    Below, `[*B]` is that leading shape (a world passes `[*L, N]`), float tensors of a state are float64, `noise` holds
    uniform numbers in (0, 1), and `physics` overrides constants by name: a method reads
    `physics.get("gravity", self.gravity)`.
    """

    max_episode_steps: int | None
    """Time limit in steps, after which episodes are truncated; None for none."""

    costly_observation = False
    """Whether to observe takes longer than to keep a state: if so, a rollout's final observations are made at once."""

    @property
    def reset_noise(self) -> int:
        """Number of uniform random numbers that `reset` needs; a subclass sets a class attribute."""
        return 0

    @property
    def step_noise(self) -> int:
        """Number of uniform random numbers that `step` needs; a subclass sets a class attribute."""
        return 0

    @property
    @abstractmethod
    def observation_space(self) -> gym.Space:
        """Observation space of a single environment."""

    @property
    @abstractmethod
    def action_space(self) -> gym.Space:
        """Action space of a single environment: Discrete or Box."""

    @abstractmethod
    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state of an episode; `noise` is `[*B, reset_noise]`."""

    def restart(self, state: State, noise: Tensor, physics: Physics) -> State:
        """Initial state of the episode after that of `state`; by default nothing outlives an episode, as in `reset`."""
        return self.reset(noise, physics)

    @abstractmethod
    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Transition of a step.

        Args:
            state: as `reset` or `step` returned it; not written to.
            action: `[*B]` int64 for Discrete, `[*B, *shape]` float64 for Box.
            noise: `[*B, step_noise]`.
            physics: constants that differ from the dataclass's.

        Returns:
            The new state, the reward `[*B]` float32 and `terminated` `[*B]` bool.
        """

    @abstractmethod
    def observe(self, state: State) -> Tree:
        """Observation of a state: float32 for Box, int64 for Discrete."""

    def drawing(self) -> Drawing:
        """How a state is drawn: by default its observation is, at ten pictures a second."""

        def draw(state: State, physics: Physics) -> Picture:
            rows = tree.map(lambda leaf: leaf.unsqueeze(0), state)
            return observed(self.observation_space, tree.map(lambda leaf: leaf[0], self.observe(rows)))

        return Drawing(draw, 10)

    def constants(self) -> dict[str, Tensor]:
        """Constants that physics may override, with shape and dtype: by default every field declared as a float."""
        names = [f.name for f in dataclasses.fields(self) if f.type in ("float", float)]  # type: ignore[arg-type]
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64, device="cpu") for name in names}


def clip(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Clamp `x` to [low, high], where each bound is a number or a tensor that broadcasts against `x`."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
        return torch.minimum(torch.maximum(x, low), high)
    return x.clamp(low, high)


class _NoiseCache:
    """Cache of uniform random numbers of a stream, drawn ahead for several counters of every row.

    The numbers are exactly `random.uniform(key, stream, counter, (width,))`. With few rows the cost of a hash is all
    overhead, and many counters cost hardly more than one. As a cache the numbers are in no state.
    """

    def __init__(self, stream: str, width: int, rows: int) -> None:
        self._stream, self._width = stream, width
        fitting = max(2, min(_FARTHEST, _AT_ONCE // max(1, rows * width)))
        self.counters = 1 << (fitting.bit_length() - 1)  # a power of two
        self._key = torch.empty(0, dtype=torch.int64, device="cpu")
        self._window = {"first": self._key, "draws": self._key}

    def window(self, key: Tensor, counter: Tensor, count: int) -> dict[str, Tensor]:
        """Random numbers for at least `count` counters, from each row's `counter` `[*L, N]` on.

        Returns:
            `draws` `[*L, N, counters, width]`, and `first` `[*L, N]`, the counter of the first.
        """
        known = key.device == self._key.device and torch.equal(key, self._key)
        if known:
            offset = counter - self._window["first"]
            known = not bool(((offset < 0) | (offset > self.counters - count)).any())
        if not known:
            self._key = key.clone()
            counters = counter.unsqueeze(-1) + torch.arange(self.counters, device=key.device)
            draws = random.uniform(key.unsqueeze(-1), self._stream, counters, (self._width,), torch.float64)
            self._window = {"first": counter.clone(), "draws": draws}
        return self._window

    def at(self, key: Tensor, counter: Tensor) -> Tensor:
        """Random numbers `[*L, N, width]` of each row's `key` and `counter`, both `[*L, N]`."""
        return _pick(self.window(key, counter, 1), counter)


def _pick(window: Mapping[str, Tensor], counter: Tensor) -> Tensor:
    """Select random numbers `[*L, N, width]` at each row's `counter` `[*L, N]`, from a window that covers it."""
    draws = window["draws"]
    offset = counter - window["first"]
    index = offset[..., None, None].expand(*offset.shape, 1, draws.shape[-1])
    return draws.gather(-2, index).squeeze(-2)


class NativeWorld:
    """World of a native environment, `num_envs` rows for every learner, with SAME_STEP autoreset.

    The state has `env` (of the environment), `key` (per row), `episode` and `elapsed` (int64), `step_count` if the
    environment's steps are random, and `physics` if a constant is overridden. For user environments it has
    `nonfinite`, a code of the first NaN or infinity (see `warn_of_nonfinite`). Every leaf is `[*L, N, ...]`. The random
    numbers of a row depend on its learner's key, its index, its episode and step alone. The spaces are those of the
    dataclass's constants, whatever the physics.

    Args:
        env: the environment and its constants.
        learner_shape: `*L`.
        num_envs: `N`.
        physics: None; or constants by name, each `[*L', *shape of the constant]` where `*L'` is a prefix of `[*L, N]`;
            or a function from keys of the rows `[*L, N]` to such constants, called at the start of every episode.

    Raises:
        SettingError: a count is below 1, or physics has a wrong shape.
        SpaceError: the action space is neither Discrete nor Box.
        UnknownNameError: a name in physics is no constant of the environment.
    """

    exact_resume = True
    trial_episodes = 1
    recordable: bool
    """Whether steps with random numbers from `predraw_noise` may be recorded; not if physics is drawn every episode."""
    varies: bool
    """Whether rows or episodes have constants of their own, so that `env` does not tell them."""
    defers: bool
    """Whether `step` may leave successors to be observed later: costly observations, of rlmeta's own environments."""

    def __init__(
        self,
        env: NativeEnv,
        learner_shape: tuple[int, ...] = (),
        num_envs: int = 1,
        physics: Mapping[str, Tensor | float] | Redraw | None = None,
    ) -> None:
        if num_envs < 1 or any(size < 1 for size in learner_shape):
            raise SettingError(
                f"num_envs={num_envs} and learner_shape={learner_shape}: expected positive counts of environments and "
                "learners; leave the learner shape () for one learner"
            )
        self.env, self.name = env, f"environment {type(env).__name__!r}"
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.learner_shape, self.num_envs = tuple(learner_shape), num_envs
        self._rows = (*self.learner_shape, num_envs)
        self._constants = env.constants()
        self._redraw: Redraw | None = physics if callable(physics) else None
        self.recordable = self._redraw is None
        self.varies = physics is not None
        self._fixed = None if physics is None or callable(physics) else self._per_row(physics)
        self._bounds = _action_bounds(env.action_space)
        self._observations, self._unseen = Layout(env.observation_space), True
        self._watched, self._reported = not type(env).__module__.startswith("rlmeta."), False
        self.defers = env.costly_observation and not self._watched
        self._reset_noise = _NoiseCache("environment/reset", env.reset_noise, math.prod(self._rows))
        self._step_noise = _NoiseCache("environment/step", env.step_noise, math.prod(self._rows))

    @property
    def max_episode_steps(self) -> int | None:
        """Time limit of an episode in steps, None for none."""
        return self.env.max_episode_steps

    def reset(self, key: Tensor) -> State:
        """Initial state, at the start of episode 0 of every row; `key` is `[*L]` int64."""
        return self.start(key, 0)

    def start(self, key: Tensor, episode: int | Tensor) -> State:
        """State at the start of any episode; `episode` is a number or broadcasts against `[*L, N]`.

        Raises:
            SettingError: `key` has another shape than the learners.
        """
        if key.shape != self.learner_shape:
            raise SettingError(
                f"a key of shape {tuple(key.shape)} for learners {self.learner_shape}: pass one key per learner, such "
                "as functional.random.make_keys(seeds)"
            )
        rows = random.fold(key.unsqueeze(-1), torch.arange(self.num_envs, device=key.device))
        episode = torch.as_tensor(episode, dtype=torch.int64, device=key.device).expand(self._rows).clone()
        physics = self._physics(rows, episode)
        state: State = {
            "env": self.env.reset(self._first_noise(rows, episode), physics),
            "key": rows,
            "episode": episode,
            "elapsed": torch.zeros_like(episode),
        }
        if self.env.step_noise:
            state["step_count"] = episode << 32  # so that no two episodes share their noise
        if physics:
            state["physics"] = physics
        if self._watched:
            wrong = ~_finite(self.env.observe(state["env"]), self._rows)
            state["nonfinite"] = wrong.to(torch.int64) * _FIRST_OBSERVATION
            self.warn_of_nonfinite(state)
        return state

    def observation(self, state: State) -> Tree:
        """Current observation `[*L, N, ...]`."""
        return self.env.observe(state["env"])

    def observe(self, successors: State) -> Tree:
        """Observation of states that a deferred step has left, `[*L, ..., N, ...]`."""
        return self.env.observe(successors)

    def step(
        self, state: State, action: Tensor, predrawn_noise: Tree | None = None, *, deferred: bool = False
    ) -> tuple[State, Transition]:
        """Step every environment; where an episode ends, the next one starts in the same step.

        With noise from `predraw_noise` no operation depends on a tensor's value, so that the step can be recorded;
        without them, discrete actions are checked to be in their space.

        Args:
            state: of the world.
            action: `[*L, N, ...]`.
            predrawn_noise: as above.
            deferred: leave the transition's observations to the caller, if `defers`: `next_observation` is the state
                before another episode begins, for `observe`, and `observation` is left out, for `observation(state)`.

        Raises:
            SpaceError: an action has another shape or dtype than its space, or is outside of it; or, at the first step,
                the environment returned tensors of wrong shapes or dtypes.
        """
        key, episode, physics = state["key"], state["episode"], state.get("physics", {})
        new: State = {"key": key}
        if self.env.step_noise:
            new["step_count"] = state["step_count"] + 1
        env_state, reward, terminated = self._advance(state, action, predrawn_noise)
        observation = next_observation = env_state if deferred else self.env.observe(env_state)
        if self._unseen and not deferred:
            self._check_form(observation, reward, terminated)
        elapsed = state["elapsed"] + 1
        limit = self.env.max_episode_steps
        truncated = torch.zeros_like(terminated) if limit is None else elapsed >= limit
        done = terminated | truncated
        if predrawn_noise is not None or done.any():
            episode, elapsed = episode + done, elapsed.masked_fill(done, 0)
            if self._redraw is not None:
                physics = self._physics(key, episode)  # unchanged in rows whose episode continues
            fresh = self.env.restart(env_state, self._first_noise(key, episode, predrawn_noise), physics)
            env_state = _where(done, fresh, env_state)
            observation = {} if deferred else self.env.observe(env_state)
        new.update(env=env_state, episode=episode, elapsed=elapsed)
        if physics:
            new["physics"] = physics
        valid = torch.ones_like(done)
        transition = Transition(observation, next_observation, reward, terminated, truncated, valid, done)
        if self._watched:
            new["nonfinite"] = self._nonfinite(state, transition)
            if predrawn_noise is None:
                self.warn_of_nonfinite(new)
        return new, transition

    def successor(self, state: State, action: Tensor) -> State:
        """State of the environments after a step, before `step` begins another episode where one has ended."""
        return self._advance(state, action, None)[0]

    def _advance(self, state: State, action: Tensor, predrawn_noise: Tree | None) -> tuple[State, Tensor, Tensor]:
        """Environments' state after a step, its reward, and whether it terminates the episode."""
        noise = self._no_noise(state["key"])
        if self.env.step_noise:
            count = state["step_count"]
            drawn = predrawn_noise
            noise = self._step_noise.at(state["key"], count) if drawn is None else _pick(drawn["step"], count)
        action = self._legal(action, look=predrawn_noise is None)
        return self.env.step(state["env"], action, noise, state.get("physics", {}))

    def warn_of_nonfinite(self, state: State) -> None:
        """Warn once of the first reward or observation that was not finite, with its row and step.

        Only user environments are checked. Steps without noise from `predraw_noise` call this themselves; recorded
        steps cannot, so their caller does so from time to time.
        """
        if not self._watched or self._reported or not bool((state["nonfinite"] != 0).any()):
            return
        self._reported, codes = True, state["nonfinite"].flatten()
        row = int(codes.nonzero()[0])
        step, what = divmod(int(codes[row]), len(_FINDINGS))
        nonfinite.warn(self.name, _FINDINGS[what], row, self._rows, step)

    def _nonfinite(self, state: State, transition: Transition) -> Tensor:
        """Code of the first NaN or infinity so far, `[*L, N]`: episode step times `len(_FINDINGS)`, plus kind."""
        codes = ~_finite(transition.observation, self._rows) * _FIRST_OBSERVATION
        step = (state["elapsed"] + 1) * len(_FINDINGS)
        codes = torch.where(_finite(transition.next_observation, self._rows), codes, step + _OBSERVATION)
        codes = torch.where(transition.reward.isfinite(), codes, step + _REWARD)
        return torch.where(state["nonfinite"] == 0, codes, state["nonfinite"])

    def predraw_noise(self, state: State) -> tuple[Tree, int]:
        """Random numbers for the next steps, and the number of steps for which they suffice."""
        counters = {"reset": ("episode", self._reset_noise), "step": ("step_count", self._step_noise)}
        if not self.env.step_noise:
            del counters["step"]
        if not self.env.reset_noise:
            del counters["reset"]
        steps = min((noise.counters // 2 for _, noise in counters.values()), default=_FARTHEST)
        drawn = {name: noise.window(state["key"], state[entry], steps + 1) for name, (entry, noise) in counters.items()}
        return drawn, steps

    def restore(self, state: State) -> State:
        """The state itself, since native environments have no hidden state."""
        return state

    def close(self) -> None:
        """Release nothing."""

    def _no_noise(self, key: Tensor) -> Tensor:
        return torch.empty((*self._rows, 0), dtype=torch.float64, device=key.device)

    def _first_noise(self, key: Tensor, episode: Tensor, predrawn_noise: Tree | None = None) -> Tensor:
        """Random numbers of the first state of an episode, `[*L, N, reset_noise]`."""
        if not self.env.reset_noise:
            return self._no_noise(key)
        if predrawn_noise is None:
            return self._reset_noise.at(key, episode)
        return _pick(predrawn_noise["reset"], episode)

    def _physics(self, key: Tensor, episode: Tensor) -> dict[str, Tensor]:
        """Draw or copy the physics of episodes; every call returns new tensors, since a state may be written to."""
        physics = self._fixed or {}
        if self._redraw is not None:
            physics = self._per_row(self._redraw(random.fold(random.fold(key, "environment/physics"), episode)))
        return {name: value.to(key.device, copy=True) for name, value in physics.items()}

    def _per_row(self, physics: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        aligned = {}
        for name, constant_value in physics.items():
            if name not in self._constants:
                raise unknown_name(f"constant of {type(self.env).__name__}", name, self._constants)
            constant = self._constants[name]
            device = constant_value.device if isinstance(constant_value, Tensor) else "cpu"
            value = torch.as_tensor(constant_value, dtype=constant.dtype, device=device)
            axes = value.dim() - constant.dim()
            if axes < 0 or value.shape != self._rows[:axes] + constant.shape:
                raise SettingError(
                    f"physics {name!r} has shape {tuple(value.shape)}: expected that of a prefix of the rows "
                    f"{self._rows} followed by the constant's own {tuple(constant.shape)}"
                )
            value = value.reshape(self._rows[:axes] + (1,) * (len(self._rows) - axes) + constant.shape)
            aligned[name] = value.expand(self._rows + constant.shape).contiguous()
        return aligned

    def _legal(self, action: Tensor, look: bool) -> Tensor:
        """Cast an action to the dtype of the environment; clip it or, if `look`, check that it is in its space."""
        space, owner = self.action_space, type(self.env).__name__
        expected = (*self._rows, *(space.shape or ()))
        if not isinstance(action, Tensor) or tuple(action.shape) != expected:
            received = f"of shape {tuple(action.shape)}" if isinstance(action, Tensor) else type(action).__name__
            raise SpaceError(
                f"an action for {owner} is {received}, expected a tensor {expected}: the learner and environment axes, "
                f"then the shape of {space}"
            )
        if action.is_complex() or (self._bounds is None and action.is_floating_point()):
            kind = "whole numbers" if self._bounds is None else "numbers"
            raise SpaceError(f"an action for {owner} has dtype {action.dtype}, expected {kind} for {space}")
        if self._bounds is None:
            action = action.to(torch.int64)
            if look:
                least, greatest = (int(extreme) for extreme in action.aminmax())
                if least < 0 or greatest >= space.n:  # type: ignore[attr-defined]
                    wrong = least if least < 0 else greatest
                    raise SpaceError(f"the action {wrong} for {owner} is not in its space {space}")
            return action
        low, high = (bound.to(action.device) for bound in self._bounds)
        return action.to(torch.float64).clamp(low, high)

    def _check_form(self, observation: Tree, reward: Tensor, terminated: Tensor) -> None:
        """Check shapes and dtypes that would be broadcast or cast silently.

        Raises:
            SpaceError: a shape or dtype is not that of the interface of `NativeEnv`.
        """
        self._unseen = False
        returned = {f"observation {name}".rstrip(): leaf for name, leaf in tree.flatten(observation).items()}
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"observation {leaf.name}".rstrip(): ((*self._rows, *leaf.shape), _TORCH[leaf.stored.name])
            for leaf in self._observations.leaves
        }
        returned |= {"reward": reward, "terminated": terminated}
        expected |= {"reward": (self._rows, torch.float32), "terminated": (self._rows, torch.bool)}
        for name in sorted({*returned, *expected}):
            form = (tuple(returned[name].shape), returned[name].dtype) if name in returned else None
            if form != expected.get(name):
                raise SpaceError(
                    f"{type(self.env).__name__} gave {name} as {_in_words(form)}, expected "
                    f"{_in_words(expected.get(name))} for the rows {self._rows}: correct its step() or observe()"
                )


_FINDINGS = ("", "gave a reward that is not finite", *["gave an observation that is not finite"] * 2)
_REWARD, _OBSERVATION, _FIRST_OBSERVATION = 1, 2, 3
"""Indices into `_FINDINGS`; the last one is for the first observation of an episode, at step 0."""


def _finite(observation: Tree, rows: tuple[int, ...]) -> Tensor:
    """Whether the observation of each row is finite, `[*L, N]`; those of wrong shape are refused elsewhere."""
    leaves = list(tree.leaves(observation))
    shown = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.shape[: len(rows)] == rows]
    fine = [leaf.isfinite().reshape(*rows, -1).all(-1) for leaf in shown]
    return torch.stack(fine).all(0) if fine else torch.ones(rows, dtype=torch.bool, device=leaves[0].device)


_TORCH = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}


def _in_words(form: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "nothing" if form is None else f"{form[1]} of shape {form[0]}"


def _action_bounds(space: gym.Space) -> tuple[Tensor, Tensor] | None:
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return None
    if isinstance(space, gym.spaces.Box):
        return torch.from_numpy(space.low).double(), torch.from_numpy(space.high).double()
    raise SpaceError(f"a native environment acts in Discrete(n) from 0 or Box, not in {space}: change its action_space")


def _where(condition: Tensor, chosen: Mapping[str, Any], other: Mapping[str, Any]) -> State:
    """Select `chosen` in rows where `condition` `[*L, N]` is set and `other` elsewhere, leaf by leaf."""

    return tree.map(lambda a, b: choose(condition, a, b), chosen, other)


def choose(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Select `chosen` `[*L, N, ...]` in rows where `condition` `[*L, N]` is set and `other` elsewhere."""
    return torch.where(condition.reshape(condition.shape + (1,) * (chosen.dim() - condition.dim())), chosen, other)
