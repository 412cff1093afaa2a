"""Potential-based reward shaping (Ng, Harada and Russell, 1999), which keeps optimal policies optimal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.axes import align
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.settings import require_range
from rlmeta.learning.state import State
from rlmeta.rewards.reward import Memory, Rewards, called, check_name

Potential = Callable[[tree.Tree], Tensor]
"""Potential function: from observations `[*L, ...]` to numbers `[*L, ...]` without the observation's own axes."""


@dataclass(frozen=True)
class PotentialShaping:
    """Reward shaping by a potential Phi: adds the stream F = gamma Phi(s') - Phi(s).

    Phi of a terminal state is 0, or the optimal policy changes; a truncated episode keeps the potential of its final
    observation, whose value the agent bootstraps from. gamma is the agent's own, learner by learner.
    """

    potential: Potential
    """Potential Phi, a function of a batch of observations."""
    gamma: float | None = None
    """Discount that the potential was made for, which must be the agent's; None for any."""
    name: str = "shaping"
    """Name of the reward stream."""

    def __post_init__(self) -> None:
        check_types(self)
        check_name(self.name)
        if self.gamma is not None:
            require_range(self, "gamma", 0.0, 1.0)

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Initial memory: empty.

        Raises:
            SettingError: the agent discounts by another gamma, the potential gives no number for an observation, or
                it depends on something else than the observation, such as its place in time.
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
        self._check_steps(world.observation(state["world"]), world.learner_shape, world.num_envs)
        return {}

    def _check_steps(self, observation: tree.Tree, learners: tuple[int, ...], num_envs: int) -> None:
        """Check that the potential of observations `[*L, N, ...]` does not depend on the time or the environment."""
        axes = len(learners)

        def moved(leaf: Tensor) -> Tensor:
            return torch.stack([leaf.roll(places, axes) for places in range(3)], axes)

        alone = self.evaluate(observation, (*learners, num_envs))
        steps = self.evaluate(tree.map(moved, observation), (*learners, 3, num_envs))
        if not torch.allclose(steps, moved(alone), rtol=1e-4, atol=1e-5):
            raise SettingError(
                "the potential of the same observations changes with their place in the batch: it must be a function "
                "of one observation alone; what depends on time needs the time in the observation "
                "(gymnasium.wrappers.TimeAwareObservation)"
            )

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Add the stream of shaping rewards."""
        shape = tuple(rollout["reward"].shape)
        here = self.evaluate(rollout["observation"], shape)
        there = self.evaluate(rollout["next_observation"], shape).masked_fill(rollout["terminated"], 0.0)
        gamma = align(state["params"]["hyper"]["gamma"], here)
        shaping = (gamma * there - here).masked_fill(~rollout["valid"], 0.0)
        return memory, {**rewards, self.name: shaping.to(rollout["reward"].dtype)}, {}

    def evaluate(self, observation: tree.Tree, shape: tuple[int, ...]) -> Tensor:
        """Evaluate the potential of observations, after a check that it gives one number for each.

        Raises:
            SettingError: the function fails, another shape, or a value that is not finite.
        """
        potential = called(self.potential, "the potential", observation)
        if not isinstance(potential, Tensor) or tuple(potential.shape) != shape:
            actual = tuple(potential.shape) if isinstance(potential, Tensor) else type(potential).__name__
            raise SettingError(
                f"the potential gave {actual} for a batch of observations {shape}, expected one number for each: "
                "keep the leading axes, work on the last ones"
            )
        bad = ~torch.isfinite(potential)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            example = tree.map(lambda leaf: leaf[where].tolist(), observation)
            raise SettingError(f"the potential is {float(potential[where]):g} for the observation {example}")
        return potential if potential.is_floating_point() else potential.to(torch.float32)
