"""Check of an environment before training: spaces, contract, seeding, ends, action bounds, goals, NaN."""

from __future__ import annotations

import random as python_random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlmeta.data.spaces import Array, Layout
from rlmeta.envs.goals import ACHIEVED, DESIRED, PaysGoals, goals_of, has_goals
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import Template, first_reset
from rlmeta.envs.gymnasium.sources import VectorSource, resolve
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import NativeEnv, NativeWorld
from rlmeta.envs.task import Task
from rlmeta.envs.world import Transition, TrialTransition
from rlmeta.errors import (
    MissingExtraError,
    RlmetaError,
    SettingError,
    SpaceError,
    UnknownNameError,
    require_count,
)
from rlmeta.functional import random, tree

_MOST_ACTIONS = 64
"""Discrete actions, or corners of a Box, that are tried one by one."""
_SHORTEST = 10
"""Steps from which on episodes of one length look like a time limit."""


@dataclass(frozen=True)
class Finding:
    """Finding about an environment: what is wrong, or worth knowing, and what to do."""

    topic: str
    """Spaces, contract, seeding, autoreset, time limit, action bounds, goals, or not finite."""
    text: str
    wrong: bool = True
    """Whether training on it would go wrong; otherwise it is a note."""

    def __str__(self) -> str:
        return f"{'wrong' if self.wrong else 'note'}: {self.topic}: {' '.join(self.text.split())}"


class Episode(NamedTuple):
    """Episode, or the beginning of one: its observations, one more than the rewards, and how it ended."""

    observations: list[list[Array]]
    rewards: list[float]
    terminated: bool
    truncated: bool


def check(task: Task, steps: int = 1000, seed: int = 0) -> list[Finding]:
    """Check a task's environment by random play.

    Args:
        task: to check.
        steps: of each kind of play.
        seed: of play.

    Returns:
        What was found, each finding once; empty if nothing is.

    Raises:
        SettingError, MissingExtraError, UnknownNameError: the task cannot be made, for reasons that are not the
            environment's.
    """
    require_count("steps", steps)
    if isinstance(task.source, NativeEnv):
        return _unique(_check_native(task.source, steps, seed))
    try:
        source = resolve(task.source, task.settings, 2)
    except (SettingError, MissingExtraError, UnknownNameError):
        raise
    except RlmetaError as error:
        return [Finding("spaces" if isinstance(error, SpaceError) else "contract", str(error))]
    if isinstance(source, VectorSource):
        return _unique(_check_vector(task, source, steps, seed))
    return _unique(_check_single(source, steps, seed, task.max_episode_steps))


def _unique(findings: Iterator[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))


# ------------------------------------------------------------------------------------------- single environments


def _check_single(template: Template, steps: int, seed: int, limit: int | None) -> Iterator[Finding]:
    """Findings about a gymnasium environment; a check whose play fails ends with the failure."""
    yield from _check_action_space(template.action_space)
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _check_contract(template, steps, seed),
        lambda: _check_seeding(template, steps, seed),
        lambda: _check_ends(template, steps, seed, limit),
        lambda: _check_extremes(template, seed),
        lambda: _check_goals(template, min(steps, 200), seed),
    ]
    for part in checks:
        try:
            with failures.converting(template.name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from part()
        except RlmetaError as error:
            yield Finding("contract", str(error))


def _check_action_space(space: gym.Space[Any]) -> Iterator[Finding]:
    for leaf in Layout(space, "action").leaves:
        if isinstance(leaf.space, spaces.Box):
            low, high = leaf.space.low, leaf.space.high
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                text = f"the actions {leaf.space} have no bounds: a policy does not know in which units it acts"
                yield Finding("action bounds", f"{text}; give finite ones", False)
            elif (low >= high).any():
                yield Finding("action bounds", f"the actions {leaf.space} have equal bounds: nothing can be chosen")


def _check_contract(template: Template, steps: int, seed: int) -> Iterator[Finding]:
    """What reset and step return, and what they do with what they are handed."""
    env, layout = template.environment(), Layout(template.observation_space)
    name, actions = template.name, _Actions(template.action_space, seed)
    try:
        with _unchanged_generators() as changed:
            observation = first_reset(env, seed, name)[0]
        yield from _check_observation(observation, env.observation_space, layout, "reset()")
        if changed:
            text = f"reset() changes the generator of {' and '.join(changed)}, which is everyone's"
            yield Finding("seeding", f"{text}: draw from self.np_random, after super().reset(seed=seed)", False)
        episodes = 0
        for _ in range(steps):
            kept, action = _copied(layout, observation, name), actions.draw()
            handed = _flat(Layout(template.action_space, "action"), action)
            before = [np.array(part) for part in handed]
            result = env.step(action)
            if not all(np.array_equal(a, b) for a, b in zip(handed, before)):
                yield Finding("contract", "step() writes into the action that it is given: copy it first")
            if not all(map(_same_bits, kept, _copied(layout, observation, name))):
                text = "step() writes into the observation that it returned before: return a copy"
                yield Finding("contract", f"{text} (rlmeta copies it, others may not)", False)
            yield from _check_result(result)
            observation = result[0]
            yield from _check_observation(observation, env.observation_space, layout, "step()")
            if bool(result[2]) or bool(result[3]):
                episodes += 1
                observation = first_reset(env, seed + episodes, name)[0]
    finally:
        failures.close(env, name)


def _check_result(result: Any) -> Iterator[Finding]:
    """Types of the five values of a step."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise SettingError(f"step() returned {type(result).__name__}, expected gymnasium's 5 values")
    _, reward, terminated, truncated, info = result
    if not isinstance(reward, Real | np.number) and not (isinstance(reward, np.ndarray) and reward.shape == ()):
        yield Finding("contract", f"step() returned the reward {reward!r}, expected a number")
    elif not np.isfinite(float(reward)):
        yield Finding("not finite", f"step() returned the reward {reward!r}")
    for flag, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, bool | np.bool_):
            yield Finding("contract", f"step() returned {flag}={value!r}, expected True or False")
    if not isinstance(info, dict):
        yield Finding("contract", f"step() returned the info {info!r}, expected a dictionary")


def _check_observation(value: Any, space: gym.Space[Any], layout: Layout, source: str) -> Iterator[Finding]:
    """Whether an observation is in its space, and finite."""
    arrays = layout.read(value, (), source)
    fine = all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
    if not fine:
        yield Finding("not finite", f"{source} returned an observation with NaN or infinity")
    elif not space.contains(value):
        leaf = next((leaf for leaf, array in zip(layout.leaves, arrays) if not _within(leaf.space, array)), None)
        if leaf is None:
            text = f"{source} returned an observation of another dtype or type than {space}"
            yield Finding("spaces", f"{text}: cast it", False)
        else:
            text = f"{source} returned an observation{leaf.where} outside of its space {leaf.space}"
            yield Finding("spaces", f"{text}: widen the bounds, for pictures and bytes are scaled by them")


def _within(space: gym.Space[Any], array: Array) -> bool:
    return not isinstance(space, spaces.Box) or bool(((array >= space.low) & (array <= space.high)).all())


def _check_seeding(template: Template, steps: int, seed: int) -> Iterator[Finding]:
    """Whether a seed and actions determine an episode, in a new environment and in one that was played."""
    layout = Layout(template.observation_space)
    first, second = template.environment(), template.environment()
    try:
        length = min(steps, 200)
        episode = _play(first, template, layout, seed, length)
        if not _same(episode, _play(second, template, layout, seed, length)):
            text = f"two environments with seed {seed} and the same actions went different ways"
            yield Finding("seeding", f"{text}: draw from self.np_random alone, after super().reset(seed=seed)")
        elif not _same(episode, _play(first, template, layout, seed, length)):
            text = (
                f"after an episode reset(seed={seed}) does not lead to the same one again: something outlives reset()"
            )
            yield Finding("seeding", f"{text}; a run could not be resumed exactly")
        others = [_play(second, template, layout, seed + other, length) for other in (1, 2, 3)]
        if all(_same(episode, other) for other in others):
            yield Finding(
                "seeding", "four seeds gave the same episode: nothing is random, or the seed is not used", False
            )
    finally:
        failures.close(first, template.name)
        failures.close(second, template.name)


def _check_ends(template: Template, steps: int, seed: int, limit: int | None) -> Iterator[Finding]:
    """Time limits: that there is one, and that it truncates."""
    layout, env = Layout(template.observation_space), template.environment()
    declared, left = limit or template.max_episode_steps, steps
    episodes: list[Episode] = []
    try:
        while left > 0:
            episodes.append(_play(env, template, layout, seed + len(episodes), left, seed + len(episodes)))
            left -= len(episodes[-1].rewards)
    finally:
        failures.close(env, template.name)
    whole = [episode for episode in episodes if episode.terminated or episode.truncated]
    lengths = {len(episode.rewards) for episode in whole}
    if declared is None and not whole:
        text = f"no episode ended in {steps} steps and there is no time limit"
        yield Finding("time limit", f"{text}: register it with max_episode_steps, or give --max-episode-steps")
    if len(whole) >= 3 and len(lengths) == 1 and min(lengths) >= _SHORTEST and all(e.terminated for e in whole):
        text = f"all {len(whole)} episodes terminated after {min(lengths)} steps"
        yield Finding(
            "time limit",
            f"{text}: if that is a limit, return truncated=True instead, for the value of what would have followed",
            False,
        )
    if declared is not None and any(length > declared for length in lengths):
        yield Finding("time limit", f"an episode had {max(lengths)} steps, the limit is {declared}")
    if any(episode.terminated and episode.truncated for episode in whole):
        text = "an episode was terminated and truncated by the same step: rlmeta takes it for terminated"
        yield Finding("time limit", text, False)


def _check_extremes(template: Template, seed: int) -> Iterator[Finding]:
    """Steps with every discrete action, or with the corners of the bounds."""
    layout, env = Layout(template.observation_space), template.environment()
    try:
        for action in _extremes(template.action_space):
            first_reset(env, seed, template.name)
            try:
                result = env.step(action)
            except Exception as error:
                reason = failures.failed(f"step({action!r})", error)
                yield Finding("action bounds", f"{reason}, though the action is in {template.action_space}")
                return
            arrays = layout.read(result[0], (), "step()")
            if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
                text = f"the action {action!r} of {template.action_space} gave an observation with NaN or infinity"
                yield Finding("action bounds", text)
                return
    finally:
        failures.close(env, template.name)


def _check_goals(template: Template, steps: int, seed: int) -> Iterator[Finding]:
    """Whether compute_reward pays what a step paid, for one goal and for several at once."""
    env, actions = template.environment(), _Actions(template.action_space, seed)
    goals: Any = env.unwrapped
    try:
        if not has_goals(template.observation_space) or not isinstance(goals, PaysGoals):
            return
        achieved, desired, paid = [], [], []
        first_reset(env, seed, template.name)
        for number in range(steps):
            observation, reward, terminated, truncated, info = env.step(actions.draw())
            achieved.append(np.array(observation[ACHIEVED]))
            desired.append(np.array(observation[DESIRED]))
            paid.append(float(reward))
            again = float(goals.compute_reward(achieved[-1], desired[-1], info))
            if not np.isclose(again, paid[-1], rtol=1e-4, atol=1e-6):
                text = f"a step was paid {paid[-1]:g}, compute_reward of its goals says {again:g}"
                yield Finding("goals", f"{text}: hindsight would learn from another reward than the task's")
                return
            if terminated or truncated:
                first_reset(env, seed + 1 + number, template.name)
        several = np.asarray(goals.compute_reward(np.stack(achieved), np.stack(desired), {}))
        if several.shape != (steps,) or not np.allclose(several, paid, rtol=1e-4, atol=1e-6):
            text = f"compute_reward of {steps} goals at once, with an empty info, gave other rewards than one by one"
            yield Finding("goals", f"{text}: let it take goals [B, ...], as GoalEnv has it, and look at them alone")
    finally:
        failures.close(env, template.name)


def _extremes(space: gym.Space[Any]) -> Iterator[Any]:
    if isinstance(space, spaces.Discrete):
        yield from (space.start + np.int64(number) for number in range(min(int(space.n), _MOST_ACTIONS)))
    elif isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        yield from (space.low.copy(), space.high.copy())
        for index in range(min(space.low.size, _MOST_ACTIONS)):
            corner = space.low.copy()
            corner.reshape(-1)[index] = space.high.reshape(-1)[index]
            yield corner


class _Actions:
    """Random actions of a space, determined by a seed."""

    def __init__(self, space: gym.Space[Any], seed: int) -> None:
        self._layout = Layout(space, "action")
        self._rng = np.random.default_rng(seed)

    def draw(self) -> Any:
        """The next action, drawn uniformly; of a Box without bounds normally."""
        parts = [self._leaf(leaf.space).reshape(1, *leaf.shape) for leaf in self._layout.leaves]
        return self._layout.rows(parts)[0]

    def _leaf(self, space: gym.Space[Any]) -> Array:
        if isinstance(space, spaces.Box):
            bounded = np.isfinite(space.low) & np.isfinite(space.high)
            drawn = self._rng.uniform(np.where(bounded, space.low, 0), np.where(bounded, space.high, 1))
            values = np.where(bounded, drawn, np.clip(self._rng.normal(size=space.shape), space.low, space.high))
            return np.asarray(np.rint(values) if space.dtype.kind in "iu" else values).astype(space.dtype)
        if isinstance(space, spaces.Discrete):
            return np.asarray(space.start + self._rng.integers(space.n), np.int64)
        if isinstance(space, spaces.MultiDiscrete):
            return np.asarray(space.start + self._rng.integers(space.nvec), space.dtype)
        return np.asarray(self._rng.integers(2, size=space.shape), np.int8)


def _flat(layout: Layout, value: Any) -> list[Any]:
    """The arrays of a value, not copied where they are arrays."""
    parts = []
    for leaf in layout.leaves:
        part = value
        for step in leaf.path:
            part = part[step]
        parts.append(part)
    return parts


def _copied(layout: Layout, value: Any, source: str) -> list[Array]:
    return layout.read(value, (), source)


def _same_bits(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


def _play(
    env: gym.Env[Any, Any], template: Template, layout: Layout, seed: int, steps: int, action_seed: int = 0
) -> Episode:
    """One episode of random actions, or as many steps of it."""
    actions = _Actions(template.action_space, action_seed)
    observations = [layout.read(first_reset(env, seed, template.name)[0], (), "reset()")]
    rewards: list[float] = []
    terminated = truncated = False
    while len(rewards) < steps and not terminated and not truncated:
        observation, reward, terminated, truncated, _ = env.step(actions.draw())
        observations.append(layout.read(observation, (), "step()"))
        rewards.append(float(reward))
        terminated, truncated = bool(terminated), bool(truncated)
    return Episode(observations, rewards, terminated, truncated)


def _same(a: Episode, b: Episode) -> bool:
    flat = [[part for observation in episode.observations for part in observation] for episode in (a, b)]
    same = len(flat[0]) == len(flat[1]) and all(map(_same_bits, *flat))
    rewards = np.array_equal(np.asarray(a.rewards), np.asarray(b.rewards), equal_nan=True)
    return same and rewards and a[2:] == b[2:]


class _unchanged_generators:
    """Context after which the list that it gives names the global generators that were changed in it."""

    def __enter__(self) -> list[str]:
        self._before, self._changed = self._states(), list[str]()
        return self._changed

    def __exit__(self, *_: object) -> None:
        now = self._states()
        self._changed += [name for name, state in self._before.items() if state != now[name]]

    @staticmethod
    def _states() -> dict[str, Any]:
        numpy: Any = np.random.get_state()
        return {
            "numpy": (numpy[1].tobytes(), *numpy[2:]),
            "random": python_random.getstate(),
            "torch": torch.get_rng_state().numpy().tobytes(),
        }


# --------------------------------------------------------------------------------------- VectorEnvs and native ones


def _check_vector(task: Task, source: VectorSource, steps: int, seed: int) -> Iterator[Finding]:
    """Findings about a VectorEnv, by playing it as training does."""
    mode = source.env.metadata.get("autoreset_mode")
    if not isinstance(mode, gym.vector.AutoresetMode):
        text = f'{source.name} has the autoreset mode {mode!r} in metadata["autoreset_mode"]'
        yield Finding("autoreset", f"{text}, expected an entry of gymnasium.vector.AutoresetMode")
    failures.close(source.env, source.name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            world = GymnasiumWorld(task.source, (), 2, settings=task.settings)
            yield from _play_world(world, steps, seed)
        except RlmetaError as error:
            yield Finding("contract", str(error))
    for warning in caught:
        if source.name in str(warning.message):
            topic = "not finite" if "not finite" in str(warning.message) else "contract"
            yield Finding(topic, str(warning.message))


def _play_world(world: GymnasiumWorld, steps: int, seed: int) -> Iterator[Finding]:
    """Findings about a vectorised world: ends, and that rows differ."""
    actions, layout = _Actions(world.action_space, seed), Layout(world.action_space, "action")
    ended = 0
    try:
        state = world.reset(random.make_keys([seed])[0])
        if all(bool((leaf[0] == leaf[1]).all()) for leaf in tree.leaves(world.observation(state))):
            yield Finding("seeding", "two rows with different seeds began with the same observation", False)
        for _ in range(steps):
            rows = [_stored(layout, actions.draw()) for _ in range(2)]
            action = layout.nest([torch.from_numpy(np.stack(pair)) for pair in zip(*rows)])
            state, transition = world.step(state, action)
            ended += int((transition.terminated | transition.truncated).sum())
    finally:
        world.close()
    if not ended and world.max_episode_steps is None:
        yield Finding("time limit", f"no episode ended in {steps} steps and there is no time limit")


def _stored(layout: Layout, action: Any) -> list[Array]:
    """An action of the space as stored arrays, discrete ones counted from 0."""
    parts = [np.asarray(part) for part in _flat(layout, action)]
    return [part if leaf.is_box else np.asarray(part - leaf.start) for leaf, part in zip(layout.leaves, parts)]


def _check_native(env: NativeEnv, steps: int, seed: int) -> Iterator[Finding]:
    """Findings about a native environment, played with two learners of three rows."""
    try:
        world = NativeWorld(env, (2,), 3)
        keys = random.make_keys([seed, seed + 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from _play_native(world, keys, steps)
    except RlmetaError as error:
        yield Finding("contract", str(error))
    except Exception as error:
        yield Finding("contract", str(failures.failed(world.name, error)))


def _play_native(world: NativeWorld, keys: Tensor, steps: int) -> Iterator[Finding]:
    alone, owner = NativeWorld(world.env, (), 3), type(world.env).__name__
    state, single = world.reset(keys), alone.reset(keys[1])
    ended = 0
    for t in range(steps):
        action = _native_action(world, keys, t)
        kept = tree.map(torch.clone, state)
        new, transition = world.step(state, action)
        if not _same_tree(kept, state):
            yield Finding(
                "contract", f"the step() of {owner} writes into the state that it is given: return new tensors"
            )
        single, other = alone.step(single, action[1])
        own = tree.map(lambda leaf: leaf[1], {"observation": transition.observation, "reward": transition.reward})
        if not _same_tree(own, {"observation": other.observation, "reward": other.reward}):
            text = f"a learner of {owner} goes another way alone than beside another: its step() mixes rows"
            yield Finding("contract", f"{text}, or draws random numbers other than the noise it is given")
            return
        if not all(leaf.isfinite().all() for leaf in tree.leaves(transition.next_observation)):
            yield Finding("not finite", f"{owner} gave an observation with NaN or infinity")
        yield from _check_native_goals(world, transition)
        if not transition.reward.isfinite().all():
            yield Finding("not finite", f"{owner} gave a reward that is NaN or infinite")
        yield from _check_native_bounds(world, transition.next_observation)
        ended += int((transition.terminated | transition.truncated).sum())
        state = new
    if not ended and world.max_episode_steps is None:
        text = f"no episode of {owner} ended in {steps} steps and there is no time limit"
        yield Finding("time limit", f"{text}: set max_episode_steps")


def _check_native_goals(world: NativeWorld, transition: Transition | TrialTransition) -> Iterator[Finding]:
    """Whether the environment pays for a step's own goal what the step paid."""
    if not has_goals(world.observation_space) or not isinstance(world.env, PaysGoals):
        return
    goals, seen = goals_of(world), transition.next_observation
    same = torch.allclose(goals.reward(seen[ACHIEVED], seen[DESIRED]), transition.reward, equal_nan=True)
    if not same:
        text = f"compute_reward of {type(world.env).__name__} pays a step's own goals otherwise than the step did"
        yield Finding("goals", f"{text}: hindsight would learn from another reward than the task's")
    if goals.terminated is not None:
        ended = goals.terminated(seen[ACHIEVED], seen[DESIRED])
        if not torch.equal(ended, transition.terminated):
            text = f"compute_terminated of {type(world.env).__name__} ends a step otherwise than it did"
            yield Finding("goals", f"{text}: hindsight would learn from other ends than the task's")


def _check_native_bounds(world: NativeWorld, observation: Any) -> Iterator[Finding]:
    layout = Layout(world.observation_space)
    for leaf, part in zip(layout.leaves, layout.unnest(observation, "an observation")):
        outside = not _within(leaf.space, part.numpy())
        if outside or (not leaf.is_box and bool(((part < 0) | (part >= torch.as_tensor(leaf.count))).any())):
            text = f"{type(world.env).__name__} gave an observation{leaf.where} outside of its space {leaf.space}"
            yield Finding("spaces", f"{text}: widen the bounds, for pictures and bytes are scaled by them")


def _native_action(world: NativeWorld, keys: Tensor, counter: int) -> Tensor:
    """Uniform actions `[2, 3, ...]`; of a Box with infinite bounds normal ones."""
    space = world.action_space
    if isinstance(space, spaces.Discrete):
        return random.integers(keys, "check", counter, (3,), int(space.n))
    assert isinstance(space, spaces.Box)
    low, high = (torch.from_numpy(bound).double() for bound in (space.low, space.high))
    drawn = random.uniform(keys, "check", counter, (3, *space.shape), torch.float64)
    bounded = low.isfinite() & high.isfinite()
    return torch.where(bounded, low + (high - low) * drawn, torch.special.ndtri(drawn)).float()


def _same_tree(a: Any, b: Any) -> bool:
    first, second = tree.flatten(a), tree.flatten(b)
    return all(torch.equal(leaf, second[name]) or _both_nan(leaf, second[name]) for name, leaf in first.items())


def _both_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())
