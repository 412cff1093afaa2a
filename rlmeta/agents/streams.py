"""Reward streams that stay apart: each with its own value head, discount and credit; their advantages are summed.

    A = A_task + sum over streams of coefficient A_stream        (Burda et al., 2018, section 2.3)

A stream's value network is an owner (`learning.owners`): its weights lie beside the agent's, in `state["values"]`, and
no clip of the agent's gradient sees them.
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
from rlmeta.rewards import Apart

EPSILON = 1e-5
"""Of the Adam that moves the value heads."""


class StreamValue:
    """The value head of one stream, the network `value_NAME`."""

    def __init__(self, settings: Any, reward: Apart, observation_space: gym.Space, recorded: bool) -> None:
        self.settings, self.reward, self.observation_space = settings, reward, observation_space
        self.name = f"value_{reward.name}"
        self.network = bare(self.networks)[self.name]
        self.capture = Capture() if recorded else None

    def networks(self) -> dict[str, Block]:
        """A network like the agent's own for values."""
        tasks = getattr(self.settings, "task_heads", 0)
        return {self.name: value_network(self.settings, self.observation_space, tasks=tasks)}

    def value(self, p: Params, observation: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Of observations `[*L, ...]` as the networks see them."""
        tensors = {**p["weights"], **p["buffers"]}
        value: Tensor = self.network.run(tensors, observation, ctx or Context(), f"{self.name}.")
        return value

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """The value loss `[*L]` of a minibatch `[*L, B, ...]`."""
        loss = losses.value_loss(self.value(p, batch["observation"], ctx), batch["return"], batch["valid"])
        return {self.name: batch["coefficient"] * loss}


class Streams:
    """The streams of an agent that stay apart, by the names of their rewards; there may be none.

    Args:
        settings: of the agent.
        rewards: those that stay apart.
        observation_space: of one environment.
        recorded: whether the value networks may be recorded.
    """

    def __init__(self, settings: Any, rewards: Sequence[Apart], observation_space: gym.Space, recorded: bool) -> None:
        self.values = [StreamValue(settings, reward, observation_space, recorded) for reward in rewards]
        self.rewards = tuple(rewards)

    def init(self, state: State) -> State:
        """The value heads at the start, by the names of their streams."""
        rate = state["params"]["hyper"]["learning_rate"]
        return {
            head.reward.name: owners.init(head, owners.own_key(state, f"values/{head.reward.name}"), _optimizer(rate))
            for head in self.values
        }

    @torch.no_grad()
    def credit(
        self, state: State, rollout: Rollout, rewards: dict[str, Tensor], view: Callable[[Params, tree.Tree], tree.Tree]
    ) -> tuple[Tensor, tree.Tree]:
        """What the streams add to the advantage, `[*L, T, N]`, and what their value heads learn from, by stream.

        Args:
            state: of the learners.
            rollout: `[*L, T, N, ...]`.
            rewards: all streams.
            view: from the agent's parameters and observations to those as networks see them.
        """
        hyper, axes, total, batches = state["params"]["hyper"], state["key"].dim(), [], {}
        here, there = (view(state["params"], rollout[name]) for name in ("observation", "next_observation"))
        for head in self.values:
            name = head.reward.name
            p = owners.packed(state["values"][name])["params"]
            value, next_value = head.value(p, here), head.value(p, there)
            advantage = stream_advantage(
                rewards[name],
                value,
                next_value,
                rollout,
                hyper[f"{name}.gamma"],
                hyper["gae_lambda"],
                head.reward.episodic,
            )
            total.append(align(hyper[f"{name}.coefficient"], advantage) * advantage)
            batch = {"observation": here, "return": advantage + value, "valid": rollout["valid"]}
            batches[name] = flatten_time(batch, axes)
        return torch.stack(total).sum(0), batches

    def learn(
        self,
        state: State,
        batches: tree.Tree,
        cut: Callable[[tree.Tree], Minibatches],
        rate: Tensor,
    ) -> State:
        """Move the value heads of the learners that are active, on the minibatches that the agent learned from.

        Args:
            state: of the learners; consumed.
            batches: of `credit`.
            cut: into the minibatches of all epochs.
            rate: Adam's step size, `[*L]`.
        """
        hyper, values = state["params"]["hyper"], dict(state["values"])
        constants = {"coefficient": hyper["value_coefficient"]}
        for head in self.values:
            name = head.reward.name
            values[name] = owners.train_quietly(
                head, values[name], cut(batches[name]), constants, _optimizer(rate), state["active"],
                hyper["max_grad_norm"],
            )  # fmt: skip
            owners.stop(state, values[name])
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
    """The advantage of one stream, `[*L, T, N]`, by generalized advantage estimation.

    What is not episodic goes on over the end of an episode: its step is followed by the first of the next. The last
    row of a rollout has no next one and bootstraps from the observation that it ends with.

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
    # a row that is to be skipped leads from the end of an episode to the first observation of the next
    first = torch.where(valid[..., 1:, :], value[..., 1:, :], next_value[..., 1:, :])
    following = torch.where(ended, torch.cat((first, next_value[..., -1:, :]), -2), next_value)
    skipped = torch.cat((~valid[..., 1:, :], torch.zeros_like(valid[..., -1:, :])), -2)
    discount = align(gamma, reward).expand_as(reward)
    return generalized_advantage(reward, discount, value, following, skipped | ~valid, lambda_)
