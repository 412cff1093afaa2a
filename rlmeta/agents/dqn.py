"""Deep Q-networks (Mnih et al., 2015), with double Q-learning (van Hasselt et al., 2016) and n-step targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import Agent, NetworkFactory
from rlmeta.agents.networks import q_network
from rlmeta.envs.world import World
from rlmeta.errors import SpaceError
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import align
from rlmeta.functional.schedules import ScheduleName, anneal, linear
from rlmeta.learning import replay
from rlmeta.learning.average import Average
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import Block, bare
from rlmeta.rewards import Reward, distinct


@dataclass(frozen=True)
class DQN:
    """Settings of DQN. A list for a number marked per learner compares its values."""

    num_envs: int = 4
    """Environments of each learner."""
    num_steps: int = 4
    """Steps in every environment between updates."""
    gradient_steps: int = 8
    """Gradient steps in each update."""
    batch_size: int = 64
    """Transitions in a minibatch."""
    capacity: int = 50_000
    """Transitions that each learner's replay memory holds."""
    learning_starts: int = 1_000
    """Transitions collected, with random actions, before the first gradient step."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    n_steps: int = 1
    """Rewards that are added up before the target network's value takes over."""
    target_every: int = 100
    """Gradient steps between two moves of the target network."""
    target_rate: PerLearner = 1.0
    """How far the target network moves towards the online one; 1 copies it."""
    average_rate: PerLearner = 1.0
    """Below 1, greedy actions (evaluation, `act`) come from a moving average of the weights, which goes this far
    towards them after each update; 1 acts by the weights themselves, as do runs with lifelong methods."""
    epsilon_start: PerLearner = 1.0
    """Probability of a random action at the start."""
    epsilon_end: PerLearner = 0.05
    """Probability of a random action once the exploration is over."""
    exploration_fraction: PerLearner = 0.2
    """Part of the budget over which epsilon falls linearly."""
    huber_delta: PerLearner = math.inf
    """Where the squared error turns linear; infinity keeps it squared, 1 is the paper's clipped error."""
    max_grad_norm: PerLearner = 10.0
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = False
    """Whiten observations by running statistics, saved with the weights and frozen in evaluation."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Your own network: from an observation space to a module that gives features [B, D]."""
    rewards: tuple[Reward, ...] = ()
    """What changes the reward it learns from, in order: shaping, intrinsic rewards."""

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

    def __post_init__(self) -> None:
        check_types(self)
        distinct(self.rewards)
        for name in ("learning_rate", "max_grad_norm", "huber_delta"):
            require_range(self, name, 0.0, above=True)
        for name in ("gamma", "epsilon_start", "epsilon_end"):
            require_range(self, name, 0.0, 1.0)
        for name in ("target_rate", "average_rate", "exploration_fraction"):
            require_range(self, name, 0.0, 1.0, above=True)
        for name in ("num_envs", "num_steps", "gradient_steps", "batch_size", "n_steps", "target_every"):
            require_range(self, name, 1)
        require_range(self, "learning_starts", 0)
        rows = self.capacity // self.num_envs
        require(
            rows >= self.num_steps + self.n_steps,
            f"DQN: capacity {self.capacity} holds {rows} steps of {self.num_envs} environments, expected at least "
            f"num_steps + n_steps = {self.num_steps + self.n_steps}",
        )
        require(
            self.learning_starts <= self.capacity,
            f"DQN: learning_starts {self.learning_starts} is more than capacity {self.capacity}",
        )

    def bind(self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()) -> DQNAgent:
        """The agent for environments of these spaces."""
        return DQNAgent(self, observation_space, action_space, methods)


class DQNAgent(Agent):
    """DQN on given spaces: act, remember, learn."""

    settings: DQN

    def __init__(
        self, settings: DQN, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        if not isinstance(action_space, gym.spaces.Discrete):
            raise SpaceError(f"DQN chooses among Discrete actions, the task has {action_space}: use PPO or A2C")
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.idle_steps = max(-(-settings.learning_starts // settings.num_envs), settings.n_steps)
        self.averaged = min(values_of(settings.average_rate)) < 1.0 and not self.methods
        self.acting_network = "average" if self.averaged else "q"
        self.q: Any = bare(self.networks)["q"]

    def networks(self) -> dict[str, Block]:
        """`q` gives the value of every action."""
        return {"q": q_network(self.settings, self.observation_space, self.action_space)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """The state at the start of a run: the target network is the online one, the memory is empty."""
        state = super().init(key, hyper, world)
        p = state["params"]
        average = _online_as("average", p) if self.averaged else {}
        p["buffers"] = {**p["buffers"], **_online_as("target", p), **average}
        p["hyper"] = {**hyper, "epsilon": hyper["epsilon_start"].clone()}
        state["optimizer"] = init_optimizer(optim.adam(hyper["learning_rate"]), state)
        state["replay"] = replay.init(world, state["world"], self.settings.capacity // self.settings.num_envs)
        return state

    def begin_task(self, state: State, world: World, key: Tensor) -> State:
        """Begin the task with an empty replay memory: its steps are counted from here."""
        state = super().begin_task(state, world, key)
        state["replay"] = tree.map(torch.zeros_like, state["replay"])
        return state

    def enter(self, state: State, world: World, key: Tensor) -> State:
        """Go on in the world's task with the memory as it is: the newest steps in it are the last of their episodes."""
        state = super().enter(state, world, key)
        ends, axes, steps = state["replay"]["truncated"], key.dim(), int(state["count"]["task_steps"].max())
        if steps:
            row = torch.tensor([(steps - 1) % ends.shape[axes]], device=ends.device)
            state["replay"] = {**state["replay"], "truncated": ends.index_fill(axes, row, True)}
        return state

    # ------------------------------------------------------------------ act

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """The best action, or a random one with probability epsilon, `[*L, N]`; a masked action is never taken."""
        values = self.forward(self.q, "average" if deterministic and self.averaged else "q", p, observation)
        best = self.q.head.mode(values)
        if deterministic:
            return best, memory
        rows = best.shape[key.dim() :]
        noise = random.uniform(key, "exploration", 0, values.shape[key.dim() :]).masked_fill(values == -torch.inf, -1.0)
        explore = random.uniform(key, "epsilon", 0, rows) < align(p["hyper"]["epsilon"], best)
        return torch.where(explore, self.q.head.mode(noise), best), memory

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Act with the epsilon of the learner's progress, remember, learn."""
        state["params"]["hyper"]["epsilon"] = self.epsilon(state)
        return super().iterate(state, world)

    def epsilon(self, state: State) -> Tensor:
        """The probability of a random action `[*L]` at the learner's progress; 1 before learning starts."""
        h = state["params"]["hyper"]
        spent = state["progress"] / h["exploration_fraction"]
        epsilon = torch.as_tensor(linear(h["epsilon_start"], h["epsilon_end"])(spent))
        warm_up = state["count"]["task_steps"] * self.settings.num_envs < self.settings.learning_starts
        return torch.where(warm_up, torch.ones_like(epsilon), epsilon)

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """The temporal-difference loss `[*L]` of a minibatch of transitions `[*L, B, ...]`."""
        with torch.no_grad():
            next_q = self.forward(self.q, "target", p, batch["next_observation"])
            if self.settings.double:
                next_online = self.forward(self.q, "q", p, batch["next_observation"])
                target = losses.double_q_target(batch["reward"], batch["discount"], next_q, next_online)
            else:
                target = losses.q_target(batch["reward"], batch["discount"], next_q)
        values = self.forward(self.q, "q", p, batch["observation"], ctx)
        chosen = self.q.head.take(values, batch["action"])
        ctx.info["losses/q_values"] = chosen.mean(-1)
        return {"q": losses.huber_loss(chosen, target, p["hyper"]["huber_delta"], batch["valid"])}

    def log_prob(self, p: Params, batch: tree.Tree) -> Tensor:
        """log softmax of the action values, `[*L, B]`: what Fisher information and distillation are taken of."""
        values = self.forward(self.q, "q", p, batch["observation"])
        return self.q.head.take(values.log_softmax(-1), batch["action"])

    def update(self, state: State, rollout: Rollout, rewards: dict[str, Tensor]) -> tuple[State, Metrics]:
        """Remember the rollout; once there is enough, take gradient steps on random transitions."""
        s, axes = self.settings, state["key"].dim()
        reward = torch.stack(list(rewards.values())).sum(0)
        end = int(state["count"]["task_steps"].max()) + s.num_steps
        state["replay"] = replay.insert(state["replay"], rollout, reward, end - s.num_steps, axes)
        rate, h = self.annealed(state), state["params"]["hyper"]
        metrics = {"charts/learning_rate": rate, "charts/epsilon": h["epsilon"]}
        if end * s.num_envs < s.learning_starts or end < s.n_steps:
            return state, metrics
        average, optimizer = Average(), optim.adam(rate)
        for _ in range(s.gradient_steps):
            key = random.fold(state["key"], state["count"]["gradient_steps"])
            batch = replay.sample(state["replay"], key, s.batch_size, end, h["gamma"], s.n_steps)
            state, info = step(self, state, batch, optimizer, max_grad_norm=h["max_grad_norm"], methods=self.methods)
            self.follow(state)
            average.add(info)
        self.average_weights(state)
        return state, {**average.result(), **metrics}

    def average_weights(self, state: State) -> None:
        """Move the average of the weights on, where there is one (Polyak and Juditsky, 1992)."""
        if self.averaged:
            _move("average", state, state["params"]["hyper"]["average_rate"])

    def annealed(self, state: State) -> Tensor:
        """The learning rate `[*L]` at the learner's progress."""
        rate = state["params"]["hyper"]["learning_rate"]
        return anneal(rate, self.settings.learning_rate_schedule, state["progress"])

    def follow(self, state: State) -> None:
        """Move the target network every so many gradient steps."""
        if int(state["count"]["gradient_steps"].max()) % self.settings.target_every == 0:
            _move("target", state, state["params"]["hyper"]["target_rate"])


@torch.no_grad()
def _move(name: str, state: State, rate: Tensor) -> None:
    """copy += rate (online - copy), for the learners that are active."""
    p = state["params"]
    rate = rate * state["active"]
    moved = {name: _nearer(p["buffers"][name], value, rate) for name, value in _online_as(name, p).items()}
    p["buffers"] = {**p["buffers"], **moved}


def _nearer(copy: Tensor, online: Tensor, rate: Tensor) -> Tensor:
    """copy + rate (online - copy); what is counted, not measured, is taken over."""
    if not online.is_floating_point():
        return torch.where(torch.as_tensor(align(rate, online) > 0, device=online.device), online, copy)
    return torch.lerp(copy.to(online.dtype), online, align(rate.to(online.dtype), online))


def _online_as(name: str, p: Params) -> dict[str, Tensor]:
    """The online network's weights and buffers under another name."""
    online = {**p["weights"], **p["buffers"]}
    return {f"{name}.{n.removeprefix('q.')}": t.detach().clone() for n, t in online.items() if n.startswith("q.")}
