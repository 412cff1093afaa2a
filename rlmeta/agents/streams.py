"""Separate reward streams: each with its own value head, discount and advantages; the advantages are summed.

    A = A_task + sum over streams of coefficient A_stream        (Burda et al., 2018, section 2.3)

A stream's value network is an owner (an auxiliary trainable module, see `learning.owners`): its weights are kept beside
the agent's, in `state["values"]`, and its gradient is not part of the norm by which the agent's is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.networks import value_network
from rlmeta.engine.capture import Capture
from rlmeta.functional import losses, optim, tree
from rlmeta.functional.axes import align
from rlmeta.functional.returns import generalized_advantage
from rlmeta.learning import owners
from rlmeta.learning.collect import Rollout
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.minibatch import Minibatches, flatten_time
from rlmeta.learning.state import Params, State
from rlmeta.nn import Block, Context, bare
from rlmeta.rewards import SeparateReward

EPSILON = 1e-5
"""Epsilon of the Adam that trains the value heads."""


class StreamValue:
    """Value network (critic) of one extra reward stream, such as an intrinsic reward: the network `value_NAME`."""

    def __init__(self, settings: Any, reward: SeparateReward, observation_space: gym.Space, recorded: bool) -> None:
        self.settings, self.reward, self.observation_space = settings, reward, observation_space
        self.name = f"value_{reward.name}"
        self.network = bare(self.networks)[self.name]
        self.capture = Capture() if recorded else None

    def networks(self) -> dict[str, Block]:
        """Build the network, like the agent's own value network."""
        tasks = getattr(self.settings, "task_heads", 0)
        return {self.name: value_network(self.settings, self.observation_space, tasks=tasks)}

    def value(self, p: Params, observation: tree.Tree, ctx: Context | None = None) -> Tensor:
        """State values of preprocessed observations `[*L, ...]`."""
        tensors = {**p["weights"], **p["buffers"]}
        value: Tensor = self.network.run(tensors, observation, ctx or Context(), f"{self.name}.")
        return value

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Value loss `[*L]` of a minibatch `[*L, B, ...]`."""
        loss = losses.value_loss(self.value(p, batch["observation"], ctx), batch["return"], batch["valid"])
        return {self.name: batch["coefficient"] * loss}


class Streams:
    """Value heads of an agent's separate reward streams, by the names of their rewards; there may be none.

    Args:
        settings: of the agent.
        rewards: those with a value function of their own.
        observation_space: of one environment.
        recorded: whether the value networks may be recorded.
    """

    def __init__(
        self, settings: Any, rewards: Sequence[SeparateReward], observation_space: gym.Space, recorded: bool
    ) -> None:
        self.values = [StreamValue(settings, reward, observation_space, recorded) for reward in rewards]
        self.rewards = tuple(rewards)

    def init(self, state: State) -> State:
        """Initial state of the value heads, by the names of their streams."""
        rate = state["params"]["hyper"]["learning_rate"]
        return {
            head.reward.name: owners.init(head, owners.own_key(state, f"values/{head.reward.name}"), _optimizer(rate))
            for head in self.values
        }

    @torch.no_grad()
    def credit(
        self,
        state: State,
        rollout: Rollout,
        rewards: dict[str, Tensor],
        preprocess: Callable[[Params, tree.Tree], tree.Tree],
    ) -> tuple[Tensor, tree.Tree]:
        """Estimate the weighted advantages of all streams, `[*L, T, N]`, and the training data of the value heads.

        Args:
            state: of the learners.
            rollout: `[*L, T, N, ...]`.
            rewards: all streams.
            preprocess: function from the agent's parameters and observations to network inputs, such as normalisation.

        Returns:
            The sum over streams of coefficient times advantage; and by stream the batch of its value head.
        """
        hyper, axes = state["params"]["hyper"], state["key"].dim()
        weighted_advantages, batches = [], {}
        observation, next_observation = (
            preprocess(state["params"], rollout[name]) for name in ("observation", "next_observation")
        )
        for head in self.values:
            name = head.reward.name
            p = owners.packed(state["values"][name])["params"]
            value, next_value = head.value(p, observation), head.value(p, next_observation)
            advantage = stream_advantage(
                rewards[name],
                value,
                next_value,
                rollout,
                hyper[f"{name}.gamma"],
                hyper["gae_lambda"],
                head.reward.episodic,
            )
            weighted_advantages.append(align(hyper[f"{name}.coefficient"], advantage) * advantage)
            batch = {"observation": observation, "return": advantage + value, "valid": rollout["valid"]}
            batches[name] = flatten_time(batch, axes)
        return torch.stack(weighted_advantages).sum(0), batches

    def learn(
        self,
        state: State,
        batches: tree.Tree,
        make_minibatches: Callable[[tree.Tree], Minibatches],
        rate: Tensor,
    ) -> State:
        """Train the value heads of the active learners, on the same minibatches as the agent.

        Args:
            state: of the learners; consumed.
            batches: of `credit`.
            make_minibatches: function from a batch to the minibatches of all epochs.
            rate: Adam's step size, `[*L]`.
        """
        hyper, values = state["params"]["hyper"], dict(state["values"])
        constants = {"coefficient": hyper["value_coefficient"]}
        for head in self.values:
            name = head.reward.name
            values[name] = owners.train_without_metrics(
                head, values[name], make_minibatches(batches[name]), constants, _optimizer(rate), state["active"],
                hyper["max_grad_norm"],
            )  # fmt: skip
            owners.deactivate_nonfinite(state, values[name])
        state["values"] = values
        return state


def _optimizer(rate: Tensor) -> optim.Optimizer:
    return optim.adam(rate, eps=EPSILON)


def stream_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    rollout: Rollout,
    gamma: Tensor,
    lambda_: Tensor,
    episodic: bool,
) -> Tensor:
    """Generalized advantage estimation for one reward stream, `[*L, T, N]`.

    The return of a stream that is not episodic continues over the end of an episode, whose last step is followed by
    the first one of the next episode. The last row of a rollout bootstraps from the observation that it ends with.

    Args:
        reward, value, next_value: `[*L, T, N]`, as in `functional.returns`.
        rollout: its flags.
        gamma, lambda_: `[*L]`.
        episodic: whether the return ends with an episode.
    """
    ended, valid = rollout["terminated"] | rollout["truncated"], rollout["valid"]
    if episodic:
        discount = align(gamma, reward) * ~rollout["terminated"]
        return generalized_advantage(reward, discount, value, next_value, ended | ~valid, lambda_)
    # with NEXT_STEP autoreset an invalid row follows the end of an episode: its action is ignored, and its next
    # observation is the first of the next episode; without one the next row begins that episode
    next_episode_value = torch.where(valid[..., 1:, :], value[..., 1:, :], next_value[..., 1:, :])
    successor_value = torch.where(ended, torch.cat((next_episode_value, next_value[..., -1:, :]), -2), next_value)
    # the sum of TD errors is cut before an invalid row, which has none; the successor value stands for what comes later
    before_invalid = torch.cat((~valid[..., 1:, :], torch.zeros_like(valid[..., -1:, :])), -2)
    discount = align(gamma, reward).expand_as(reward)
    return generalized_advantage(reward, discount, value, successor_value, before_invalid | ~valid, lambda_)
