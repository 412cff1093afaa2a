"""What an agent sees of its environments: a world of `N` environments for each of `*L` learners."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import gymnasium as gym
from torch import Tensor

from rlmeta.functional.tree import Tree

EVALUATION_LIMIT = 10_000
"""Steps after which an evaluation cuts the episodes of environments that declare no limit."""

State: TypeAlias = dict[str, Any]
"""A nested dictionary of tensors; every leaf of a world's state is `[*L, N, ...]`."""


class Transition(NamedTuple):
    """One step of every environment of every learner."""

    observation: Tree
    """`[*L, N, ...]`: what the agent sees next, the first observation of the new episode where one ended."""
    next_observation: Tree
    """`[*L, N, ...]`: the true successor, the final observation where the episode ended."""
    reward: Tensor
    """`[*L, N]` float32."""
    terminated: Tensor
    """`[*L, N]` bool: the successor is terminal, its value is zero."""
    truncated: Tensor
    """`[*L, N]` bool: the episode was cut here. Both flags may be set; losses let `terminated` win."""
    valid: Tensor
    """`[*L, N]` bool: False where the action was ignored (the reset step of a NEXT_STEP environment)."""
    memory_reset: Tensor
    """`[*L, N]` bool: the agent must clear its memory before it acts on `observation`."""


class TrialTransition(NamedTuple):
    """One step of every environment in trials of several episodes; the flags are those of the trials."""

    observation: Tree
    next_observation: Tree
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    memory_reset: Tensor
    ended: Tensor
    """`[*L, N]` bool: an episode of the trial ended."""


def ended_of(transition: Transition | TrialTransition) -> Tensor:
    """Where episodes end that are to be scored, `[*L, N]`: within a trial, too."""
    if isinstance(transition, TrialTransition):
        return transition.ended & transition.valid
    return (transition.terminated | transition.truncated) & transition.valid


class World(Protocol):
    """`N` environments for each of `*L` learners, with everything that changes in an explicit state."""

    name: str
    """Of its environments, for messages."""
    observation_space: gym.Space
    """Of a single environment."""
    action_space: gym.Space
    """Of a single environment."""
    learner_shape: tuple[int, ...]
    num_envs: int
    trial_episodes: int
    """Episodes that are one to their agent: of a trial (`envs.native.trials`), else 1."""
    exact_resume: bool
    """Whether `restore` always brings every environment back to exactly where the state says."""

    @property
    def cuts_after(self) -> int | None:
        """Steps after which the environments cut an episode, as far as they declare it."""
        ...

    def reset(self, key: Tensor) -> State:
        """The state at the start of every row's first episode; `key` is `[*L]`."""
        ...

    def observation(self, state: State) -> Tree:
        """The current observation `[*L, N, ...]`: float32 for Box, int64 if discrete, a dict for Dict and Tuple."""
        ...

    def step(self, state: State, action: Tensor) -> tuple[State, Transition | TrialTransition]:
        """Act once in every environment, Box actions clipped to their bounds. May consume `state`."""
        ...

    def restore(self, state: State) -> State:
        """Put what is hidden (live foreign environments) where a loaded `state` says."""
        ...

    def close(self) -> None:
        """Release what the environments hold."""
        ...
