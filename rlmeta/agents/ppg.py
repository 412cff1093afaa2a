"""Phasic policy gradient (Cobbe et al., 2021).

Policy and value function have networks of their own, so that neither disturbs the other, and may be trained for
different numbers of epochs. What the value function knows of the observations reaches the policy in an auxiliary phase:
every so many rollouts an auxiliary value head on the policy's body is trained on all of them, while the KL divergence
from the policy before the phase keeps its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network, value_network
from rlmeta.engine.parts import in_parts
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.returns import generalized_advantage
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import flatten_time, minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import steps
from rlmeta.nn import ActionBounds, Block, Context, ValueHead, bare
from rlmeta.rewards import Reward, check_rewards, total_reward


@dataclass(frozen=True)
class PPG:
    """Settings of PPG. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 128
    """Steps in every environment between updates."""
    policy_epochs: int = 1
    """Passes of the policy over each rollout (E_pi)."""
    value_epochs: int = 1
    """Passes of the value function over each rollout (E_V)."""
    auxiliary_every: int = 32
    """Rollouts of a policy phase (N_pi), which the auxiliary phase after it learns from; they are kept."""
    auxiliary_epochs: int = 6
    """Passes over these rollouts in an auxiliary phase (E_aux)."""
    clone_coefficient: PerLearner = 1.0
    """Weight of the KL divergence from the policy before the auxiliary phase (beta_clone)."""
    batch_size: int = 256
    """Samples in a minibatch, of either phase; must divide num_envs * num_steps."""
    learning_rate: PerLearner = 5e-4
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    gae_lambda: PerLearner = 0.95
    """Lambda of generalized advantage estimation."""
    clip_range: PerLearner = 0.2
    """Clip range epsilon: how far the probability ratio may be from 1 before its gradient is 0."""
    entropy_coefficient: PerLearner = 0.01
    """Weight of the entropy bonus."""
    normalise_advantage: bool = True
    """Normalise advantages over the rollout, to mean 0 and deviation 1."""
    max_grad_norm: PerLearner = 0.5
    """Clip each learner's gradients, those of policy and value function apart, to this norm."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon."""
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
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("learning_rate", "max_grad_norm", "clip_range", "adam_epsilon"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("gamma", "gae_lambda"):
            require_range(self, name, 0.0, 1.0)
        for name in ("entropy_coefficient", "clone_coefficient"):
            require_range(self, name, 0.0)
        for name in ("num_envs", "num_steps", "policy_epochs", "value_epochs", "batch_size"):
            require_range(self, name, 1)
        require_range(self, "auxiliary_every", 1)
        require_range(self, "auxiliary_epochs", 1)
        samples = self.num_envs * self.num_steps
        require(
            samples % self.batch_size == 0,
            f"PPG: batch_size {self.batch_size} does not divide num_envs * num_steps = {samples}; "
            "the rest of every rollout would be dropped",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> PPGAgent:
        """Create the PPG agent for an observation and an action space."""
        return PPGAgent(self, observation_space, action_space, methods)


class PPGAgent(Agent):
    """PPG agent for an observation and an action space."""

    settings: PPG

    def __init__(
        self, settings: PPG, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.value, self.auxiliary = blocks["policy"], blocks["value"], blocks["auxiliary"]
        self.head = self.policy.head
        self.beside_observations = ("auxiliary",)

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, `value`, and `auxiliary`, a value head on the features of the policy's body."""
        policy = policy_network(self.settings, self.observation_space, self.action_space)
        return {
            "policy": policy,
            "value": value_network(self.settings, self.observation_space),
            "auxiliary": ValueHead(policy.features),
        }

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: no rollout is kept yet."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(self.groups(state, hyper["learning_rate"], auxiliary=True), state)
        s, axes = self.settings, key.dim()
        rows = (*key.shape, s.auxiliary_every, s.num_steps, world.num_envs)

        def like(x: Tensor) -> Tensor:
            return torch.zeros(*rows, *x.shape[axes + 1 :], dtype=x.dtype, device=x.device)

        flag = torch.zeros(rows, dtype=torch.bool, device=key.device)
        state["rollouts"] = {
            "observation": tree.map(like, world.observation(state["world"])),
            "return": flag.to(torch.float32),
            "valid": flag,
            "count": torch.zeros_like(key),
        }
        return state

    def begin_task(self, state: State, world: World, key: Tensor) -> State:
        """Begin a task of a stream; the rollouts of the old one are not kept."""
        state = super().begin_task(state, world, key)
        state["rollouts"] = tree.map(torch.zeros_like, state["rollouts"])
        return state

    def groups(self, state: State, rate: Tensor, *, auxiliary: bool) -> Sequence[Group]:
        """Groups of weights and their losses in the auxiliary phase, or in the policy phase, where its head rests."""
        adam, bound = optim.adam(rate, eps=self.settings.adam_epsilon), state["params"]["hyper"]["max_grad_norm"]
        value = Group("value", ("value.",), ("value",), adam, bound)
        if not auxiliary:
            return Group("policy", ("policy.",), ("policy", "entropy"), adam, bound), value
        policy = Group("policy", ("policy.",), ("auxiliary", "clone"), adam, bound)
        return policy, Group("auxiliary", ("auxiliary.",), ("auxiliary",), adam, bound), value

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions `[*L, N, ...]`: a sample from the policy, or its mode."""
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    # ------------------------------------------------------------------ credit

    @torch.no_grad()
    def credit(self, p: Params, rollout: Rollout, rewards: dict[str, Tensor]) -> tree.Tree:
        """Estimate advantages and returns of every step, the training data of `losses`, `[*L, T, N, ...]`."""
        reward = total_reward(rewards, self.streams.rewards)
        distribution = self.forward(self.policy, "policy", p, rollout["observation"])
        value = self.forward(self.value, "value", p, rollout["observation"])
        next_value = self.forward(self.value, "value", p, rollout["next_observation"])
        discount = align(p["hyper"]["gamma"], reward) * ~rollout["terminated"]
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        advantage = generalized_advantage(reward, discount, value, next_value, cut, p["hyper"]["gae_lambda"])
        return {
            **{name: rollout[name] for name in ("observation", "action", "valid")},
            "advantage": advantage,
            "return": advantage + value,
            "old_value": value,
            "old_log_prob": self.head.log_prob(distribution, rollout["action"]),
        }

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of a minibatch `[*L, B, ...]`: those of the groups that move, of either phase."""
        terms: dict[str, Tensor] = {}
        if ctx.moves("auxiliary"):
            terms |= self._auxiliary_losses(p, batch, ctx)
        elif ctx.moves("policy"):
            terms |= self._policy_losses(p, batch, ctx)
        if ctx.moves("value"):
            value = self.forward(self.value, "value", p, batch["observation"], ctx)
            terms["value"] = 0.5 * losses.value_loss(value, batch["return"], batch["valid"])
        return terms

    def _policy_losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Clipped surrogate and entropy bonus, of the policy phase."""
        h, valid = p["hyper"], batch["valid"]
        distribution = self.forward(self.policy, "policy", p, batch["observation"], ctx)
        log_prob, old = self.head.log_prob(distribution, batch["action"]), batch["old_log_prob"]
        policy = losses.ppo_clip_loss(log_prob, old, batch["advantage"], h["clip_range"], valid)
        entropy = masked_mean(self.head.entropy(distribution), valid)
        if ctx.report:
            ctx.info["losses/entropy"] = entropy
            ctx.info["losses/approx_kl"] = losses.approx_kl(log_prob, old, valid)
        return {"policy": policy, "entropy": -h["entropy_coefficient"] * entropy}

    def _auxiliary_losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Value loss of the auxiliary head, and the KL divergence from the policy before the phase."""
        valid, observation, tensors = batch["valid"], batch["observation"], {**p["weights"], **p["buffers"]}
        features = self.forward(self.policy.body, "policy.body", p, observation, ctx)
        distribution = self.policy.answer(tensors, features, observation, ctx, "policy.")
        value = self.auxiliary.run(tensors, features, ctx, "auxiliary.")
        clone = masked_mean(self.head.kl(batch["old_distribution"], distribution), valid)
        return {
            "auxiliary": 0.5 * losses.value_loss(value, batch["return"], valid),
            "clone": p["hyper"]["clone_coefficient"] * clone,
        }

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout, and in an auxiliary phase from those kept, with the learners split over all cores."""
        if self.capture is None or self.methods or not state["key"].dim():
            return self._update(state, rollout, rewards)
        return in_parts(self._update, state, rollout, rewards)

    def _update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Policy phase: the policy's epochs, then the value function's; then perhaps an auxiliary phase."""
        s, axes = self.settings, state["key"].dim()
        credited = self.credit(self.effective_params(state), rollout, rewards)
        batch = flatten_time(credited, axes)
        if s.normalise_advantage:
            batch["advantage"] = losses.normalise_advantage(batch["advantage"], batch["valid"])
        explained = losses.explained_variance(batch["old_value"], batch["return"], batch["valid"])
        rate = anneal(state["params"]["hyper"]["learning_rate"], s.learning_rate_schedule, state["progress"])
        policy, value = self.groups(state, rate, auxiliary=False)
        take = partial(steps, constants={}, methods=self.methods, report=True)
        metrics = {"losses/explained_variance": explained, "charts/learning_rate": rate}
        for group, epochs in ((policy, s.policy_epochs), (value, s.value_epochs)):
            key = random.fold(state["key"], group.name)
            shuffled = minibatches(key, state["count"]["iterations"] * epochs, batch, s.batch_size, epochs)
            state, reports = take(self, state, shuffled, optimizer=[group])
            metrics |= _means(reports, group.name)
        state["rollouts"] = self.kept(state["rollouts"], credited)
        if int(state["rollouts"]["count"].max()) == s.auxiliary_every:
            state, reports = self._auxiliary_phase(state, rate, take)
            metrics |= _means(reports, "auxiliary_phase")
        return state, metrics

    def kept(self, rollouts: tree.Tree, credited: tree.Tree) -> tree.Tree:
        """Rollouts of the policy phase after one more `[*L, T, N, ...]`, in a copy."""
        number, axes = int(rollouts["count"].max()), rollouts["count"].dim()

        def write(old: Tensor, new: Tensor) -> Tensor:
            return old.slice_scatter(new.unsqueeze(axes).to(old.dtype), axes, number, number + 1)

        new = {name: credited[name] for name in ("observation", "return", "valid")}
        old = {name: rollouts[name] for name in new}
        return {**tree.map(write, old, new), "count": rollouts["count"] + 1}

    def _auxiliary_phase(self, state: State, rate: Tensor, take: Any) -> tuple[State, dict[str, Tensor]]:
        """Gradient steps on all rollouts that were kept; then none is."""
        s, axes, rollouts = self.settings, state["key"].dim(), state["rollouts"]
        samples = {name: rollouts[name] for name in ("observation", "return", "valid")}
        batch = tree.map(lambda x: x.flatten(axes, axes + 2), samples)
        with torch.no_grad():
            batch["old_distribution"] = self.distribution(self.effective_params(state), batch, Context())
        key, first = random.fold(state["key"], "auxiliary"), state["count"]["iterations"] * s.auxiliary_epochs
        shuffled = minibatches(key, first, batch, s.batch_size, s.auxiliary_epochs)
        state, reports = take(self, state, shuffled, optimizer=self.groups(state, rate, auxiliary=True))
        state["rollouts"] = {**rollouts, "count": torch.zeros_like(rollouts["count"])}
        return state, reports


def _means(reports: dict[str, Tensor], phase: str) -> Metrics:
    """Means of the reports `[count, *L]` of a phase's steps, under names of the phase's own."""
    named = {name if "/" in name else f"losses/{name}_loss": values.mean(0) for name, values in reports.items()}
    return {name.replace("losses/", f"losses/{phase}/"): values for name, values in named.items()}
