"""TD3+BC: offline reinforcement learning by TD3 whose policy also clones the data's actions (Fujimoto and Gu, 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.td3 import TARGET_POLICY, TARGET_Q, TD3
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.world import World
from rlmeta.functional import optim, tree
from rlmeta.functional.axes import align
from rlmeta.imitation.behaviour_cloning import draw
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import with_copy
from rlmeta.nn import Block, Context, bare
from rlmeta.offline.fixed_data import check_settings, learn, load_transitions, minibatch


@dataclass(frozen=True)
class TD3BC:
    """Settings of TD3+BC. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Recorded episodes to learn from: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of recorded episodes to use, the first ones; 0 for all."""
    num_steps: int = 50
    """Gradient steps of the critics per iteration, a multiple of `policy_delay`; budgets count them."""
    batch_size: int = 256
    """Transitions in a minibatch, drawn with replacement."""
    alpha: PerLearner = 2.5
    """Weight of the critic against cloning in the policy's loss; 0 is behaviour cloning by squared errors."""
    actor_learning_rate: PerLearner = 3e-4
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 3e-4
    """Adam's step size of the critics."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target networks follow the others in each update."""
    policy_delay: int = 2
    """Gradient steps of the critics per update of the policy and the target networks."""
    target_noise: PerLearner = 0.2
    """Standard deviation of the noise on the next action in the critics' target (target policy smoothing)."""
    target_noise_clip: PerLearner = 0.5
    """Bound to which the noise on the next action is clipped."""
    critics: int = 2
    """Number of critics, whose minimum is the target."""
    normalise_observation: bool = True
    """Normalise observations by the statistics of the recorded ones."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the default network, and of the critics behind any."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""

    num_envs = 1

    adapts = False
    """Whether it can be the inner loop of a meta-learner."""

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self)
        for name in ("actor_learning_rate", "critic_learning_rate"):
            require_range(self, name, 0.0, above=True)
        for name in ("alpha", "target_noise", "target_noise_clip"):
            require_range(self, name, 0.0)
        require_finite(self, "alpha")
        require_range(self, "gamma", 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        for name in ("critics", "policy_delay", "hidden_sizes"):
            require_range(self, name, 1)
        require(
            self.num_steps % self.policy_delay == 0,
            f"TD3BC: num_steps {self.num_steps} is no multiple of policy_delay {self.policy_delay}",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> TD3BCAgent:
        """Create the TD3+BC agent for an observation and an action space."""
        return TD3BCAgent(self, observation_space, action_space, methods)


class TD3BCAgent(Agent):
    """TD3+BC agent for an observation and an action space. Critics and targets are those of TD3."""

    settings: TD3BC
    counts = "gradient steps"

    def __init__(
        self, settings: TD3BC, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        shared = ("critics", "normalise_observation", "hidden_sizes", "activation", "network")
        self.td3 = TD3(**{name: getattr(settings, name) for name in shared}).bind(observation_space, action_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.transitions = load_transitions(settings, observation_space, action_space)
        self.policy: Any = bare(self.networks)["policy"]
        self.head = self.policy.head
        self.copies, self.beside_observations = self.td3.copies, self.td3.beside_observations

    def networks(self) -> dict[str, Block]:
        """Networks: `policy`, an action in units of its bounds, and `q`, all critics."""
        return self.td3.networks()

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target networks are copies of the networks."""
        state = super().init(key, hyper, world)
        state["params"] = with_copy(with_copy(state["params"], TARGET_POLICY), TARGET_Q)
        state["optimizer"] = init_optimizer(self.groups(state)[-1], state)
        return state if self.transitions is None else self.watch(state, self.transitions["observation"])

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]` of the policy, which is deterministic."""
        return self.head.mode(self.forward(self.policy, "policy", p, observation)), memory

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of critics and, where it is updated, policy for transitions `[*L, B, ...]`; needs a key."""
        terms = {"critic": self.td3.critic_loss(p, batch, ctx)}

        # policy: -lambda Q(s, mu(s)) + (mu(s) - a)^2 with lambda = alpha / E|Q(s, mu(s))|
        if ctx.moves("actor"):
            own = self.forward(self.policy, "policy", p, batch["observation"], ctx)
            action = self.head.mode(own)
            q = self.td3.values(p, "q", batch["observation"], action, Context()).select(p["hyper"]["alpha"].dim(), 0)
            cloning = (own["mean"] - self.td3.units.to_policy(batch["action"])).square().mean((-2, -1))
            terms["actor"] = normalised_policy_loss(q, p["hyper"]["alpha"]) + cloning
            if ctx.report:
                ctx.info["losses/cloning"] = cloning
        return terms

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on minibatches of the data, without acting."""
        s, h = self.settings, state["params"]["hyper"]
        moves = torch.stack([h["target_rate"] * (n % s.policy_delay == 0) for n in range(1, s.num_steps + 1)])
        copies = {TARGET_POLICY: moves, TARGET_Q: moves}

        def minibatches(keys: Tensor) -> tree.Tree:
            return minibatch(self.transitions, keys, s.batch_size, h["gamma"])

        return learn(self, state, minibatches, self.groups, copies)

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: critics in every gradient step, the policy in the last of every `policy_delay`."""
        h = state["params"]["hyper"]
        critic = Group("critic", ("q.",), ("critic",), optim.adam(h["critic_learning_rate"]))
        actor = Group("actor", ("policy.",), ("actor",), optim.adam(h["actor_learning_rate"]))
        return [(critic,)] * (self.settings.policy_delay - 1) + [(critic, actor)]

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n steps of the data, `[*L, n, ...]`."""
        return draw(self.transitions, state["key"], state["count"]["iterations"], n)


def normalised_policy_loss(q: Tensor, alpha: float | Tensor) -> Tensor:
    """Deterministic policy gradient in units of the values' mean size, -alpha E[Q] / E|Q|, whose divisor is constant.

    So alpha weighs it against cloning whatever the rewards' scale is.

    Args:
        q: values Q(s, mu(s)) of the policy's actions, `[*L, B]`.
        alpha: a number or `[*L]`.

    Returns:
        `[*L]`

    Source: Fujimoto and Gu, "A minimalist approach to offline reinforcement learning", 2021, equations 4 and 5.
    """
    mean, size = q.mean(-1), q.detach().abs().mean(-1)
    return -align(alpha, mean) * mean / size.clamp(min=torch.finfo(size.dtype).tiny)
