"""Potential-based reward shaping (Ng, Harada and Russell, 1999): advice that changes no optimal policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.agents.rewards.reward import Memory, Rewards
from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.axes import align
from rlmeta.learning.collect import Rollout
from rlmeta.learning.state import State

Potential = Callable[[tree.Tree], Tensor]
"""From observations `[*L, ...]` to how promising they are, `[*L, ...]` without the observation's own axes."""


@dataclass(frozen=True)
class PotentialShaping:
    """F = gamma Phi(s') - Phi(s), added to what the agent learns from.

    Phi of a terminal state is 0, or the optimal policy changes; a truncated episode keeps the potential of its final
    observation, whose value the agent bootstraps from. gamma is the agent's own, learner by learner.
    """

    potential: Potential
    """A function of a batch of observations."""
    gamma: float | None = None
    """None; or the discount the potential was made for, which must be the agent's."""
    name: str = "shaping"
    """Of the stream."""

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Nothing to remember.

        Raises:
            SettingError: the agent discounts by another gamma, or the potential gives no number for an observation.
        """
        hyper = state["params"]["hyper"]
        if "gamma" not in hyper:
            raise SettingError(f"{type(agent).__name__} has no gamma: potential-based shaping needs a discount factor")
        if self.gamma is not None and not torch.allclose(hyper["gamma"], torch.full_like(hyper["gamma"], self.gamma)):
            raise SettingError(
                f"the potential was made for gamma {self.gamma:g}, the agent discounts by "
                f"{sorted(set(hyper['gamma'].flatten().tolist()))}: shaping with another gamma changes what is "
                "optimal; leave gamma out to take the agent's"
            )
        self.evaluate(world.observation(state["world"]), (*world.learner_shape, world.num_envs))
        return {}

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Add the stream of shaping."""
        shape = tuple(rollout["reward"].shape)
        here = self.evaluate(rollout["observation"], shape)
        there = self.evaluate(rollout["next_observation"], shape).masked_fill(rollout["terminated"], 0.0)
        gamma = align(state["params"]["hyper"]["gamma"], here)
        shaping = (gamma * there - here).masked_fill(~rollout["valid"], 0.0)
        return memory, {**rewards, self.name: shaping.to(rollout["reward"].dtype)}, {}

    def evaluate(self, observation: tree.Tree, shape: tuple[int, ...]) -> Tensor:
        """The potential of observations, after a check that there is one number for each.

        Raises:
            SettingError: another shape, or a value that is not finite.
        """
        found = self.potential(observation)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SettingError(
                f"the potential gave {given} for a batch of observations {shape}, expected one number for each: "
                "keep the leading axes, work on the last ones"
            )
        bad = ~torch.isfinite(found)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            example = tree.map(lambda leaf: leaf[where].tolist(), observation)
            raise SettingError(f"the potential is {float(found[where]):g} for the observation {example}")
        return found
