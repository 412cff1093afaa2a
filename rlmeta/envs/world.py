"""Vectorised environments: the protocol of worlds, `N` environments for each of `*L` learners."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import gymnasium as gym
from torch import Tensor

from rlmeta.functional.tree import Tree

EVALUATION_LIMIT = 10_000
"""Steps after which an evaluation truncates episodes of environments that declare no time limit."""

State: TypeAlias = dict[str, Any]
"""State of a world: a nested dictionary of tensors, every leaf `[*L, N, ...]`."""


class Transition(NamedTuple):
    """Transition of every environment of every learner in a step."""

    observation: Tree
    """`[*L, N, ...]`: the observation to act on next, after an episode end the first one of the new episode."""
    next_observation: Tree
    """`[*L, N, ...]`: the true successor, the final observation where the episode ended."""
    reward: Tensor
    """`[*L, N]` float32."""
    terminated: Tensor
    """`[*L, N]` bool: the successor is a terminal state, of value 0."""
    truncated: Tensor
    """`[*L, N]` bool: the episode was truncated here. If both flags are set, losses use `terminated`."""
    valid: Tensor
    """`[*L, N]` bool: False where the action was ignored (the reset step of a NEXT_STEP environment)."""
    memory_reset: Tensor
    """`[*L, N]` bool: recurrent memory must be reset before acting on `observation`."""


class TrialTransition(NamedTuple):
    """Transition in trials of several episodes; `terminated` and `truncated` are those of the trial."""

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
    """Episode ends that are scored, `[*L, N]` bool: also those within a trial."""
    if isinstance(transition, TrialTransition):
        return transition.ended & transition.valid
    return (transition.terminated | transition.truncated) & transition.valid


class World(Protocol):
    """World: `N` environments for each of `*L` learners, with an explicit state."""

    name: str
    """Name of the environments, for messages."""
    observation_space: gym.Space
    """Observation space of a single environment."""
    action_space: gym.Space
    """Action space of a single environment."""
    learner_shape: tuple[int, ...]
    num_envs: int
    trial_episodes: int
    """Number of episodes in a trial (`envs.native.trials`), else 1."""
    exact_resume: bool
    """Whether `restore` always brings every environment back to exactly the saved state."""

    @property
    def max_episode_steps(self) -> int | None:
        """Time limit of an episode in steps, None if the environments declare none."""
        ...

    def reset(self, key: Tensor) -> State:
        """Initial state, at the start of every environment's first episode; `key` is `[*L]`."""
        ...

    def observation(self, state: State) -> Tree:
        """Current observation `[*L, N, ...]`: float32 for Box, int64 if discrete, a dict for Dict and Tuple."""
        ...

    def step(self, state: State, action: Tensor) -> tuple[State, Transition | TrialTransition]:
        """Step every environment, with Box actions clipped to their bounds. May consume `state`."""
        ...

    def restore(self, state: State) -> State:
        """Bring hidden state (of live gymnasium environments) to that of a loaded `state`."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...
