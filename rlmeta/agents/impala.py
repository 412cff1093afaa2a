"""V-trace actor-critic (IMPALA: Espeholt et al., 2018), as the learner of one process.

Each rollout is learned from several times, so the policy moves away from the one that acted; V-trace weighs every step
by how likely the policy now is to take it, and clips the weights. Targets are those of the parameters in every
gradient step, from whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from rlmeta.functional.returns import v_trace
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import steps
from rlmeta.nn import ActionBounds, Block, bare
from rlmeta.rewards import Reward, check_rewards, total_reward


@dataclass(frozen=True)
class IMPALA:
    """Settings of the V-trace actor-critic. A list for a number marked per learner compares its values."""

    num_envs: int = 8
    """Environments of each learner."""
    num_steps: int = 32
    """Steps in every environment between updates, the length of a sequence."""
    num_epochs: int = 4
    """Passes over the rollout in each update; with one, and one minibatch, nothing is off-policy."""
    sequences: int = 4
    """Sequences in a minibatch, one of each environment; must divide num_envs."""
    learning_rate: PerLearner = 1e-3
    """The optimizer's step size."""
    learning_rate_schedule: ScheduleName = "linear"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    optimizer: Literal["rmsprop", "adam"] = "adam"
    """RMSProp as in the paper, or Adam."""
    rmsprop_decay: float = 0.99
    """Decay of RMSProp's running mean of squared gradients."""
    epsilon: float = 1e-5
    """The optimizer's epsilon."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    trace_lambda: PerLearner = 1.0
    """Lambda of V-trace, a factor of the trace coefficients c; 1 as in the paper's experiments."""
    rho_clip: PerLearner = 1.0
    """Bound of the importance weights rho of temporal differences, which sets the policy that is valued."""
    c_clip: PerLearner = 1.0
    """Bound of the trace coefficients c, which sets how fast values travel; at most rho_clip."""
    entropy_coefficient: PerLearner = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: PerLearner = 0.5
    """Weight of the value loss, mean (target - value)^2."""
    normalise_advantage: bool = False
    """Normalise advantages per minibatch, to mean 0 and deviation 1."""
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
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("learning_rate", "max_grad_norm", "epsilon", "rho_clip", "c_clip"):
            require_range(self, name, 0.0, above=True)
        for name in ("gamma", "trace_lambda", "rmsprop_decay"):
            require_range(self, name, 0.0, 1.0)
        for name in ("entropy_coefficient", "value_coefficient"):
            require_range(self, name, 0.0)
        for name in ("num_envs", "num_steps", "num_epochs", "sequences"):
            require_range(self, name, 1)
        require(
            self.num_envs % self.sequences == 0,
            f"IMPALA: sequences {self.sequences} does not divide num_envs {self.num_envs}; the rest of every rollout "
            "would be dropped",
        )

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> IMPALAAgent:
        """Create the V-trace actor-critic for an observation and an action space."""
        return IMPALAAgent(self, observation_space, action_space, methods)


class IMPALAAgent(Agent):
    """V-trace actor-critic for an observation and an action space."""

    settings: IMPALA

    def __init__(
        self, settings: IMPALA, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        blocks = bare(self.networks)
        self.policy, self.value = blocks["policy"], blocks["value"]
        self.head: Any = self.policy.head

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, the parameters of an action distribution, and `value`, the state value."""
        return {
            "policy": policy_network(self.settings, self.observation_space, self.action_space),
            "value": value_network(self.settings, self.observation_space),
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
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    @torch.no_grad()
    def credit(self, p: Params, rollout: Rollout, rewards: dict[str, Tensor]) -> tree.Tree:
        """What `losses` needs of a rollout `[*L, T, N, ...]`: the steps, and how likely each was to be taken."""
        reward = total_reward(rewards, self.streams.rewards)
        acted = self.forward(self.policy, "policy", p, rollout["observation"])
        return {
            **{name: rollout[name] for name in ("observation", "next_observation", "action", "valid")},
            "reward": reward,
            "discount": align(p["hyper"]["gamma"], reward) * ~rollout["terminated"],
            "cut": rollout["terminated"] | rollout["truncated"] | ~rollout["valid"],
            "old_log_prob": self.head.log_prob(acted, rollout["action"]),
        }

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Policy, value and entropy losses `[*L]` of sequences `[*L, B, T, ...]`."""
        h, axes = p["hyper"], p["hyper"]["gamma"].dim()
        rollout = tree.map(lambda x: x.transpose(axes, axes + 1), batch)  # [*L, T, B, ...]
        distribution = self.forward(self.policy, "policy", p, rollout["observation"], ctx)
        value = self.forward(self.value, "value", p, rollout["observation"], ctx)
        log_prob = self.head.log_prob(distribution, rollout["action"])
        with torch.no_grad():
            log_ratio = log_prob - rollout["old_log_prob"]
            next_value = self.forward(self.value, "value", p, rollout["next_observation"])
            target, advantage = v_trace(
                rollout["reward"], rollout["discount"], value.detach(), next_value, rollout["cut"], log_ratio,
                h["rho_clip"], h["c_clip"], h["trace_lambda"],
            )  # fmt: skip
        valid, advantage = rollout["valid"].flatten(axes), advantage.flatten(axes)
        if self.settings.normalise_advantage:
            advantage = losses.normalise_advantage(advantage, valid)
        policy = losses.policy_gradient_loss(log_prob.flatten(axes), advantage, valid)
        value_loss = losses.value_loss(value.flatten(axes), target.flatten(axes), valid)
        entropy = masked_mean(self.head.entropy(distribution).flatten(axes), valid)
        if ctx.report:
            ctx.info.update({"losses/policy_loss": policy, "losses/value_loss": value_loss, "losses/entropy": entropy})
            clipped = (log_ratio > align(h["rho_clip"].log(), log_ratio)).to(log_prob.dtype)
            ctx.info["losses/clipfrac"] = masked_mean(clipped.flatten(axes), valid)
            ctx.info["losses/explained_variance"] = losses.explained_variance(
                value.detach().flatten(axes), target.flatten(axes), valid
            )
        return {"policy": policy - h["entropy_coefficient"] * entropy, "value": h["value_coefficient"] * value_loss}

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Learn from a rollout, with the learners split over all cores."""
        if self.capture is None or self.methods or not state["key"].dim():
            return self._update(state, rollout, rewards)
        return in_parts(self._update, state, rollout, rewards)

    def _update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Take gradient steps over several epochs of minibatches of sequences."""
        s, h, axes = self.settings, state["params"]["hyper"], state["key"].dim()
        credited = self.credit(self.effective_params(state), rollout, rewards)
        batch = tree.map(lambda x: x.transpose(axes, axes + 1).contiguous(), credited)
        rate = anneal(h["learning_rate"], s.learning_rate_schedule, state["progress"])
        shuffled = minibatches(
            state["key"], state["count"]["iterations"] * s.num_epochs, batch, s.sequences, s.num_epochs
        )
        state, reports = steps(
            self, state, shuffled, {}, self.optimizer(rate),
            max_grad_norm=h["max_grad_norm"], methods=self.methods, report=True,
        )  # fmt: skip
        return state, {**{name: values.mean(0) for name, values in reports.items()}, "charts/learning_rate": rate}
