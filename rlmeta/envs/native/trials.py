"""Trials of several episodes of the same task, for RL² (Duan et al., 2016; Wang et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, NativeWorld, Redraw, choose
from rlmeta.envs.world import State, TrialTransition
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree


class TrialWorld(NativeWorld):
    """Native world of trials: several episodes in a row have the same physics, and are one episode to the agent.

    Within a trial, the end of an episode sets neither flag, the successor is the first observation of the next episode,
    and memory is kept. The end of the trial terminates the agent's episode. `TrialTransition.ended` marks the ends of
    single episodes, which are scored.

    Args:
        env, learner_shape, num_envs, physics: as for `NativeWorld`.
        episodes: number of episodes in a trial.
    """

    def __init__(
        self,
        env: NativeEnv,
        learner_shape: tuple[int, ...] = (),
        num_envs: int = 1,
        physics: Mapping[str, Tensor | float] | Redraw | None = None,
        *,
        episodes: int,
    ) -> None:
        super().__init__(env, learner_shape, num_envs, physics)
        self.trial_episodes, self.defers = episodes, False

    def step(  # type: ignore[override]
        self, state: State, action: Tensor, predrawn_noise: Tree | None = None
    ) -> tuple[State, TrialTransition]:
        """Step every environment; where an episode ends, the next one of this or the next trial starts."""
        last = (state["episode"] + 1) % self.trial_episodes == 0
        new, inner = super().step(state, action, predrawn_noise)
        ended = inner.memory_reset
        over = ended & last
        successor = tree.map(
            lambda here, there: choose(ended & ~over, here, there), inner.observation, inner.next_observation
        )
        never = torch.zeros_like(over)
        return new, TrialTransition(inner.observation, successor, inner.reward, over, never, inner.valid, over, ended)

    def _physics(self, key: Tensor, episode: Tensor) -> dict[str, Tensor]:
        return super()._physics(key, episode // self.trial_episodes)
