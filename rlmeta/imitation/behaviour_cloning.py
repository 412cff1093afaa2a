"""Behaviour cloning: imitation as supervised learning of actions (Pomerleau, 1991)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.agent import LOG_STD_RANGE, Agent, NetworkFactory
from rlmeta.agents.networks import policy_network
from rlmeta.data.demonstrations import Demonstrations, Unread
from rlmeta.engine.capture import Capture
from rlmeta.envs.world import World
from rlmeta.errors import DemonstrationError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.average import Average
from rlmeta.learning.field_types import check_types
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.phases import own_step
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import ActionBounds, Block, bare


@dataclass(frozen=True)
class BehaviourCloning:
    """Settings of behaviour cloning. A list for a number marked per learner compares its values."""

    demonstrations: Demonstrations | str | None = None
    """Expert demonstrations: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Number of demonstrated episodes to use, the first ones; 0 for all."""
    num_steps: int = 50
    """Gradient steps per iteration; budgets count gradient steps, since no environment is stepped."""
    batch_size: int = 64
    """Steps of demonstrations in a minibatch, drawn with replacement."""
    learning_rate: PerLearner = 1e-3
    """Adam's learning rate."""
    learning_rate_schedule: ScheduleName = "linear"
    """Schedule of the learning rate: constant, or annealed to 0 over the budget, linearly or along a cosine."""
    entropy_coefficient: PerLearner = 1e-3
    """Weight of the entropy bonus."""
    weight_decay: PerLearner = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PerLearner = 0.5
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = True
    """Normalise observations by the statistics of the demonstrations."""
    action_bounds: ActionBounds = "scale"
    """Box actions: scale them by the bounds, so that the policy starts on the scale of the task in any units; squash
    them into the bounds by a tanh; or use raw units, clipped to the bounds."""
    initial_log_std: float = 0.0
    """Box actions: initial log standard deviation, in the policy's units."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the default network."""
    network: NetworkFactory | None = None
    """Feature network: a function from the observation space to a module that returns features [B, D]."""

    num_envs = 1

    adapts = False
    """Whether it can be the inner loop of a meta-learner."""

    def __post_init__(self) -> None:
        check_types(self)
        require_range(self, "initial_log_std", *LOG_STD_RANGE)
        for name in ("learning_rate", "max_grad_norm"):
            require_range(self, name, 0.0, above=True)
        for name in ("entropy_coefficient", "weight_decay", "episodes"):
            require_range(self, name, 0.0)
        for name in ("num_steps", "batch_size"):
            require_range(self, name, 1)

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> BehaviourCloningAgent:
        """Create the behaviour cloning agent for an observation and an action space."""
        return BehaviourCloningAgent(self, observation_space, action_space, methods)


class BehaviourCloningAgent(Agent):
    """Behaviour cloning agent."""

    settings: BehaviourCloning
    counts = "gradient steps"

    def __init__(
        self,
        settings: BehaviourCloning,
        observation_space: gym.Space,
        action_space: gym.Space,
        methods: Sequence[Method] = (),
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        loaded = load_demonstrations(settings.demonstrations, settings.episodes, observation_space, action_space)
        self.transitions: tree.Tree = None if loaded is None else loaded.transitions()
        self.policy = bare(self.networks)["policy"]
        self.head: Any = self.policy.head

    def networks(self) -> dict[str, Block]:
        """Networks: `policy`, from observations to the parameters of an action distribution."""
        return {"policy": policy_network(self.settings, self.observation_space, self.action_space)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """Initial state of a run."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(optim.adamw(hyper["learning_rate"]), state)
        return state if self.transitions is None else self.watch(state, self.transitions["observation"])

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]`, sampled from the policy or its mode."""
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Negative log-likelihood of demonstrated actions and entropy bonus, `[*L]`, on a minibatch `[*L, B, ...]`."""
        distribution = self.forward(self.policy, "policy", p, batch["observation"], ctx)
        log_prob, entropy = self.head.log_prob(distribution, batch["action"]), self.head.entropy(distribution)
        ctx.info["losses/entropy"] = entropy.mean(-1)
        ctx.info["losses/log_prob"] = log_prob.mean(-1)
        return {"policy": -log_prob.mean(-1), "entropy": -p["hyper"]["entropy_coefficient"] * entropy.mean(-1)}

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Iteration: gradient steps on minibatches of the demonstrations, without acting."""
        s, h, average = self.settings, state["params"]["hyper"], Average()
        rate = anneal(h["learning_rate"], s.learning_rate_schedule, state["progress"])
        optimizer = optim.adamw(rate, weight_decay=h["weight_decay"])
        for i in range(s.num_steps):
            batch = draw(self.transitions, state["key"], state["count"]["iterations"] * s.num_steps + i, s.batch_size)
            own = own_step(self, state, batch)
            if own is None:
                bound = h["max_grad_norm"]
                own = step(self, state, batch, optimizer, max_grad_norm=bound, methods=self.methods)
            state = own[0]
            average.add(own[1])
        return count_steps(state, s.num_steps), {**average.result(), "charts/learning_rate": rate}

    def draw(self, state: State, world: World, n: int) -> tree.Tree:
        """Draw n steps of the demonstrations, `[*L, n, ...]`."""
        return draw(self.transitions, random.fold(state["key"], "draw"), state["count"]["iterations"], n)


def load_demonstrations(
    source: Demonstrations | Unread | str | Path | None,
    episodes: int,
    observation_space: gym.Space,
    action_space: gym.Space,
) -> Demonstrations | None:
    """Load the demonstrations to imitate and check their spaces; None if they are left unread.

    Args:
        source: a file, or demonstrations.
        episodes: number of episodes to use, the first ones; 0 for all.
        observation_space: of the task.
        action_space: of the task.

    Raises:
        DemonstrationError: there are no demonstrations or too few episodes, the file is broken, or spaces differ.
    """
    if source is None:
        raise DemonstrationError(
            "nothing to imitate: give demonstrations= (on the command line --demonstrations FILE, which "
            "`rlmeta record RUN --out FILE` writes)"
        )
    if isinstance(source, Unread):
        return None
    loaded = source if isinstance(source, Demonstrations) else Demonstrations.load(source)
    loaded.check(observation_space, action_space)
    return loaded.first(episodes) if episodes else loaded


def count_steps(state: State, steps: int) -> State:
    """Count the steps of an iteration without acting: budgets count its gradient steps."""
    count = state["count"]
    moved = {name: count[name] + steps for name in ("vector_steps", "env_steps", "task_steps")}
    state["count"] = {**count, **moved, "iterations": count["iterations"] + 1}
    return state


def draw(transitions: tree.Tree, key: Tensor, counter: int | Tensor, count: int) -> tree.Tree:
    """Draw random steps of demonstrations for every learner, with replacement.

    Args:
        transitions: steps of the demonstrations, `[M, ...]`.
        key: `[*L]`.
        counter: a number or `[*L]`: how many minibatches were drawn before.
        count: of steps.

    Returns:
        `[*L, count, ...]`
    """
    rows = random.integers(key, "demonstrations", counter, (count,), len(next(tree.leaves(transitions))))
    return tree.map(lambda leaf: leaf.to(key.device)[rows], transitions)


class _Cloner:
    """Behaviour cloning loss of any agent's policy, with the interface that `step` needs."""

    def __init__(self, agent: Any) -> None:
        self.agent, self.capture = agent, None if agent.capture is None else Capture()

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Negative log-likelihood of demonstrated actions, `[*L]`."""
        return {"policy": -self.agent.log_prob(p, batch).mean(-1)}


def warm_start(agent: Any, state: State, transitions: tree.Tree, steps: int, batch_size: int, rate: float) -> State:
    """Pretrain any agent's policy by behaviour cloning, before its first rollout.

    Args:
        agent: has `log_prob`; its observation statistics from here on include the demonstrations.
        state: initial state, consumed.
        transitions: of `Demonstrations.transitions()`.
        steps: number of gradient steps.
        batch_size: of a minibatch.
        rate: Adam's learning rate.

    Returns:
        The state with the policy's weights trained, and those it shares with the value function. The value function's
        own weights and the optimizer's moments are unchanged.
    """
    state = agent.watch(state, transitions["observation"])
    moments, optimizer = state["optimizer"], optim.adam(torch.full_like(state["progress"], rate, dtype=torch.float32))
    state["optimizer"] = init_optimizer(optimizer, state)
    cloner, key = _Cloner(agent), random.fold(state["key"], "warm start")
    for i in range(steps):
        state, _ = step(cloner, state, draw(transitions, key, i, batch_size), optimizer, report=False)
    state["optimizer"] = moments
    return state
