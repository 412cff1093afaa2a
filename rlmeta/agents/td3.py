"""Twin delayed deep deterministic policy gradient (Fujimoto, van Hoof and Meger, 2018).

Two critics learn the value of an action against the lesser of two target critics, whose next action is blurred; the
deterministic policy climbs the first critic, and moves, with all targets, only after every other step of the critics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.critics import box_units, critic_ensemble
from rlmeta.agents.networks import Network, build_body, whitens
from rlmeta.envs.goals import Goals
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.learning import hindsight, off_policy
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.hindsight import HindsightName
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy, with_copy
from rlmeta.nn import Block, Context, DeterministicHead, bare
from rlmeta.rewards import Reward, check_rewards

TARGET_POLICY, TARGET_Q = Copy("target_policy", "policy"), Copy("target_q", "q")


@dataclass(frozen=True)
class TD3:
    """Settings of TD3. A list for a number marked per learner compares its values."""

    num_envs: int = 4
    """Environments of each learner."""
    num_steps: int = 4
    """Steps in every environment between updates."""
    gradient_steps: int = 16
    """Gradient steps of the critics in each update, a multiple of `policy_delay`."""
    policy_delay: int = 2
    """Gradient steps of the critics per update of the policy and the target networks."""
    batch_size: int = 256
    """Transitions in a minibatch."""
    capacity: int = 100_000
    """Transitions that each learner's replay memory holds."""
    learning_starts: int = 1_000
    """Transitions collected, with uniformly random actions, before the first gradient step."""
    actor_learning_rate: PerLearner = 1e-3
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 1e-3
    """Adam's step size of the critics."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target networks follow the others in each update."""
    exploration_noise: PerLearner = 0.1
    """Standard deviation of the exploration noise, in units of the actions' bounds."""
    target_noise: PerLearner = 0.2
    """Standard deviation of the noise on the next action in the critics' target (target policy smoothing)."""
    target_noise_clip: PerLearner = 0.5
    """Bound to which the noise on the next action is clipped."""
    critics: int = 2
    """Number of critics, whose minimum is the target."""
    max_grad_norm: PerLearner = float("inf")
    """Clip each learner's gradients, those of policy and critics apart, to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the default network, and of the critics behind any."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    hindsight: HindsightName = "none"
    """Goals taken in hindsight, for tasks with goals (HER, Andrychowicz et al., 2017): "future" trains on drawn
    transitions as if a goal that was achieved later in their episode had been the desired one; "none" does not."""
    hindsight_goals: PerLearner = 4.0
    """With hindsight: transitions with a goal taken so for every one with its own (the paper's k)."""
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("actor_learning_rate", "critic_learning_rate", "max_grad_norm", "exploration_noise"):
            require_range(self, name, 0.0, above=True)
        for name in ("target_noise", "target_noise_clip"):
            require_range(self, name, 0.0)
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        for name in ("critics", "policy_delay", "hidden_sizes"):
            require_range(self, name, 1)
        off_policy.check_settings(self)
        hindsight.check_settings(self)
        require(
            self.gradient_steps % self.policy_delay == 0,
            f"TD3: gradient_steps {self.gradient_steps} is no multiple of policy_delay {self.policy_delay}",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> TD3Agent:
        """Create the TD3 agent for an observation and an action space."""
        return TD3Agent(self, observation_space, action_space, methods)


class TD3Agent(Agent):
    """TD3 agent for an observation and an action space."""

    settings: TD3
    goals: Goals | None = None
    """What the task pays for other goals, where transitions take them in hindsight."""

    def __init__(
        self, settings: TD3, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.units = box_units("TD3", action_space)
        hindsight.check_space(settings, observation_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.idle_steps = off_policy.idle_steps(settings)
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.q = blocks["policy"], blocks["q"]
        self.head = self.policy.head
        self.copies, self.beside_observations = (TARGET_POLICY, TARGET_Q), ("q",)

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, an action in units of its bounds, and `q`, all critics."""
        s, space, units = self.settings, self.observation_space, self.units
        body, features = build_body(s.network, space, s.hidden_sizes, s.activation, "torch", whitens(s))
        head = DeterministicHead(features, units, initial_scale=1.0)
        return {"policy": Network(body, head, features), "q": critic_ensemble(s, space, units, s.critics)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target networks are copies of the networks, the replay memory is empty."""
        self.goals = hindsight.goals_for(self.settings, world)
        state = super().init(key, hyper, world)
        p = with_copy(with_copy(state["params"], TARGET_POLICY), TARGET_Q)
        state["params"] = {**p, "hyper": {**hyper, "warms_up": torch.ones_like(key, dtype=torch.bool)}}
        state["optimizer"] = init_optimizer(self.groups(state)[-1], state)
        state["replay"] = off_policy.init_replay(self.settings, world, state)
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions: the policy's with noise, uniformly random before learning starts; or without noise."""
        mean = self.forward(self.policy, "policy", p, observation)["mean"]
        if deterministic:
            return self.units.to_environment(mean), memory
        shape = mean.shape[key.dim() :]
        noise = random.normal(key, "exploration noise", 0, shape) * align(p["hyper"]["exploration_noise"], mean)
        uniform = random.uniform(key, "exploration", 0, shape) * 2.0 - 1.0
        action = torch.where(align(p["hyper"]["warms_up"], mean), uniform, (mean + noise).clamp(-1.0, 1.0))
        return self.units.to_environment(action), memory

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """One training iteration, with random actions before learning starts."""
        state["params"]["hyper"]["warms_up"] = off_policy.warms_up(self, state)
        self.goals = hindsight.goals_for(self.settings, world)
        return super().iterate(state, world)

    # ------------------------------------------------------------------ learn

    def values(self, p: Params, name: str, observation: tree.Tree, action: Tensor, ctx: Context) -> Tensor:
        """Values of the critics `name` for actions `[*L, B, ...]`, `[*L, critics, B]`."""
        x = {"observation": self.preprocess(p, observation), "action": action}
        return self.q.run({**p["weights"], **p["buffers"]}, x, ctx, f"{name}.")

    def critic_loss(self, p: Params, batch: tree.Tree, ctx: StepContext) -> Tensor:
        """Loss `[*L]` of the critics for transitions `[*L, B, ...]`; needs a key.

        (Q(s, a) - y)^2 with y = r + gamma min Q'(s', mu'(s') + clipped noise)
        """
        assert ctx.key is not None
        axes, valid, h = ctx.key.dim(), batch["valid"], p["hyper"]
        next_observation = batch["next_observation"]
        with torch.no_grad():
            after = self.forward(self.policy, "target_policy", p, next_observation)["mean"]
            noise = random.normal(ctx.key, "target noise", 0, after.shape[axes:]) * align(h["target_noise"], after)
            bound = align(h["target_noise_clip"], after)
            blurred = (after + torch.clamp(noise, -bound, bound)).clamp(-1.0, 1.0)
            next_action = self.units.to_environment(blurred)
            next_q = self.values(p, "target_q", next_observation, next_action, Context()).amin(axes)
            target = losses.td_target(batch["reward"], batch["discount"], next_q)
        q = self.values(p, "q", batch["observation"], batch["action"], ctx)
        error = (q - target.unsqueeze(axes)).square()
        if ctx.report:
            ctx.info["losses/q_values"] = q.mean((-2, -1))
        return masked_mean(error, valid.unsqueeze(axes).expand_as(error)).sum(-1)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of critics and, where it is updated, policy for transitions `[*L, B, ...]`; needs a key."""
        terms, observation = {"critic": self.critic_loss(p, batch, ctx)}, batch["observation"]

        # policy: -Q(s, mu(s)), by the first critic
        if ctx.moves("actor"):
            action = self.head.mode(self.forward(self.policy, "policy", p, observation, ctx))
            first = self.values(p, "q", observation, action, Context()).select(p["hyper"]["gamma"].dim(), 0)
            terms["actor"] = -masked_mean(first, batch["valid"])
        return terms

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Add the rollout to the replay memory; after a warm-up, take gradient steps on random transitions."""
        s, rate = self.settings, state["params"]["hyper"]["target_rate"]
        off_policy.remember(self, state, rollout, rewards)
        if not off_policy.ready(self, state):
            return state, {}
        moves = torch.stack([rate * (number % s.policy_delay == 0) for number in range(1, s.gradient_steps + 1)])
        follow = {TARGET_POLICY: moves, TARGET_Q: moves}
        state, info = off_policy.learn(self, state, self.groups, follow, draw=hindsight.drawing(self.goals, state))
        off_policy.end_warm_up(state)
        return state, info

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: critics in every gradient step, the policy in the last of every `policy_delay`."""
        h = state["params"]["hyper"]
        critic = Group("critic", ("q.",), ("critic",), optim.adam(h["critic_learning_rate"]), h["max_grad_norm"])
        actor = Group("actor", ("policy.",), ("actor",), optim.adam(h["actor_learning_rate"]), h["max_grad_norm"])
        return [(critic,)] * (self.settings.policy_delay - 1) + [(critic, actor)]
