"""Trust region policy optimization (Schulman et al., 2015).

The policy takes one natural gradient step a rollout: along F⁻¹ g, with g the gradient of the surrogate objective and F
the Fisher information, by conjugate gradient on Fisher-vector products; as far as the KL divergence allows, and back
until the objective has improved. The value function takes ordinary gradient steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network, value_network
from rlmeta.engine.parts import in_parts
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.packed import Packed
from rlmeta.functional.returns import generalized_advantage
from rlmeta.functional.trust_region import conjugate_gradient, line_search, step_within
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import steps
from rlmeta.nn import ActionBounds, Block, Context, bare
from rlmeta.nn.product import plain_graph
from rlmeta.rewards import Reward, check_rewards, total_reward


@dataclass(frozen=True)
class TRPO:
    """Settings of TRPO. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 256
    """Steps in every environment between updates."""
    kl_target: PerLearner = 0.01
    """Largest KL divergence of an update, the size of the trust region."""
    conjugate_steps: int = 15
    """Fisher-vector products of conjugate gradient in each update."""
    damping: PerLearner = 0.1
    """Added to the diagonal of the Fisher information."""
    line_search_steps: int = 10
    """Step lengths that the line search tries."""
    line_search_shrink: float = 0.8
    """Factor from one step length to the next."""
    value_epochs: int = 10
    """Passes of the value function over the rollout in each update."""
    batch_size: int = 128
    """Samples in a minibatch of the value function; must divide num_envs * num_steps."""
    value_learning_rate: PerLearner = 1e-3
    """Adam's step size of the value function."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    gae_lambda: PerLearner = 0.95
    """Lambda of generalized advantage estimation."""
    normalise_advantage: bool = True
    """Normalise advantages over the rollout, to mean 0 and deviation 1."""
    max_grad_norm: PerLearner = float("inf")
    """Clip each learner's gradient of the value function to this norm."""
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
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("kl_target", "damping", "line_search_shrink", "value_learning_rate", "max_grad_norm"):
            require_range(self, name, 0.0, above=True)
        for name in ("gamma", "gae_lambda", "line_search_shrink"):
            require_range(self, name, 0.0, 1.0)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        counts = ("num_envs", "num_steps", "conjugate_steps", "line_search_steps", "value_epochs", "batch_size")
        for name in (*counts, "noise_hold"):
            require_range(self, name, 1)
        require(
            not (self.state_dependent_exploration and self.action_bounds == "squash"),
            'TRPO: state_dependent_exploration and action_bounds="squash" exclude each other: choose one',
        )
        samples = self.num_envs * self.num_steps
        require(
            samples % self.batch_size == 0,
            f"TRPO: batch_size {self.batch_size} does not divide num_envs * num_steps = {samples}; "
            "the rest of every rollout would be dropped",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> TRPOAgent:
        """Create the TRPO agent for an observation and an action space."""
        return TRPOAgent(self, observation_space, action_space, methods)


class TRPOAgent(Agent):
    """TRPO agent for an observation and an action space."""

    settings: TRPO

    def __init__(
        self, settings: TRPO, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        require(
            not self.methods,
            "TRPO: its policy takes steps of its own, which lifelong methods can't change: use PPO or A2C with them",
        )
        self.steps_per_iteration = settings.num_steps
        self.noise_hold = settings.noise_hold if settings.state_dependent_exploration else 1
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.value = blocks["policy"], blocks["value"]
        self.head = self.policy.head

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, the parameters of an action distribution, and `value`, the state value."""
        s, spaces = self.settings, (self.observation_space, self.action_space)
        policy = policy_network(s, *spaces, state_dependent=s.state_dependent_exploration)
        return {"policy": policy, "value": value_network(s, *spaces)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        state = super().init(key, hyper, world)
        # the policy's steps need no moments: gradient descent has none
        policy = Group("policy", ("policy.",), ("policy",), optim.sgd(1.0))
        state["optimizer"] = init_optimizer([policy, self.critic(state)], state)
        return state

    def critic(self, state: State) -> Group:
        """Group of the value function's weights."""
        h = state["params"]["hyper"]
        return Group("value", ("value.",), ("value",), optim.adam(h["value_learning_rate"]), h["max_grad_norm"])

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
        """Estimate advantages and returns of every step, the training data of an update, `[*L, T, N, ...]`."""
        reward = total_reward(rewards, self.streams.rewards)
        value = self.forward(self.value, "value", p, rollout["observation"])
        next_value = self.forward(self.value, "value", p, rollout["next_observation"])
        discount = align(p["hyper"]["gamma"], reward) * ~rollout["terminated"]
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        advantage = generalized_advantage(reward, discount, value, next_value, cut, p["hyper"]["gae_lambda"])
        kept = {name: rollout[name] for name in ("observation", "action", "valid")}
        return {**kept, "advantage": advantage, "return": advantage + value, "old_value": value}

    # ------------------------------------------------------------------ learn: the policy

    def natural_step(self, inputs: tree.Tree) -> tree.Tree:
        """Natural gradient step of the policy: a pure function of tensors, for all learners at once.

        Args:
            inputs: `params`, and `batch` `[*L, B, ...]` of the rollout, with normalised advantages.

        Returns:
            `weights` after the step `[*L, G]`, `finite`, and what is reported, `[*L]` each.
        """
        p, batch, s = inputs["params"], inputs["batch"], self.settings
        h, start = p["hyper"], self.policy_weights(p)
        old = self._distribution(p, start, start.flat, batch)

        def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return self.surrogate(self._distribution(p, start, flat, batch), old, batch)

        with torch.enable_grad(), plain_graph():
            leaf = start.flat.detach().requires_grad_()
            objective, divergence = self.surrogate(self._distribution(p, start, leaf, batch), old, batch)
            (gradient,) = torch.autograd.grad(objective.sum(), leaf, retain_graph=True)
            (slope,) = torch.autograd.grad(divergence.sum(), leaf, create_graph=True)
        product = self.fisher_product(slope, leaf, h["damping"])
        direction = conjugate_gradient(product, gradient, s.conjugate_steps)
        whole = step_within(h["kl_target"], direction, product(direction))
        accepted = line_search(evaluate, start.flat, whole, h["kl_target"], s.line_search_steps, s.line_search_shrink)
        moved = evaluate(accepted.point)
        return {
            "weights": accepted.point,
            "finite": torch.isfinite(gradient.sum(-1) + moved[0]),
            "losses/policy_loss": -moved[0],
            "losses/kl": moved[1],
            "losses/step_fraction": accepted.fraction,
        }

    def fisher_product(self, slope: Tensor, leaf: Tensor, damping: Tensor) -> Callable[[Tensor], Tensor]:
        """Fisher-vector products (F + damping I) v, as the derivative of slopeᵀ v: F is the divergence's curvature.

        Args:
            slope: gradient of every learner's mean KL divergence at the policy itself `[*L, G]`, with its graph.
            leaf: the weights it was differentiated by, `[*L, G]`.
            damping: `[*L]`.
        """

        def product(vector: Tensor) -> Tensor:
            (moved,) = torch.autograd.grad(slope, leaf, vector, retain_graph=True)
            return moved + damping.unsqueeze(-1) * vector

        return product

    def surrogate(self, now: dict[str, Tensor], old: dict[str, Tensor], batch: tree.Tree) -> tuple[Tensor, Tensor]:
        """Surrogate objective E[π / π_old A] and divergence E[KL(π_old || π)] of a batch, `[*L]` each."""
        valid, action = batch["valid"], batch["action"]
        ratio = (self.head.log_prob(now, action) - self.head.log_prob(old, action)).exp()
        return masked_mean(ratio * batch["advantage"], valid), masked_mean(self.head.kl(old, now), valid)

    def policy_weights(self, p: Params) -> Packed:
        """Weights of the policy alone, packed `[*L, G]`."""
        own = {name: weight for name, weight in p["weights"].items() if name.startswith("policy.")}
        return Packed.of(own, p["hyper"]["gamma"].dim())

    def _distribution(self, p: Params, like: Packed, flat: Tensor, batch: tree.Tree) -> dict[str, Tensor]:
        """Parameters of the action distribution with other weights of the policy, `[*L, G]`."""
        weights = {**p["weights"], **Packed.view(flat, like, flat.dim() - 1)}
        return self.distribution({**p, "weights": weights}, batch, Context())

    # ------------------------------------------------------------------ learn: the value function

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Value loss `[*L]` of a minibatch `[*L, B, ...]`; the policy has no loss, but `natural_step`."""
        value = self.forward(self.value, "value", p, batch["observation"], ctx)
        return {"value": losses.value_loss(value, batch["return"], batch["valid"])}

    # ------------------------------------------------------------------ update

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout, with the learners split over all cores."""
        if self.capture is None or not state["key"].dim():
            return self._update(state, rollout, rewards)
        return in_parts(self._update, state, rollout, rewards)

    def _update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Take the policy's step, then the value function's."""
        s, p = self.settings, self.effective_params(state)
        batch = self.items(self.credit(p, rollout, rewards), state["key"].dim())
        explained = losses.explained_variance(batch["old_value"], batch["return"], batch["valid"])
        state, reports = self._step_policy(state, batch)
        first = state["count"]["iterations"] * s.value_epochs
        samples = {name: batch[name] for name in ("observation", "return", "valid")}
        shuffled = minibatches(state["key"], first, samples, s.batch_size, s.value_epochs)
        state, values = steps(self, state, shuffled, {}, [self.critic(state)], report=True)
        value_loss = {"losses/value_loss": values["value"].mean(0), "losses/explained_variance": explained}
        return state, {**reports, **value_loss}

    @torch.no_grad()
    def _step_policy(self, state: State, batch: tree.Tree) -> tuple[State, Metrics]:
        """Take the natural gradient step; a learner that is not active, or loses its numbers, stays as it is."""
        p, axes = state["params"], state["key"].dim()
        advantage = batch["advantage"]
        if self.settings.normalise_advantage:
            advantage = losses.normalise_advantage(advantage, batch["valid"])
        shown = {name: batch[name] for name in ("observation", "action", "valid")} | {"advantage": advantage}
        inputs = {"params": p, "batch": shown}
        call = self.capture
        outputs = self.natural_step(inputs) if call is None else call("a policy step", self.natural_step, inputs)
        new, finite = outputs.pop("weights"), outputs.pop("finite")
        state["active"] = state["active"] & finite
        start = self.policy_weights(p)
        kept = torch.where(state["active"].unsqueeze(-1), new, start.flat)
        packed = Packed.of({**p["weights"], **Packed.view(kept, start, axes)}, axes)
        state["params"] = {**p, "weights": packed}
        return state, outputs
