"""Between acting and learning: an agent's rewards are relabelled by what its settings list in `rewards`, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

Rewards = dict[str, Tensor]
"""Streams of reward by name, `[*L, T, N]` each; `task` is the environment's own. The agent learns from their sum."""

Memory = State
"""What a reward remembers: a nested dictionary of tensors that start with `*L`, kept in `state["rewards"]`."""


class Reward(Protocol):
    """Something that adds, changes or replaces streams of reward. It never writes in place."""

    @property
    def name(self) -> str:
        """Of its memory in the state; two rewards of one agent have different names."""
        ...

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """The memory at the start of a run, after a check that the reward fits the agent and the world."""
        ...

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """The memory after a rollout, the streams as the next reward or the agent sees them, and metrics `[*L]`."""
        ...


def distinct(rewards: Sequence[Reward]) -> tuple[Reward, ...]:
    """The rewards, after a check that they are some and that each has a name of its own."""
    for reward in rewards:
        if not hasattr(reward, "relabel") or not hasattr(reward, "name"):
            raise SettingError(f"rewards has {reward!r}, expected rewards such as PotentialShaping or EpisodicCounts")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"two rewards named {name!r}: give one of them another name=")
    return tuple(rewards)


@torch.no_grad()
def relabel(
    agent: Any, rewards: tuple[Reward, ...], state: State, rollout: Rollout, streams: Rewards
) -> tuple[State, Rewards, dict[str, Tensor]]:
    """Let every reward relabel a rollout's streams.

    Returns:
        The state with the memories moved on; the streams; and metrics `[*L]`: the rewards' own, and
        `rewards/STREAM`, the mean of each stream over the rollout's steps.
    """
    memories, metrics = dict(state["rewards"]), dict[str, Tensor]()
    own = streams
    for reward in rewards:
        memories[reward.name], streams, said = reward.relabel(agent, state, memories[reward.name], rollout, streams)
        metrics.update(said)
    state["rewards"] = memories
    valid = rollout["valid"].to(rollout["reward"].dtype)
    steps = valid.sum((-2, -1)).clamp(min=1)
    for name, stream in {**own, **streams}.items():
        metrics[f"rewards/{name}"] = (stream * valid).sum((-2, -1)) / steps
    return state, streams, metrics
