"""Conservative Q-learning, CQL(H), on soft actor-critic (Kumar et al., 2020).

The critics of SAC also push down the soft maximum of their values over all actions and pull up those of the data, so
that no action is overrated of which the data shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.sac import SAC, TARGET
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.world import World
from rlmeta.functional import random, tree
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
from rlmeta.learning.targets import with_copy
from rlmeta.nn import Block, Context, bare
from rlmeta.offline.fixed_data import check_settings, learn, load_transitions, minibatch

SHARED = (
    "initial_temperature",
    "critics",
    "initial_log_std",
    "normalise_observation",
    "hidden_sizes",
    "activation",
    "network",
)
"""Settings that are passed on to SAC."""


@dataclass(frozen=True)
class CQL:
    """Settings of conservative Q-learning. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Recorded episodes to learn from: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of recorded episodes to use, the first ones; 0 for all."""
    num_steps: int = 50
    """Gradient steps per iteration; budgets count them."""
    batch_size: int = 256
    """Transitions in a minibatch, drawn with replacement."""
    conservative_weight: PerLearner = 5.0
    """Weight (alpha) of the conservative penalty in the critics' loss; 0 is SAC on a fixed data set."""
    sampled_actions: int = 10
    """Box actions: how many are drawn uniformly, from the policy and from that of the next step."""
    actor_learning_rate: PerLearner = 1e-4
    """Adam's step size of the policy."""
    critic_learning_rate: PerLearner = 3e-4
    """Adam's step size of the critics."""
    temperature_learning_rate: PerLearner = 1e-4
    """Adam's step size of the temperature's logarithm; 0 keeps the initial one."""
    initial_temperature: float = 1.0
    """Initial temperature (entropy coefficient): the reward for a nat of entropy."""
    target_entropy: PerLearner = -1.0
    """Box actions: target entropy in nats per component of an action, in units of its bounds."""
    entropy_fraction: PerLearner = 0.2
    """Discrete actions: target entropy as a fraction of the largest, the mean log number of the allowed actions."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    target_rate: PerLearner = 0.005
    """Rate (tau) at which the target critics follow the critics in each gradient step."""
    critics: int = 2
    """Number of critics, of which the minimum is taken."""
    initial_log_std: float = 0.0
    """Box actions: the logarithm of the initial deviation, before actions are squashed into their bounds."""
    normalise_observation: bool = False
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
        for name in ("actor_learning_rate", "critic_learning_rate", "initial_temperature"):
            require_range(self, name, 0.0, above=True)
        for name in ("temperature_learning_rate", "conservative_weight"):
            require_range(self, name, 0.0)
        require_finite(self, "conservative_weight")
        for name in ("entropy_fraction", "gamma"):
            require_range(self, name, 0.0, 1.0)
        require_range(self, "target_rate", 0.0, 1.0, above=True)
        for name in ("critics", "sampled_actions", "hidden_sizes"):
            require_range(self, name, 1)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> CQLAgent:
        """Create the CQL agent for an observation and an action space."""
        return CQLAgent(self, observation_space, action_space, methods)


class CQLAgent(Agent):
    """CQL agent for an observation and an action space. Networks, targets, policy and temperature are those of SAC."""

    settings: CQL
    counts = "gradient steps"

    def __init__(
        self, settings: CQL, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        self.sac = SAC(**{name: getattr(settings, name) for name in SHARED}).bind(observation_space, action_space)
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.transitions = load_transitions(settings, observation_space, action_space)
        self.policy: Any = bare(self.networks)["policy"]
        self.head = self.policy.head
        self.copies, self.beside_observations = self.sac.copies, self.sac.beside_observations

    def networks(self) -> dict[str, Block]:
        """Networks: `policy`, a squashed Gaussian or categorical, `q`, all critics, and `temperature`."""
        return self.sac.networks()

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run: target critics are copies of the critics."""
        state = super().init(key, hyper, world)
        state["params"] = with_copy(state["params"], TARGET)
        state["optimizer"] = init_optimizer(self.groups(state)[0], state)
        return state if self.transitions is None else self.watch(state, self.transitions["observation"])

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]`, sampled from the policy or its likeliest."""
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Losses `[*L]` of critics, policy and temperature for transitions `[*L, B, ...]`; needs a key."""
        assert ctx.key is not None
        terms = self.sac.losses(p, batch, ctx)

        # critics: also alpha (log sum_a exp Q(s, a) - Q(s, a of the data))
        if self.sac.units is None:
            q, log_density = self.sac.values(p, "q", batch["observation"], None, ctx), None
        else:
            q, log_density = self.sampled_values(p, batch, random.fold(ctx.key, "conservative"), ctx)
        shown = self.sac.values(p, "q", batch["observation"], batch["action"], ctx)
        penalty = conservative_penalty(q, shown, log_density).sum(-1)
        terms["critic"] = terms["critic"] + p["hyper"]["conservative_weight"] * penalty
        if ctx.report:
            ctx.info["losses/conservative"] = penalty
        return terms

    def sampled_values(self, p: Params, batch: tree.Tree, key: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Values of drawn actions in the states of a minibatch, and the log-densities that they were drawn with.

        A third of them is uniform, a third from the policy, and a third from the policy in the next states.

        Returns:
            Values `[*L, critics, B, 3n]`, and log-densities in units of the bounds `[*L, 1, B, 3n]`.
        """
        axes, count, units = key.dim(), self.settings.sampled_actions, self.sac.units
        assert units is not None
        rows, size = batch["reward"].shape[axes], units.centre.numel()
        lead = (rows, count)
        with torch.no_grad():
            uniform = random.uniform(key, "uniform", 0, (*lead, size)) * 2.0 - 1.0
            drawn = [(units.to_environment(uniform), torch.full_like(uniform[..., 0], -size * math.log(2.0)))]
            for name in ("observation", "next_observation"):
                now = self.forward(self.policy, "policy", p, batch[name])
                many = {part: x.unsqueeze(-2).expand(*x.shape[:-1], count, size) for part, x in now.items()}
                action, log_prob = self.head.sample_log_prob(many, random.fold(key, name))
                drawn.append((action, log_prob + self.head.log_half_width))
            actions, densities = (torch.cat(parts, axes + 1) for parts in zip(*drawn))
        observation = tree.map(lambda x: x.repeat_interleave(3 * count, axes), batch["observation"])
        q = self.sac.values(p, "q", observation, actions.flatten(axes, axes + 1), ctx)
        return q.reshape(*q.shape[:-1], rows, 3 * count), densities.unsqueeze(axes)

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on minibatches of the data, without acting."""
        s, h = self.settings, state["params"]["hyper"]
        copies = {TARGET: h["target_rate"].expand(s.num_steps, *h["target_rate"].shape)}

        def minibatches(keys: Tensor) -> tree.Tree:
            return minibatch(self.transitions, keys, s.batch_size, h["gamma"])

        return learn(self, state, minibatches, self.groups, copies)

    def groups(self, state: State) -> Sequence[Sequence[Group]]:
        """Update schedule: critics, policy and temperature in every gradient step, each on its own loss alone."""
        unclipped = torch.full_like(state["params"]["hyper"]["gamma"], torch.inf)
        hyper = {**state["params"]["hyper"], "max_grad_norm": unclipped}
        return self.sac.groups({**state, "params": {**state["params"], "hyper": hyper}})

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n steps of the data, `[*L, n, ...]`."""
        return draw(self.transitions, state["key"], state["count"]["iterations"], n)


def conservative_penalty(q: Tensor, shown: Tensor, log_density: Tensor | None) -> Tensor:
    """Conservative penalty E[log sum_a exp Q(s, a) - Q(s, a of the data)], whose gradient is that of CQL(H).

    Of drawn actions the sum, an integral, is estimated by importance sampling: the mean of exp Q(s, a) / density(a).

    Args:
        q: values of all Discrete actions `[*L, B, A]`, or of n drawn ones `[*L, B, n]`.
        shown: values of the data's actions, `[*L, B]`.
        log_density: of the draws, broadcasting against q; None where all actions are there.

    Returns:
        `[*L]`

    Source: Kumar et al., "Conservative Q-learning for offline reinforcement learning", 2020, equation 4 and appendix F.
    """
    if log_density is None:
        largest = q.logsumexp(-1)
    else:
        largest = (q - log_density).logsumexp(-1) - math.log(q.shape[-1])
    same_shape(largest=largest, shown=shown)
    return (largest - shown).mean(-1)
