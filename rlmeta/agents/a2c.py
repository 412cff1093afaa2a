"""Advantage actor-critic: the synchronous form of A3C (Mnih et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network, value_network
from rlmeta.agents.recurrence import MemoryName, Recurrence, SeenName, check_memory_settings
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.returns import generalized_advantage
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import Minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import ActionBounds, Block, bare
from rlmeta.rewards import Reward, check_rewards, total_reward


@dataclass(frozen=True)
class A2C:
    """Settings of A2C. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 5
    """Steps in every environment between updates."""
    learning_rate: PerLearner = 7e-4
    """The optimizer's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSProp as in the paper, or Adam."""
    rmsprop_decay: float = 0.99
    """Decay of RMSProp's running mean of squared gradients."""
    epsilon: float = 1e-5
    """The optimizer's epsilon."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    gae_lambda: PerLearner = 1.0
    """Lambda of generalized advantage estimation; 1 is the paper's n-step return."""
    entropy_coefficient: PerLearner = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: PerLearner = 0.5
    """Weight of the value loss, mean (return - value)^2."""
    normalise_advantage: bool = False
    """Normalise advantages over the rollout, to mean 0 and deviation 1."""
    max_grad_norm: PerLearner = 0.5
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    normalise_reward: bool = False
    """Divide rewards by the running deviation of their discounted return."""
    action_bounds: ActionBounds = "scale"
    """Box actions: take the bounds for the policy's unit, so that it acts on the scale of the task whatever it counts
    in; or squash actions into them by a tanh; or act in raw units, clipped at the bounds."""
    initial_log_std: float = 0.0
    """Box actions: the logarithm of the initial deviation, in the policy's unit."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    memory: MemoryName = "none"
    """A memory behind the body of every network, for partially observable tasks: a gated recurrent unit (GRU), an LSTM,
    or attention over the last steps; gradients then reach back num_steps."""
    memory_size: int = 64
    """Features of the memory."""
    memory_layers: int = 1
    """Layers of the memory."""
    context: int = 32
    """With attention: steps of its episode that the memory holds; a layer looks at these and at the present one."""
    attention_heads: int = 4
    """With attention: heads of every layer; twice their number divides memory_size."""
    sees: tuple[SeenName, ...] = ()
    """Additional inputs of the memory: the last action, its reward, whether an episode starts."""
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("learning_rate", "max_grad_norm", "epsilon"):
            require_range(self, name, 0.0, above=True)
        for name in ("gamma", "gae_lambda", "rmsprop_decay"):
            require_range(self, name, 0.0, 1.0)
        for name in ("entropy_coefficient", "value_coefficient"):
            require_range(self, name, 0.0)
        for name in ("num_envs", "num_steps"):
            require_range(self, name, 1)
        check_memory_settings(self)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> A2CAgent:
        """Create the A2C agent for an observation and an action space."""
        return A2CAgent(self, observation_space, action_space, methods)


class A2CAgent(Agent):
    """A2C agent for an observation and an action space."""

    settings: A2C
    supports_separate_rewards = True

    def __init__(
        self, settings: A2C, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        blocks = bare(self.networks)
        self.policy, self.value = blocks["policy"], blocks["value"]
        self.head: Any = self.policy.head
        if settings.memory != "none":
            self.recurrence = Recurrence(settings.sees, action_space, blocks)

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, the parameters of an action distribution, and `value`, the state value."""
        return {
            "policy": policy_network(self.settings, self.observation_space, self.action_space),
            "value": value_network(self.settings, self.observation_space, self.action_space),
        }

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(self.optimizer(hyper["learning_rate"]), state)
        return state

    def optimizer(self, rate: Tensor) -> optim.Optimizer:
        """Optimizer of the settings: RMSProp or Adam."""
        s = self.settings
        if s.optimizer == "adam":
            return optim.adam(rate, eps=s.epsilon)
        return optim.rmsprop(rate, alpha=s.rmsprop_decay, eps=s.epsilon)

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions `[*L, N, ...]`: a sample from the policy, or its mode."""
        distribution, memory_after = self.answer_at(self.policy, "policy", p, observation, memory)
        action = self.head.mode(distribution) if deterministic else self.head.sample(distribution, key)
        return action, memory_after(action)

    # ------------------------------------------------------------------ credit

    @torch.no_grad()
    def credit(self, p: Params, rollout: Rollout, rewards: dict[str, Tensor]) -> tree.Tree:
        """Estimate advantages and returns of every step, the training data of `losses`, `[*L, T, N, ...]`."""
        reward = total_reward(rewards, self.streams.rewards)
        inputs = self.inputs(rollout)
        value = self.forward(self.value, "value", p, inputs)
        next_value = self.forward(self.value, "value", p, self.next_inputs(rollout))
        discount = align(p["hyper"]["gamma"], reward) * ~rollout["terminated"]
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        advantage = generalized_advantage(reward, discount, value, next_value, cut, p["hyper"]["gae_lambda"])
        kept = {name: rollout[name] for name in ("action", "valid")}
        return {**kept, "observation": inputs, "advantage": advantage, "return": advantage + value, "old_value": value}

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Policy, value and entropy losses `[*L]` of a batch `[*L, B, ...]`."""
        h, batch = p["hyper"], self.samples(batch)
        valid = batch["valid"]
        distribution = self.forward(self.policy, "policy", p, batch["observation"], ctx)
        value = self.forward(self.value, "value", p, batch["observation"], ctx)
        advantage = batch["advantage"]
        if self.settings.normalise_advantage:
            advantage = losses.normalise_advantage(advantage, valid)
        policy = losses.policy_gradient_loss(self.head.log_prob(distribution, batch["action"]), advantage, valid)
        value_loss = losses.value_loss(value, batch["return"], valid)
        entropy = masked_mean(self.head.entropy(distribution), valid)
        ctx.info.update({"losses/policy_loss": policy, "losses/value_loss": value_loss, "losses/entropy": entropy})
        return {"policy": policy - h["entropy_coefficient"] * entropy, "value": h["value_coefficient"] * value_loss}

    def annealed(self, state: State) -> Tensor:
        """Annealed learning rate `[*L]` at the current progress."""
        rate = state["params"]["hyper"]["learning_rate"]
        return anneal(rate, self.settings.learning_rate_schedule, state["progress"])

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Take one gradient step on the whole rollout."""
        h = state["params"]["hyper"]
        credited, stream_batches = self.credit(self.effective_params(state), rollout, rewards), None
        if self.streams.rewards:
            added, stream_batches = self.streams.credit(state, rollout, rewards, self.preprocess)
            credited = {**credited, "advantage": credited["advantage"] + added}
        batch = self.items(credited, state["key"].dim())
        rate = self.annealed(state)
        flat = self.samples(batch)
        explained = losses.explained_variance(flat["old_value"], flat["return"], flat["valid"])
        state, info = step(
            self, state, batch, self.optimizer(rate), max_grad_norm=h["max_grad_norm"], methods=self.methods
        )
        if stream_batches is not None:
            state = self.streams.learn(state, stream_batches, lambda samples: Minibatches(samples, 1, None), rate)
        return state, {**info, "losses/explained_variance": explained, "charts/learning_rate": rate}
