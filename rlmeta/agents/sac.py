"""Soft actor-critic (Haarnoja et al., 2018): off-policy maximum entropy reinforcement learning.

Two critics learn the soft value of an action, the policy climbs the lesser of them, and a temperature is set so that
the policy keeps the entropy it is asked for.
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
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align, masked_mean
from rlmeta.learning import off_policy
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy, with_copy
from rlmeta.nn import Block, Context, bare, head_for
from rlmeta.nn.initialisers import parameter
from rlmeta.rewards import Reward, check_rewards

TARGET = Copy("target", "q")


@dataclass(frozen=True)
class SAC:
    """Settings of SAC. A list for a number marked per learner compares its values."""

    num_envs: int = 4
    """Environments of each learner."""
    num_steps: int = 4
    """Steps in every environment between updates."""
    gradient_steps: int = 16
    """Gradient steps in each update."""
    batch_size: int = 256
    """Transitions in a minibatch."""
    capacity: int = 100_000
    """Transitions that each learner's replay memory holds."""
    learning_starts: int = 1_000
    """Transitions collected, with uniformly random actions, before the first gradient step."""
    actor_learning_rate: PerLearner = 3e-4
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 1e-3
    """Adam's step size of the critics."""
    temperature_learning_rate: PerLearner = 1e-3
    """Adam's step size of the temperature's logarithm; 0 keeps the initial one."""
    initial_temperature: float = 1.0
    """Initial temperature (entropy coefficient): the reward for a nat of entropy."""
    target_entropy: PerLearner = -1.0
    """Target entropy in nats per component of an action, in units of its bounds."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target critics follow the critics in each gradient step."""
    critics: int = 2
    """Number of critics, of which the minimum is taken."""
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
    rewards: tuple[Reward, ...] = ()
    """Reward shaping and intrinsic rewards to learn from, in order."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        check_rewards(self.rewards)
        for name in ("actor_learning_rate", "critic_learning_rate", "max_grad_norm", "initial_temperature"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "temperature_learning_rate", 0.0)
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        require_range(self, "critics", 1)
        require_range(self, "hidden_sizes", 1)
        off_policy.check_settings(self)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> SACAgent:
        """Create the SAC agent for an observation and an action space."""
        return SACAgent(self, observation_space, action_space, methods)


class Temperature(Block):
    """Temperature (entropy coefficient): a parameter, its logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log = parameter(value=float(torch.tensor(initial).log()))


class SACAgent(Agent):
    """SAC agent for an observation and an action space."""

    settings: SAC

    def __init__(
        self, settings: SAC, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.units = box_units("SAC", action_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.idle_steps = off_policy.idle_steps(settings)
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.q = blocks["policy"], blocks["q"]
        self.head = self.policy.head
        self.copies, self.beside_observations = (TARGET,), ("q", "temperature")

    def networks(self) -> dict[str, Block]:
        """Build the networks: `policy`, a squashed Gaussian, `q`, all critics, and `temperature`, of entropy."""
        s, space = self.settings, self.observation_space
        body, features = build_body(s.network, space, s.hidden_sizes, s.activation, "torch", whitens(s))
        head = head_for(self.action_space, features, initial_scale=1.0, action_bounds="squash")
        return {
            "policy": Network(body, head, features),
            "q": critic_ensemble(s, space, self.units, s.critics),
            "temperature": Temperature(s.initial_temperature),
        }

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target critics are copies of the critics, the replay memory is empty."""
        state = super().init(key, hyper, world)
        p = with_copy(state["params"], TARGET)
        state["params"] = {**p, "hyper": {**hyper, "warms_up": torch.ones_like(key, dtype=torch.bool)}}
        state["optimizer"] = init_optimizer(self.groups(state)[0], state)
        state["replay"] = off_policy.init_replay(self.settings, world, state)
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Choose actions: a sample from the policy, random before learning starts; or the policy's median."""
        distribution = self.forward(self.policy, "policy", p, observation)
        if deterministic:
            return self.head.mode(distribution), memory
        action = self.head.sample(distribution, key)
        shape = distribution["mean"].shape[key.dim() :]
        uniform = self.units.to_environment(random.uniform(key, "exploration", 0, shape) * 2.0 - 1.0)
        return torch.where(align(p["hyper"]["warms_up"], action), uniform, action), memory

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """One training iteration, with random actions before learning starts."""
        state["params"]["hyper"]["warms_up"] = off_policy.warms_up(self, state)
        return super().iterate(state, world)

    # ------------------------------------------------------------------ learn

    def values(self, p: Params, name: str, observation: tree.Tree, action: Tensor, ctx: Context) -> Tensor:
        """Minimum of the critics `name` for actions `[*L, B, ...]`, or the values of all, `[*L, critics, B]`."""
        x = {"observation": self.preprocess(p, observation), "action": action}
        return self.q.run({**p["weights"], **p["buffers"]}, x, ctx, f"{name}.")

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of critics, policy and temperature for transitions `[*L, B, ...]`; needs a key."""
        assert ctx.key is not None
        axes, valid = ctx.key.dim(), batch["valid"]
        alpha = p["weights"]["temperature.log"].exp()
        observation, next_observation = batch["observation"], batch["next_observation"]

        # critics: (Q(s, a) - y)^2 with y = r + gamma (min Q'(s', a') - alpha log pi(a' | s')), a' ~ pi(. | s')
        with torch.no_grad():
            after = self.forward(self.policy, "policy", p, next_observation)
            next_action, next_log_prob = self.head.sample_log_prob(after, random.fold(ctx.key, "next action"))
            next_q = self.values(p, "target", next_observation, next_action, Context()).amin(axes)
            soft = losses.soft_value(next_q, next_log_prob, alpha)
            target = losses.td_target(batch["reward"], batch["discount"], soft)
        q = self.values(p, "q", observation, batch["action"], ctx)
        error = (q - target.unsqueeze(axes)).square()
        critic = masked_mean(error, valid.unsqueeze(axes).expand_as(error)).sum(-1)

        # policy: alpha log pi(a | s) - min Q(s, a), a ~ pi(. | s)
        now = self.forward(self.policy, "policy", p, observation, ctx)
        action, log_prob = self.head.sample_log_prob(now, random.fold(ctx.key, "action"))
        best = self.values(p, "q", observation, action, Context()).amin(axes)
        actor = -masked_mean(losses.soft_value(best, log_prob, alpha), valid)

        # temperature: -log alpha (log pi(a | s) + wanted entropy)
        wanted = p["hyper"]["target_entropy"] * self.units.centre.numel() + self.head.log_half_width
        entropy = -masked_mean(log_prob.detach(), valid)
        temperature = p["weights"]["temperature.log"] * (entropy - wanted)
        if ctx.report:
            ctx.info |= {"losses/temperature": alpha, "losses/entropy": entropy, "losses/q_values": q.mean((-2, -1))}
        return {"critic": critic, "actor": actor, "temperature": temperature}

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Add the rollout to the replay memory; after a warm-up, take gradient steps on random transitions."""
        off_policy.remember(self, state, rollout, rewards)
        if not off_policy.ready(self, state):
            return state, {}
        rate = state["params"]["hyper"]["target_rate"]
        follow = {TARGET: rate.expand(self.settings.gradient_steps, *rate.shape)}
        state, info = off_policy.learn(self, state, self.groups, follow)
        off_policy.end_warm_up(state)
        return state, info

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: critics, policy and temperature in every gradient step, each on its own loss alone."""
        h = state["params"]["hyper"]
        return [
            (
                Group("critic", ("q.",), ("critic",), optim.adam(h["critic_learning_rate"]), h["max_grad_norm"]),
                Group("actor", ("policy.",), ("actor",), optim.adam(h["actor_learning_rate"]), h["max_grad_norm"]),
                Group("temperature", ("temperature.",), ("temperature",), optim.adam(h["temperature_learning_rate"])),
            )
        ]
