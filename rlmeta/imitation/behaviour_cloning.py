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
    """What to imitate: a file of `rlmeta record`, or Demonstrations."""
    episodes: int = 0
    """Of the demonstrations, take only the first so many; 0 takes all."""
    num_steps: int = 50
    """Gradient steps in an iteration; budgets count gradient steps, for no environment is acted in."""
    batch_size: int = 64
    """Steps of demonstrations in a minibatch, drawn with replacement."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "linear"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    entropy_coefficient: PerLearner = 1e-3
    """Weight of the entropy bonus."""
    weight_decay: PerLearner = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PerLearner = 0.5
    """Clip each learner's gradient to this norm."""
    normalise_observation: bool = True
    """Whiten observations by the statistics of the demonstrations."""
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

    num_envs = 1

    adapts = False
    """A meta-learner's inner loop can't take its gradient steps."""

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
        """The imitator for environments of these spaces."""
        return BehaviourCloningAgent(self, observation_space, action_space, methods)


class BehaviourCloningAgent(Agent):
    """Behaviour cloning on given spaces."""

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
        given = chosen(settings.demonstrations, settings.episodes, observation_space, action_space)
        self.transitions: tree.Tree = None if given is None else given.transitions()
        self.policy = bare(self.networks)["policy"]
        self.head: Any = self.policy.head

    def networks(self) -> dict[str, Block]:
        """`policy` gives a distribution's parameters."""
        return {"policy": policy_network(self.settings, self.observation_space, self.action_space)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: World) -> State:
        """The state at the start of a run."""
        state = super().init(key, hyper, world)
        state["optimizer"] = init_optimizer(optim.adamw(hyper["learning_rate"]), state)
        return state if self.transitions is None else self.watch(state, self.transitions["observation"])

    def act(
        self, p: Params, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, tree.Tree]:
        """Actions `[*L, N, ...]`: a sample of the policy, or its mode."""
        distribution = self.forward(self.policy, "policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """-log pi(a | s) and the entropy bonus, `[*L]`, of a minibatch of demonstrations `[*L, B, ...]`."""
        distribution = self.forward(self.policy, "policy", p, batch["observation"], ctx)
        log_prob, entropy = self.head.log_prob(distribution, batch["action"]), self.head.entropy(distribution)
        ctx.info["losses/entropy"] = entropy.mean(-1)
        ctx.info["losses/log_prob"] = log_prob.mean(-1)
        return {"policy": -log_prob.mean(-1), "entropy": -p["hyper"]["entropy_coefficient"] * entropy.mean(-1)}

    def iterate(self, state: State, world: World) -> tuple[State, Metrics]:
        """Gradient steps on minibatches of the demonstrations; nothing is acted."""
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
        """n steps of the demonstrations, `[*L, n, ...]`."""
        return draw(self.transitions, random.fold(state["key"], "draw"), state["count"]["iterations"], n)


def chosen(
    given: Demonstrations | Unread | str | Path | None,
    episodes: int,
    observation_space: gym.Space,
    action_space: gym.Space,
) -> Demonstrations | None:
    """The demonstrations to imitate, after a check that they are of these spaces; None where they are left unread.

    Args:
        given: a file, or demonstrations.
        episodes: take only the first so many; 0 takes all.
        observation_space: of the task.
        action_space: of the task.

    Raises:
        DemonstrationError: none given, a broken file, too few episodes, or other spaces.
    """
    if given is None:
        raise DemonstrationError(
            "nothing to imitate: give demonstrations= (on the command line --demonstrations FILE, which "
            "`rlmeta record RUN --out FILE` writes)"
        )
    if isinstance(given, Unread):
        return None
    loaded = given if isinstance(given, Demonstrations) else Demonstrations.load(given)
    loaded.check(observation_space, action_space)
    return loaded.first(episodes) if episodes else loaded


def count_steps(state: State, steps: int) -> State:
    """Count an iteration that acted nowhere: what a budget counts are its gradient steps."""
    count = state["count"]
    moved = {name: count[name] + steps for name in ("vector_steps", "env_steps", "task_steps")}
    state["count"] = {**count, **moved, "iterations": count["iterations"] + 1}
    return state


def draw(transitions: tree.Tree, key: Tensor, counter: int | Tensor, count: int) -> tree.Tree:
    """`count` random steps of demonstrations `[M, ...]` for every learner: `[*L, count, ...]`."""
    rows = random.integers(key, "demonstrations", counter, (count,), len(next(tree.leaves(transitions))))
    return tree.map(lambda leaf: leaf.to(key.device)[rows], transitions)


class _Cloner:
    """What `step` needs to move any agent's policy towards demonstrated actions."""

    def __init__(self, agent: Any) -> None:
        self.agent, self.capture = agent, None if agent.capture is None else Capture()

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """-log pi(a | s), `[*L]`."""
        return {"policy": -self.agent.log_prob(p, batch).mean(-1)}


def warm_start(agent: Any, state: State, transitions: tree.Tree, steps: int, batch_size: int, rate: float) -> State:
    """Clone demonstrations with any agent's policy before it acts for the first time.

    Args:
        agent: has `log_prob`, and normalises observations by those of the demonstrations from here on.
        state: consumed; comes back with the policy's weights trained, and with what it shares with the value. The
            value's own weights and the optimizer's moments are as they were: both begin with the first rollout.
        transitions: of `Demonstrations.transitions()`.
        steps: gradient steps.
        batch_size: of a minibatch.
        rate: Adam's step size.
    """
    state = agent.watch(state, transitions["observation"])
    moments, optimizer = state["optimizer"], optim.adam(torch.full_like(state["progress"], rate, dtype=torch.float32))
    state["optimizer"] = init_optimizer(optimizer, state)
    cloner, key = _Cloner(agent), random.fold(state["key"], "warm start")
    for i in range(steps):
        state, _ = step(cloner, state, draw(transitions, key, i, batch_size), optimizer, report=False)
    state["optimizer"] = moments
    return state
