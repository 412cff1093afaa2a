"""Trials of several episodes of one task, as RL² learns from them (Duan et al., 2016; Wang et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, NativeWorld, Redraw, choose
from rlmeta.envs.world import State, TrialTransition
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree


class TrialWorld(NativeWorld):
    """A native world in which so many episodes in a row have the same physics, and are one to their agent.

    Within a trial the step after the last of an episode is the first of the next: neither flag is set, its successor is
    that first observation, and the memory stays. Where the trial ends, so does the agent's episode: it terminates.
    `TrialTransition.ended` says where episodes end, for whoever scores them.

    Args:
        env, learner_shape, num_envs, physics: as for `NativeWorld`.
        episodes: of a trial.
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
        self.trial_episodes = episodes

    def step(  # type: ignore[override]
        self, state: State, action: Tensor, ahead: Tree | None = None
    ) -> tuple[State, TrialTransition]:
        """Act once in every row; a row whose episode ends starts its next one at once, in the same trial or another."""
        last = (state["episode"] + 1) % self.trial_episodes == 0
        new, found = super().step(state, action, ahead)
        ended = found.memory_reset
        over = ended & last
        successor = tree.map(
            lambda here, there: choose(ended & ~over, here, there), found.observation, found.next_observation
        )
        never = torch.zeros_like(over)
        return new, TrialTransition(found.observation, successor, found.reward, over, never, found.valid, over, ended)

    def _physics(self, key: Tensor, episode: Tensor) -> dict[str, Tensor]:
        return super()._physics(key, episode // self.trial_episodes)
