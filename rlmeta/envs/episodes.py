"""Record of episodes: what one learner did in each of its environments, to be shown again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium as gym
from torch import Tensor

from rlmeta.envs.world import EVALUATION_LIMIT, State, Transition, TrialTransition, ended_of
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree


class Step(NamedTuple):
    """Step of an environment; its tensors are without the axes of learners and environments."""

    action: Tree
    reward: Tensor
    ended: Tensor
    """Whether it ended the episode."""
    successor: State
    """State of a native environment after it, {} of another."""


@dataclass
class Episode:
    """Episode of an environment: the part of the world's state that it began with, and its steps."""

    start: State
    steps: list[Step] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return bool(self.steps) and bool(self.steps[-1].ended)


class EpisodeRecorder:
    """World that records the first episodes of one learner in each of its environments, and steps as the world does.

    Args:
        world: the environments `[S, N]` of all learners.
        learner: index of the learner.
        rounds: number of episodes of each environment.
        native: whether the environments are native, so that their states are recorded; of others actions and seeds are.
    """

    def __init__(self, world: Any, learner: int, rounds: int, native: bool) -> None:
        self._world, self._learner, self._native, self._rounds = world, learner, native, rounds
        self._limit = max(EVALUATION_LIMIT, world.max_episode_steps or 0)
        self.name: str = world.name
        self.observation_space: gym.Space = world.observation_space
        self.action_space: gym.Space = world.action_space
        self.learner_shape: tuple[int, ...] = world.learner_shape
        self.num_envs: int = world.num_envs
        self.trial_episodes: int = world.trial_episodes
        self.exact_resume: bool = world.exact_resume
        self.max_episode_steps: int | None = world.max_episode_steps
        self._rows: list[list[Episode]] = [[] for _ in range(self.num_envs)]
        self._waits = [False] * self.num_envs

    @property
    def episodes(self) -> list[Episode]:
        """The recorded episodes, those of one environment after those of another, as an evaluation orders them."""
        return [episode for row in self._rows for episode in row]

    def reset(self, key: Tensor) -> State:
        """Reset the world; every environment that has episodes left begins one."""
        state: State = self._world.reset(key)
        for row in range(self.num_envs):
            self._waits[row] = False
            self._begin(row, state)
        return state

    def observation(self, state: State) -> Tree:
        """Current observation `[S, N, ...]`."""
        return self._world.observation(state)

    def step(self, state: State, action: Tree) -> tuple[State, Transition | TrialTransition]:
        """Step the world and record it."""
        successor = self._world.successor(state, action) if self._native else {}
        new, transition = self._world.step(state, action)
        step = Step(action, transition.reward, ended_of(transition), successor)
        for row in range(self.num_envs):
            if self._goes_on(row):
                episode = self._rows[row][-1]
                episode.steps.append(Step(*(self._of(part, row) for part in step)))
                if episode.over:
                    self._begin(row, new)
                elif len(episode.steps) >= self._limit:  # an evaluation cuts it, and waits for a reset
                    self._waits[row] = True
        return new, transition

    def restore(self, state: State) -> State:
        """Bring the world's hidden state to that of `state`."""
        restored: State = self._world.restore(state)
        return restored

    def close(self) -> None:
        """Close the world."""
        self._world.close()

    def _goes_on(self, row: int) -> bool:
        last = self._rows[row][-1]
        return not (self._waits[row] or last.over)

    def _begin(self, row: int, state: State) -> None:
        """Begin a row's next episode, unless it has all that are recorded."""
        if len(self._rows[row]) < self._rounds:
            kept = ("env", "physics") if self._native else ("seed",)
            self._rows[row].append(Episode(self._of({name: state[name] for name in kept if name in state}, row)))

    def _of(self, part: Tree, row: int) -> Any:
        return tree.map(lambda leaf: leaf[self._learner, row].clone(), part)
