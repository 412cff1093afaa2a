"""Random network distillation, RND (Burda et al., 2018): an exploration bonus, the prediction error of a network.

    bonus(s') = |predictor(s') - target(s')|^2 / outputs, divided by the running deviation of its return

The target is a random network that never changes, the predictor learns its answers where the agent has been: the error
is large where it has not. Observations are whitened and clipped to 5 deviations. The stream stays separate from the
task's: it has a discount and a value head of its own and goes on over the ends of episodes, and the agent learns from

    A = A_task + coefficient A_rnd
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.envs.world import World
from rlmeta.functional import optim, tree
from rlmeta.functional.axes import masked_mean
from rlmeta.functional.normalise import (
    normalise,
    normalise_reward,
    reward_init,
    reward_update,
    running_init,
    running_update,
)
from rlmeta.learning import owners
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.minibatch import flatten_time, minibatches
from rlmeta.learning.settings import PerLearner, require, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.nn import Block, Context, Encoder, bare
from rlmeta.nn.feature_pictures import feature_network
from rlmeta.rewards.reward import Memory, Rewards, check_name

FARTHEST = 5.0
"""Bound in deviations to which a whitened observation is clipped."""


@dataclass(frozen=True)
class RND:
    """Settings of random network distillation, for PPO and A2C: `rewards=(RND(),)`.

    A list for a number marked per learner compares its values.
    """

    coefficient: PerLearner = 1.0
    """Weight of the bonus's advantage beside the task's, which has 1."""
    gamma: PerLearner = 0.99
    """Discount factor of the bonus."""
    episodic: bool = False
    """Whether the return of the bonus ends with an episode; else it goes on into the next."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size for the predictor."""
    batch_size: int = 256
    """Steps in a minibatch of the predictor, which passes once over every rollout; a smaller rollout is one."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the hidden layers of both networks, which follow convolutions where observations are pictures."""
    outputs: int = 16
    """Number of outputs that the predictor predicts."""
    name: str = "rnd"
    """Name of the reward stream, and of the reward's memory in the state."""

    def __post_init__(self) -> None:
        check_types(self)
        check_name(self.name)
        require_range(self, "coefficient", 0.0)
        require_finite(self, "coefficient", "learning_rate")
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "learning_rate", 0.0, above=True)
        for name in ("batch_size", "outputs"):
            require_range(self, name, 1)

    def bind(self, observation_space: gym.Space, action_space: gym.Space) -> RNDReward:
        """Create the RND reward for an observation space."""
        return RNDReward(self, observation_space)


class RNDReward:
    """RND reward for an observation space: compute the bonus of every step, then train the predictor on the rollout."""

    def __init__(self, settings: RND, observation_space: gym.Space) -> None:
        self.settings, self.name, self.episodic = settings, settings.name, settings.episodic
        self.encoder = Encoder(observation_space)
        self.predictor = Predictor(observation_space, settings.hidden_sizes, settings.outputs)

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Initial RND memory: fresh networks for every learner, and empty running statistics.

        Raises:
            SettingError: `batch_size` does not divide the steps of a rollout.
        """
        s, steps, key = self.settings, agent.steps_per_iteration * world.num_envs, state["key"]
        require(
            steps % min(s.batch_size, steps) == 0,
            f"RND: batch_size {s.batch_size} does not divide the {steps} steps of a rollout: choose one that does",
        )
        memory: Memory = owners.init(
            self.predictor, owners.own_key(state, f"rewards/{self.name}"), self._optimizer(state)
        )
        memory["seen"] = running_init(key.shape, (self.encoder.features,), key.device)
        memory["return"] = reward_init(key.shape, world.num_envs, key.device)
        return memory

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Add the stream of exploration bonuses, then train the predictor on the observations of the rollout.

        Metrics: `rnd/loss`, the mean over the learner's gradient steps.
        """
        axes, valid, memory = state["key"].dim(), rollout["valid"], owners.packed(memory)
        features = self.encoder.run({}, rollout["next_observation"], Context())
        seen = running_update(memory["seen"], features.flatten(axes, axes + 1), valid.flatten(axes))
        whitened = normalise(features, seen, clip=FARTHEST)
        error = self.predictor.error(memory["params"], whitened).masked_fill(~valid, 0.0)
        ends = (rollout["terminated"] | rollout["truncated"]) & self.episodic
        gamma = state["params"]["hyper"][f"{self.name}.gamma"]
        returns = reward_update(memory["return"], error, ends, gamma, valid)
        batch = flatten_time({"observation": whitened, "valid": valid.to(whitened.dtype)}, axes)
        size = min(self.settings.batch_size, batch["valid"].shape[axes])
        batches = minibatches(memory["key"], state["count"]["iterations"], batch, size)
        memory, reported = owners.train(self.predictor, memory, batches, self._optimizer(state), state["active"])
        owners.deactivate_nonfinite(state, memory)
        memory |= {"seen": seen, "return": returns}
        return memory, {**rewards, self.name: normalise_reward(error, returns)}, {f"{self.name}/loss": reported["loss"]}

    def _optimizer(self, state: State) -> optim.Optimizer:
        return optim.adam(state["params"]["hyper"][f"{self.name}.learning_rate"])


class Predictor:
    """Predictor and random target network: gradient steps train the predictor to give the target's outputs."""

    def __init__(self, observation_space: gym.Space, hidden_sizes: tuple[int, ...], outputs: int) -> None:
        self._build = partial(feature_network, observation_space, hidden_sizes, outputs, activation="relu")
        blocks = bare(self.networks)
        self.predictor, self.target, self.capture = blocks["predictor"], blocks["target"], Capture()

    def networks(self) -> dict[str, Block]:
        """Build the two networks: `predictor`, and `target`, whose weights are frozen."""
        return {"predictor": self._build(), "target": self._build().requires_grad_(False)}

    def error(self, p: Params, observation: Tensor) -> Tensor:
        """Mean squared prediction error, `[*L, ..., D]` -> `[*L, ...]`."""
        answer = self.predictor.run(p["weights"], observation, Context(), "predictor.")
        right = self.target.run(p["buffers"], observation, Context(), "target.")
        return (answer - right).square().mean(-1)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Predictor loss: the mean prediction error `[*L]` on a minibatch of whitened observations `[*L, B, D]`."""
        return {"loss": masked_mean(self.error(p, batch["observation"]), batch["valid"])}
