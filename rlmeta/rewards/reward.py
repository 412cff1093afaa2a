"""Reward relabelling between acting and learning: shaping, bonuses, learned rewards, in the order of the settings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

Rewards = dict[str, Tensor]
"""Reward streams by name, `[*L, T, N]` each; `task` is the environment's own. The agent learns from the sum of all
but those with a value function of their own (`SeparateReward`)."""

TASK = "task"
"""Name of the stream of the environment's own rewards."""

Memory = State
"""State of a reward: a nested dictionary of tensors that start with `*L`, kept in `state["rewards"]`."""


class Reward(Protocol):
    """Reward that adds, changes or replaces reward streams. It never writes in place."""

    @property
    def name(self) -> str:
        """Name of its memory in the state; two rewards of one agent have different names."""
        ...

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Initial memory of a run, after a check that the reward fits the agent and the world."""
        ...

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Relabel the reward streams of a rollout; returns the new memory, the new streams, and metrics `[*L]`."""
        ...


@runtime_checkable
class RewardSettings(Protocol):
    """Settings of a reward that needs the agent's spaces, such as one with networks."""

    @property
    def name(self) -> str:
        """Name of its memory and stream."""
        ...

    def bind(self, observation_space: gym.Space, action_space: gym.Space) -> Reward:
        """Create the reward for an observation and an action space."""
        ...


@runtime_checkable
class SeparateReward(Reward, Protocol):
    """Reward with a value function of its own: its stream, of its own name, is not added to the task's reward.

    The agent learns from A = A_task + coefficient A_stream. The hyper-parameters `NAME.coefficient` and `NAME.gamma`
    `[*L]` are those of settings that declare them `PerLearner`.
    """

    episodic: bool
    """Whether the stream's return ends with an episode; else it goes on into the next."""


def separate_rewards(rewards: Sequence[Reward]) -> tuple[SeparateReward, ...]:
    """Select the rewards with value functions of their own."""
    return tuple(reward for reward in rewards if isinstance(reward, SeparateReward))


def total_reward(streams: Rewards, separate: Sequence[SeparateReward] = ()) -> Tensor:
    """Total reward: the sum of the streams `[*L, T, N]` without a value function of their own; 0 if all have one."""
    names = {reward.name for reward in separate}
    ordinary = [stream for name, stream in streams.items() if name not in names]
    return torch.stack(ordinary).sum(0) if ordinary else torch.zeros_like(next(iter(streams.values())))


def bind_rewards(rewards: Sequence[Any], observation_space: gym.Space, action_space: gym.Space) -> tuple[Reward, ...]:
    """Create the rewards of an agent for an observation and an action space."""
    return tuple(
        reward.bind(observation_space, action_space) if isinstance(reward, RewardSettings) else reward
        for reward in rewards
    )


def check_rewards(rewards: Sequence[Any]) -> tuple[Any, ...]:
    """Validate the `rewards` of a settings object, each with a name of its own.

    Raises:
        SettingError: no tuple of rewards, what is no reward, a class, or a name that is taken.
    """
    example = "expected rewards such as PotentialShaping(potential) or EpisodicCounts()"
    if not isinstance(rewards, list | tuple):
        raise SettingError(f"rewards is {rewards!r}, {example}: a single one is (reward,)")
    for reward in rewards:
        if isinstance(reward, type):
            raise SettingError(f"rewards has the class {reward.__name__}, {example}: make one, {reward.__name__}(...)")
        methods = ("init", "relabel")
        works = isinstance(reward, RewardSettings) or all(callable(getattr(reward, method, None)) for method in methods)
        if not works:
            raise SettingError(f"rewards has {reward!r}, {example}")
        if not hasattr(reward, "name"):
            cls = type(reward).__name__
            raise SettingError(f"the reward {cls} has no name: give its class one, such as name = {cls.lower()!r}")
        check_name(reward.name)
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"two rewards named {name!r}: give one of them another name=")
    return tuple(rewards)


def check_name(name: Any) -> None:
    """Validate the name of a reward stream.

    Raises:
        SettingError: no text, nothing, with a "/", or "task", which is the environment's own stream.
    """
    if not isinstance(name, str) or not name or "/" in name or name == TASK:
        raise SettingError(f'a reward is named {name!r}, expected a text without "/" that is not {TASK!r}')


def called(function: Any, name: str, observation: tree.Tree) -> Any:
    """Call a user's function on observations `[*L, ...]`.

    Raises:
        SettingError: it fails.
    """
    try:
        return function(observation)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree.leaves(observation))
        raise SettingError(
            f"{name} fails for a batch of observations {shapes}: {type(error).__name__}: {error}. It is given many at "
            "once: keep the leading axes, work on the last ones"
        ) from error


def check_memory(reward: Reward, memory: Any, key: Tensor) -> Memory:
    """Validate the result of `init`: a memory in which every tensor starts with the learner axes of the key `[*L]`.

    Raises:
        SettingError: it is none.
    """
    if not isinstance(memory, dict):
        raise SettingError(f"init of the reward {reward.name!r} gave {type(memory).__name__}, expected a dictionary")
    for name, leaf in tree.flatten(memory).items():
        if not isinstance(leaf, Tensor) or leaf.shape[: key.dim()] != key.shape:
            raise SettingError(
                f"init of the reward {reward.name!r} gave {_described(leaf)} as {name!r} of its memory, expected a "
                f"tensor that starts with the learners {tuple(key.shape)}"
            )
    return memory


def checked(reward: Reward, result: Any, like: Tensor) -> tuple[Memory, Rewards, dict[str, Tensor]]:
    """Validate the result of `relabel`: a memory, reward streams like the task's `[*L, T, N]`, and metrics `[*L]`.

    Streams of whole numbers or truth values become numbers like the task's. One that is not finite stays: it stops
    its own learner alone.

    Raises:
        SettingError: it is none.
    """
    where = f"relabel of the reward {reward.name!r} gave"
    if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(part, dict) for part in result):
        raise SettingError(f"{where} {_described(result)}, expected (memory, streams, metrics), three dictionaries")
    memory, streams, metrics = result
    if not streams:
        raise SettingError(f"{where} no stream of rewards, expected at least one to learn from")
    for name, stream in streams.items():
        if not isinstance(stream, Tensor) or stream.shape != like.shape:
            raise SettingError(
                f"{where} {_described(stream)} as the stream {name!r}, expected a tensor {tuple(like.shape)}"
            )
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor) or metric.shape != like.shape[:-2]:
            raise SettingError(
                f"{where} {_described(metric)} as the metric {name!r}, expected {tuple(like.shape[:-2])}"
            )
    return memory, {name: stream.to(like.dtype) for name, stream in streams.items()}, metrics


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def relabel(
    agent: Any, rewards: tuple[Reward, ...], state: State, rollout: Rollout, streams: Rewards
) -> tuple[State, Rewards, dict[str, Tensor]]:
    """Relabel the reward streams of a rollout with every reward, in order.

    Returns:
        The state with the memories moved on; the streams; and metrics `[*L]`: the rewards' own, and
        `rewards/STREAM`, the mean of each stream over the rollout's steps.
    """
    memories, metrics = dict(state["rewards"]), dict[str, Tensor]()
    own = streams
    for reward in rewards:
        result = reward.relabel(agent, state, memories[reward.name], rollout, streams)
        memories[reward.name], streams, reported = checked(reward, result, rollout["reward"])
        _warn_of_numbers(reward, streams, rollout["valid"], state["active"])
        metrics.update(reported)
    state["rewards"] = memories
    valid = rollout["valid"].to(rollout["reward"].dtype)
    steps = valid.sum((-2, -1)).clamp(min=1)
    for name, stream in {**own, **streams}.items():
        metrics[f"rewards/{name}"] = (stream * valid).sum((-2, -1)) / steps
    return state, streams, metrics


def _warn_of_numbers(reward: Reward, streams: Rewards, valid: Tensor, active: Tensor) -> None:
    """Warn of rewards that are not finite: learning from them stops the learner."""
    for name, stream in streams.items():
        bad = (~stream.isfinite() & valid).flatten(-2).any(-1) & active
        if bool(bad.any()):
            learners = bad.reshape(-1).nonzero().flatten().tolist()
            text = f"the reward {reward.name!r} gave a stream {name!r} that is not finite, to learners {learners}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
