"""Proximal policy optimisation (Schulman et al., 2017), with the details of Huang et al. (2022) as settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network, value_network
from rlmeta.agents.recurrence import MemoryName, Recurrence, SeenName, check_memory_settings
from rlmeta.engine.parts import in_parts
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.optim import Optimizer
from rlmeta.functional.returns import generalized_advantage
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.average import Average
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import Minibatches, minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step, steps
from rlmeta.nn import ActionBounds, Block, Context, ValueHead, bare
from rlmeta.rewards import Reward, check_rewards, total_reward


@dataclass(frozen=True)
class PPO:
    """Settings of PPO. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 128
    """Steps in every environment between updates."""
    num_epochs: int = 10
    """Passes over the rollout in each update."""
    batch_size: int = 256
    """Samples in a minibatch; must divide num_envs * num_steps."""
    learning_rate: PerLearner = 3e-4
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "linear"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    gae_lambda: PerLearner = 0.95
    """Lambda of generalized advantage estimation."""
    clip_range: PerLearner = 0.2
    """Clip range epsilon: how far the probability ratio may be from 1 before its gradient is 0."""
    clip_range_schedule: ScheduleName = "constant"
    """Keep the clip range, or anneal it to 0 over the budget in a straight line or along a cosine."""
    penalty: Literal["clip", "kl"] = "clip"
    """The surrogate: the clipped ratio, or the ratio less an adaptive KL penalty (section 4 of the paper)."""
    kl_target: PerLearner = 0.01
    """With penalty="kl": the KL divergence per update that the coefficient is steered to."""
    stop_kl: PerLearner = math.inf
    """End a learner's update once its KL divergence is above 1.5 times this."""
    entropy_coefficient: PerLearner = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: PerLearner = 0.5
    """Weight of the value loss, mean (return - value)^2."""
    value_clip_range: PerLearner = math.inf
    """Clip the value's change from its old prediction to this range; depends on the scale of rewards."""
    normalise_advantage: bool = True
    """Normalise advantages per minibatch, to mean 0 and deviation 1."""
    max_grad_norm: PerLearner = 0.5
    """Clip each learner's gradient to this norm."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    normalise_reward: bool = False
    """Divide rewards by the running deviation of their discounted return."""
    state_dependent_exploration: bool = False
    """Box actions: noise as a function of the features, held for noise_hold steps (gSDE, Raffin et al., 2021)."""
    noise_hold: int = 4
    """With state-dependent exploration: steps between two draws of the noise."""
    action_bounds: ActionBounds = "scale"
    """Box actions: take the bounds for the policy's unit, so that it acts on the scale of the task whatever it counts
    in; or squash actions into them by a tanh; or act in raw units, clipped at the bounds."""
    initial_log_std: float = 0.0
    """Box actions: the logarithm of the initial deviation, in the policy's unit."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the default network."""
    share_network: bool = False
    """Share one body between the policy and the value network."""
    task_heads: int = 0
    """Number of output heads, one per task of a stream with observe_identity; 0 for a single one."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    memory: MemoryName = "none"
    """A memory behind the body of every network, for partially observable tasks: a gated recurrent unit (GRU), an LSTM,
    or attention over the last steps; minibatches then are of whole sequences, num_steps long."""
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
        for name in ("learning_rate", "max_grad_norm", "clip_range", "kl_target", "stop_kl", "value_clip_range"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "adam_epsilon", 0.0, above=True)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("gamma", "gae_lambda"):
            require_range(self, name, 0.0, 1.0)
        for name in ("entropy_coefficient", "value_coefficient"):
            require_range(self, name, 0.0)
        for name in ("num_envs", "num_steps", "num_epochs", "batch_size", "noise_hold"):
            require_range(self, name, 1)
        require_range(self, "task_heads", 0)
        require(
            not (self.state_dependent_exploration and self.action_bounds == "squash"),
            'PPO: state_dependent_exploration and action_bounds="squash" exclude each other: choose one',
        )
        require(
            not (self.task_heads and self.normalise_observation),
            "PPO: task_heads and normalise_observation exclude each other, for a whitened observation does not say "
            "which task it is: choose one",
        )
        samples = self.num_envs * self.num_steps
        require(
            samples % self.batch_size == 0,
            f"PPO: batch_size {self.batch_size} does not divide num_envs * num_steps = {samples}; "
            "the rest of every rollout would be dropped",
        )
        check_memory_settings(self)
        require(
            self.memory == "none" or self.batch_size % self.num_steps == 0,
            f"PPO: batch_size {self.batch_size} is not whole sequences of num_steps = {self.num_steps}, which a memory "
            "learns from: give a multiple of it",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> PPOAgent:
        """Create the PPO agent for an observation and an action space."""
        return PPOAgent(self, observation_space, action_space, methods)


class PPOAgent(Agent):
    """PPO agent for an observation and an action space."""

    settings: PPO
    supports_separate_rewards = True

    def __init__(
        self, settings: PPO, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.noise_hold = settings.noise_hold if settings.state_dependent_exploration else 1
        blocks = bare(self.networks)
        self.policy: Any = blocks["policy"]
        self.value = blocks["value"]
        self.head: Any = self.policy.head
        if settings.memory != "none":
            self.recurrence = Recurrence(settings.sees, action_space, blocks)
        self.rewards_entropy = any(value > 0 for value in values_of(settings.entropy_coefficient))
        self.stops_early = any(value < math.inf for value in values_of(settings.stop_kl))
        self.clips_value = any(value < math.inf for value in values_of(settings.value_clip_range))

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, the parameters of an action distribution, and `value`, the state value."""
        s, gsde = self.settings, self.settings.state_dependent_exploration
        spaces = self.observation_space, self.action_space
        policy = policy_network(s, *spaces, state_dependent=gsde, tasks=s.task_heads)
        if s.share_network:
            return {"policy": policy, "value": ValueHead(policy.features)}
        return {"policy": policy, "value": value_network(s, *spaces, tasks=s.task_heads)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(optim.adam(hyper["learning_rate"]), state)
        state["kl_coefficient"] = torch.ones(key.shape, dtype=torch.float32, device=key.device)
        return state

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
        ctx, inputs = Context(), self.inputs(rollout)
        distribution, value = self._evaluate(p, inputs, ctx)
        next_value = self._value(p, self.next_inputs(rollout), ctx)
        gamma = p["hyper"]["gamma"]
        discount = align(gamma, reward) * ~rollout["terminated"]
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        advantage = generalized_advantage(reward, discount, value, next_value, cut, p["hyper"]["gae_lambda"])
        return {
            "observation": inputs,
            "action": rollout["action"],
            "valid": rollout["valid"],
            "advantage": advantage,
            "return": advantage + value,
            "old_value": value,
            "old_log_prob": self.head.log_prob(distribution, rollout["action"]),
            **({"old_distribution": _compared(distribution)} if self.settings.penalty == "kl" else {}),
        }

    def _credited(self, p: Params, rollout: Rollout, rewards: dict[str, Tensor]) -> tree.Tree:
        """Estimate advantages as `credit` does, replayed where it was recorded."""
        if self.capture is None:
            return self.credit(p, rollout, rewards)

        def credit(inputs: tree.Tree) -> tree.Tree:
            return self.credit(inputs["params"], inputs["rollout"], inputs["rewards"])

        return self.capture("credit", credit, {"params": p, "rollout": rollout, "rewards": rewards})

    def _evaluate(self, p: Params, observation: tree.Tree, ctx: Context) -> tuple[Any, Tensor]:
        """Parameters of the action distribution, and state values, for observations `[*L, ...]`."""
        if not self.settings.share_network:
            return self.forward(self.policy, "policy", p, observation, ctx), self._value(p, observation, ctx)
        features = self.forward(self.policy.body, "policy.body", p, observation, ctx)
        tensors = {**p["weights"], **p["buffers"]}
        distribution = self.policy.answer(tensors, features, observation, ctx, "policy.")
        return distribution, self.value.run(tensors, self.policy.placed(features, observation), ctx, "value.")

    def _value(self, p: Params, observation: tree.Tree, ctx: Context) -> Tensor:
        """State values of observations `[*L, ...]`."""
        if self.settings.share_network:
            return self._evaluate(p, observation, ctx)[1]
        value: Tensor = self.forward(self.value, "value", p, observation, ctx)
        return value

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Policy, value and entropy losses `[*L]` of a minibatch `[*L, B, ...]`."""
        s, h, batch = self.settings, p["hyper"], self.samples(batch)
        distribution, value = self._evaluate(p, batch["observation"], ctx)
        log_prob = self.head.log_prob(distribution, batch["action"])
        valid = batch.get("valid")
        advantage = batch["advantage"]
        if s.normalise_advantage:
            advantage = losses.normalise_advantage(advantage, valid)
        if s.penalty == "clip":
            policy = losses.ppo_clip_loss(log_prob, batch["old_log_prob"], advantage, batch["clip_range"], valid)
        else:
            kl = self.head.kl(batch["old_distribution"], distribution)
            policy = losses.ppo_kl_loss(log_prob, batch["old_log_prob"], advantage, kl, batch["kl_coefficient"], valid)
        if not self.clips_value:
            value_loss = losses.value_loss(value, batch["return"], valid)
        else:
            value_loss = losses.clipped_value_loss(
                value, batch["return"], batch["old_value"], h["value_clip_range"], valid
            )
        terms = {"policy": policy, "value": h["value_coefficient"] * value_loss}
        if self.rewards_entropy:
            terms["entropy"] = -h["entropy_coefficient"] * masked_mean(self.head.entropy(distribution), valid)
        if ctx.report:
            with torch.no_grad():
                moved = (log_prob - batch["old_log_prob"]).expm1().abs() > align(batch["clip_range"], log_prob)
                ctx.info["losses/policy_loss"] = policy
                ctx.info["losses/value_loss"] = value_loss
                ctx.info["losses/entropy"] = masked_mean(self.head.entropy(distribution), valid)
                ctx.info["losses/approx_kl"] = losses.approx_kl(log_prob, batch["old_log_prob"], valid)
                ctx.info["losses/clipfrac"] = masked_mean(moved.to(log_prob.dtype), valid)
        return terms

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout, with the learners split over all cores."""
        if self.capture is None or self.methods or not state["key"].dim():
            return self._update(state, rollout, rewards)
        return in_parts(self._update, state, rollout, rewards)

    def _update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Take gradient steps over several epochs of minibatches of one rollout."""
        s, axes = self.settings, state["key"].dim()
        p = self.effective_params(state)
        credited, stream_batches = self._credited(p, rollout, rewards), None
        if self.streams.rewards:
            added, stream_batches = self.streams.credit(state, rollout, rewards, self.preprocess)
            credited = {**credited, "advantage": credited["advantage"] + added}
        batch = self.items(credited, axes)
        average, flat = Average(), self.samples(batch)
        explained = losses.explained_variance(flat["old_value"], flat["return"], flat["valid"])
        average.add({"losses/explained_variance": explained})
        if bool(batch["valid"].all()):
            del batch["valid"]
        rate, clip_range = self.annealed(state)
        optimizer = optim.adam(rate, eps=s.adam_epsilon)
        settings = {"clip_range": clip_range, "kl_coefficient": state["kl_coefficient"]}
        bound = p["hyper"]["max_grad_norm"]
        size = s.batch_size if self.recurrence is None else s.batch_size // s.num_steps
        quiet = 0 if self.stops_early else s.num_epochs - 1  # epochs; of the others it is reported how they went
        first = state["count"]["iterations"] * s.num_epochs
        epochs = minibatches(state["key"], first, batch, size, quiet)
        take = partial(steps, constants=settings, optimizer=optimizer, max_grad_norm=bound, methods=self.methods)
        state, _ = take(self, state, epochs)
        last = minibatches(state["key"], first + quiet, batch, size, s.num_epochs - quiet)
        if self.stops_early:
            state, info = self._until_too_far(state, last, settings, optimizer, average)
        else:
            state, reports = take(self, state, last, report=True)
            info = {name: values[-1] for name, values in reports.items()}
            average.add({name: values.mean(0) for name, values in reports.items()})
        if stream_batches is not None:
            make_minibatches = partial(minibatches, state["key"], first, batch_size=s.batch_size, epochs=s.num_epochs)
            state = self.streams.learn(state, stream_batches, make_minibatches, rate)
        if s.penalty == "kl":
            state["kl_coefficient"] = self._steer(state["kl_coefficient"], info["losses/approx_kl"], p["hyper"])
        return state, {**average.result(), "charts/learning_rate": rate}

    def _until_too_far(
        self, state: State, batches: Minibatches, settings: tree.Tree, optimizer: Optimizer, average: Average
    ) -> tuple[State, dict[str, Tensor]]:
        """Early stopping: gradient steps until a learner's policy is 1.5 `stop_kl` away from the one that acted."""
        bounds, active = state["params"]["hyper"], state["active"]
        for batch in batches:
            full, bound = {**batch, **settings}, bounds["max_grad_norm"]
            state, info = step(self, state, full, optimizer, active=active, max_grad_norm=bound, methods=self.methods)
            average.add(info)
            active = active & (info["losses/approx_kl"] <= 1.5 * bounds["stop_kl"])
        return state, info

    def annealed(self, state: State) -> tuple[Tensor, Tensor]:
        """Annealed learning rate and clip range `[*L]` at the current progress."""
        s, h = self.settings, state["params"]["hyper"]
        rate = anneal(h["learning_rate"], s.learning_rate_schedule, state["progress"])
        return rate, anneal(h["clip_range"], s.clip_range_schedule, state["progress"])

    def _steer(self, coefficient: Tensor, kl: Tensor, hyper: dict[str, Tensor]) -> Tensor:
        """Adaptive KL penalty: double the coefficient where KL is 1.5 times too large, halve it where too small."""
        too_far, too_little = kl > hyper["kl_target"] * 1.5, kl < hyper["kl_target"] / 1.5
        return torch.where(too_far, coefficient * 2, torch.where(too_little, coefficient / 2, coefficient))


def _compared(distribution: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the parameters that a KL divergence needs; the others are only needed to sample."""
    return {name: value for name, value in distribution.items() if name not in ("features", "noise_log_std")}
