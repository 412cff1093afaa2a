"""Implicit Q-learning: offline reinforcement learning that never values an action outside the data (Kostrikov, 2021).

A value function learns an upper expectile of the critics over the data's actions, the critics learn from that value,
and the policy clones the data's actions, the better ones more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.critics import box_units, critic_ensemble
from rlmeta.agents.networks import policy_network, q_network, value_network
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, tree
from rlmeta.functional.axes import align
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.functional.shapes import same_shape
from rlmeta.imitation.behaviour_cloning import draw
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.targets import Copy, with_copy
from rlmeta.nn import ActionBounds, Block, Context, Ensemble, bare
from rlmeta.offline.fixed_data import check_settings, learn, load_transitions, minibatch

TARGET = Copy("target", "q")


@dataclass(frozen=True)
class IQL:
    """Settings of implicit Q-learning. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Recorded episodes to learn from: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of recorded episodes to use, the first ones; 0 for all."""
    num_steps: int = 50
    """Gradient steps per iteration; budgets count them."""
    batch_size: int = 256
    """Transitions in a minibatch, drawn with replacement."""
    expectile: PerLearner = 0.7
    """Expectile of the critics that the value function learns: 0.5 is their mean, near 1 it is their maximum."""
    beta: PerLearner = 3.0
    """Inverse temperature of the policy's weights exp(beta advantage): 0 is behaviour cloning."""
    largest_weight: PerLearner = 100.0
    """Bound of a sample's weight in the policy's loss."""
    actor_learning_rate: PerLearner = 3e-4
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 3e-4
    """Adam's step size of critics and value function."""
    actor_schedule: ScheduleName = "cosine"
    """Schedule of the policy's step size: constant, or annealed to 0 over the budget, linearly or along a cosine."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target critics follow the critics in each gradient step."""
    critics: int = 2
    """Number of critics, of which the minimum is taken."""
    normalise_observation: bool = False
    """Normalise observations by the statistics of the recorded ones."""
    action_bounds: ActionBounds = "scale"
    """Box actions: scale them by the bounds; squash them into the bounds by a tanh; or use raw units, clipped."""
    initial_log_std: float = 0.0
    """Box actions: initial log standard deviation, in the policy's units."""
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
        for name in ("actor_learning_rate", "critic_learning_rate", "largest_weight"):
            require_range(self, name, 0.0, above=True)
        require_range(self, "beta", 0.0)
        require_finite(self, "beta", "largest_weight")
        for name in ("expectile", "gamma"):
            require_range(self, name, 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        for name in ("critics", "hidden_sizes"):
            require_range(self, name, 1)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> IQLAgent:
        """Create the IQL agent for an observation and an action space."""
        return IQLAgent(self, observation_space, action_space, methods)


class IQLAgent(Agent):
    """IQL agent for an observation and an action space, a Box with bounds or Discrete."""

    settings: IQL
    counts = "gradient steps"

    def __init__(
        self, settings: IQL, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.units = None if isinstance(action_space, gym.spaces.Discrete) else box_units("IQL", action_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.transitions = load_transitions(settings, observation_space, action_space)
        blocks: dict[str, Any] = bare(self.networks)
        self.policy, self.value, self.q = blocks["policy"], blocks["value"], blocks["q"]
        self.head = self.policy.head
        self.copies, self.beside_observations = (TARGET,), ("q",)

    def networks(self) -> dict[str, Block]:
        """Networks: `policy`, a distribution over actions, `value`, of an observation, and `q`, all critics."""
        s, space, actions = self.settings, self.observation_space, self.action_space
        if self.units is None:
            q = Ensemble(lambda: q_network(s, space, actions), s.critics)
        else:
            q = critic_ensemble(s, space, self.units, s.critics)
        return {"policy": policy_network(s, space, actions), "value": value_network(s, space), "q": q}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target critics are copies of the critics."""
        state = super().init(key, hyper, world)
        state["params"] = with_copy(state["params"], TARGET)
        state["optimizer"] = init_optimizer(self.groups(state)[0], state)
        return state if self.transitions is None else self.watch(state, self.transitions["observation"])

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]`, sampled from the policy or its mode."""
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    def values(self, p: Params, name: str, observation: tree.Tree, action: Tensor, ctx: Context) -> Tensor:
        """Values `[*L, critics, B]` by all critics `name` of actions `[*L, B, ...]`."""
        tensors, seen = {**p["weights"], **p["buffers"]}, self.preprocess(p, observation)
        if self.units is not None:
            return self.q.run(tensors, {"observation": seen, "action": action}, ctx, f"{name}.")
        q: Tensor = self.q.run(tensors, seen, ctx, f"{name}.")
        return q.gather(-1, action.unsqueeze(-2).unsqueeze(-1).expand(*q.shape[:-1], 1)).squeeze(-1)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of value function, critics and policy for transitions `[*L, B, ...]`."""
        h, observation, action = p["hyper"], batch["observation"], batch["action"]
        axes = h["gamma"].dim()

        # value: |expectile - 1(A < 0)| A^2 with A = min Q'(s, a) - V(s)
        with torch.no_grad():
            best = self.values(p, "target", observation, action, Context()).amin(axes)
        value = self.forward(self.value, "value", p, observation, ctx)
        terms = {"value": expectile_loss(value, best, h["expectile"])}

        # critics: (Q(s, a) - y)^2 with y = r + gamma V(s')
        with torch.no_grad():
            after = self.forward(self.value, "value", p, batch["next_observation"])
            target = losses.td_target(batch["reward"], batch["discount"], after)
        q = self.values(p, "q", observation, action, ctx)
        terms["critic"] = (q - target.unsqueeze(axes)).square().mean(-1).sum(-1)

        # policy: -min(exp(beta A), bound) log pi(a | s)
        distribution = self.forward(self.policy, "policy", p, observation, ctx)
        advantage, log_prob = (best - value).detach(), self.head.log_prob(distribution, action)
        weight = torch.exp(align(h["beta"], advantage) * advantage).minimum(align(h["largest_weight"], advantage))
        terms["actor"] = -(weight * log_prob).mean(-1)
        if ctx.report:
            seen = {"value": value, "q_values": q.mean(axes), "weight": weight, "log_prob": log_prob}
            ctx.info |= {f"losses/mean_{name}": each.mean(-1) for name, each in seen.items()}
        return terms

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on minibatches of the data, without acting."""
        s, h = self.settings, state["params"]["hyper"]
        copies = {TARGET: h["target_rate"].expand(s.num_steps, *h["target_rate"].shape)}

        def minibatches(keys: Tensor) -> tree.Tree:
            return minibatch(self.transitions, keys, s.batch_size, h["gamma"])

        return learn(self, state, minibatches, self.groups, copies)

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: value function, critics and policy in every gradient step, each on its own loss alone."""
        h = state["params"]["hyper"]
        rate = anneal(h["actor_learning_rate"], self.settings.actor_schedule, state["progress"])
        return [
            (
                Group("value", ("value.",), ("value",), optim.adam(h["critic_learning_rate"])),
                Group("critic", ("q.",), ("critic",), optim.adam(h["critic_learning_rate"])),
                Group("actor", ("policy.",), ("actor",), optim.adam(rate)),
            )
        ]

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n steps of the data, `[*L, n, ...]`."""
        return draw(self.transitions, state["key"], state["count"]["iterations"], n)


def expectile_loss(prediction: Tensor, target: Tensor, expectile: float | Tensor) -> Tensor:
    """Expectile regression, E[|t - 1(u < 0)| u^2] with u = target - prediction (Newey and Powell, 1987).

    The best constant prediction is the t-expectile of the targets: their mean for t = 1/2.

    Args:
        prediction: `[*L, B]`.
        target: `[*L, B]`, detached.
        expectile: t in [0, 1], a number or `[*L]`.

    Returns:
        `[*L]`

    Source: Kostrikov, Nair and Levine, "Offline reinforcement learning with implicit Q-learning", 2021, equation 5.
    """
    same_shape(prediction=prediction, target=target)
    error = target - prediction
    level = align(expectile, error)
    return (torch.where(error < 0, 1 - level, level * torch.ones_like(error)) * error.square()).mean(-1)
