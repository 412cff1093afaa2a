"""Prototypical network: few-shot classification by the distance to class means in an embedding.

Snell, Swersky and Zemel, "Prototypical Networks for Few-shot Learning", 2017.

    c_k = mean of f(x) over the support of class k                               (1)
    p(y = k | x) = softmax over k of -|f(x) - c_k|^2                             (2)
    loss = -log p(y | x), mean over the query                              (algorithm 1)

What is learned: one embedding f for all tasks. Inner algorithm: a mean, nothing is adapted and no step is taken, so the
tasks of a meta-batch are more rows of one forward pass. With one sample a class it is the nearest neighbour in the
embedding; with any number of them a linear classifier, 2 c_k · f(x) - |c_k|^2 up to what all classes share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import torch
from torch import Tensor, nn

from rlmeta.agents.networks import build_body, check_network
from rlmeta.data.samples import EVERYTHING
from rlmeta.engine.capture import Capture
from rlmeta.envs.families import FamilyWorld
from rlmeta.envs.task import TaskFamily
from rlmeta.envs.task_families import minimises
from rlmeta.errors import SettingError, require_count
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics, Score, initial_memories, initial_state
from rlmeta.learning.method import Method, effective_params
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, check_choices, require, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.meta.checks import check_samples
from rlmeta.nn import Block, Context, bare
from rlmeta.supervised.learner import require_target

TASKS_AT_ONCE = 50
"""Number of tasks of each learner in a forward pass of an evaluation."""


@dataclass(frozen=True)
class ProtoNet:
    """Settings of a prototypical network. A list for a number marked per learner compares its values."""

    num_envs: int = 16
    """Tasks of a meta-batch."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size."""
    learning_rate_schedule: ScheduleName = "constant"
    """Keep the learning rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    max_grad_norm: PerLearner = math.inf
    """Clip each learner's gradient to this norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the layers of the default embedding, the last of which is the embedding."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default embedding."""
    network: Callable[[gym.Space], nn.Module] | None = None
    """Your own embedding: from an observation space to a module that gives features [B, D]."""

    learns_from_tasks = True

    def __post_init__(self) -> None:
        check_choices(self)
        require_range(self, "learning_rate", 0.0, above=True)
        require_range(self, "max_grad_norm", 0.0, above=True)
        require_finite(self, "learning_rate")
        require_range(self, "num_envs", 1)

    def bind(
        self, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> ProtoNetLearner:
        """Create the meta-learner for an observation and an action space."""
        return ProtoNetLearner(self, observation_space, target_space, methods)


# ---------------------------------------------------------------------- the paper's two equations


def prototypes(features: Tensor, target: Tensor, classes: int) -> Tensor:
    """Class prototypes: the mean of every class's features.

    Args:
        features: of the support, `[*L, n, D]`.
        target: `[*L, n]` int64 in [0, C).
        classes: C; each has a sample.

    Returns:
        c, `[*L, C, D]`.
    """
    member = (target.unsqueeze(-2) == torch.arange(classes, device=target.device).unsqueeze(-1)).to(features.dtype)
    return member @ features / member.sum(-1, keepdim=True)


def logits(features: Tensor, centres: Tensor) -> Tensor:
    """Logits -|f(x) - c|^2, `[*L, B, C]`, for features `[*L, B, D]` and prototypes `[*L, C, D]`."""
    return -(features.unsqueeze(-2) - centres.unsqueeze(-3)).square().sum(-1)


class ProtoNetLearner:
    """Prototypical network learner for an observation space and classes."""

    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    steps_per_iteration = 1
    counts = "tasks"
    score = Score("accuracy")
    acts = False
    answers = True
    predicts: tuple[str, ...] = ()

    def __init__(
        self, settings: ProtoNet, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        require_target(target_space, gym.spaces.Discrete, "ProtoNet", "MAML")
        recorded = check_network(settings, observation_space, rows=True)
        self.settings, self.methods = settings, tuple(methods)
        self.observation_space, self.classes = observation_space, int(target_space.n)  # type: ignore[attr-defined]
        self.capture = Capture() if recorded else None
        self.net = bare(self.networks)["net"]

    def networks(self) -> dict[str, Block]:
        """Build the network: `net`, the embedding."""
        s = self.settings
        return {"net": build_body(s.network, self.observation_space, s.hidden_sizes, s.activation, "torch")[0]}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: FamilyWorld) -> State:
        """Initial state of a run.

        Raises:
            SettingError: a family of something else than labelled samples.
        """
        of = type(world.family).__name__
        require(not minimises(world.family), f"{of} is a family of functions to minimise: use LearnedOptimizer")
        require(not isinstance(world.family, TaskFamily), f"{of} is a family to act in: use MAML over REINFORCE or PPO")
        check_samples(world.family)
        state = initial_state(self.networks, key, hyper)
        state["world"] = world.reset(key)
        state["optimizer"] = init_optimizer(self.optimizer(state), state)
        state["methods"] = initial_memories(self, self.methods, state)
        return state

    def begin_task(self, state: State, world: FamilyWorld, key: Tensor) -> State:
        """Return the state as it is: a family has no order of tasks."""
        raise SettingError("ProtoNet learns from a family of tasks, not along a stream: give it a family")

    enter = begin_task

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes: the weights after the lifelong methods' hooks."""
        return effective_params(self, state)

    def optimizer(self, state: State) -> optim.Optimizer:
        """Adam, with the learning rate at the current progress."""
        rate = state["params"]["hyper"]["learning_rate"]
        return optim.adam(anneal(rate, self.settings.learning_rate_schedule, state["progress"]))

    # ------------------------------------------------------------------ embed, average, compare

    def logits(self, p: Params, support: tree.Tree, query: tree.Tree, ctx: Context) -> Tensor:
        """Logits of the query's inputs, `[*L, K, B, C]`; support and query are one batch of the embedding."""
        axes, shown = p["hyper"]["learning_rate"].dim(), support["target"].shape[-1]
        both = tree.map(lambda a, b: torch.cat([a, b], axes + 1), support["observation"], query["observation"])
        rows = tree.map(lambda x: x.flatten(axes, axes + 1), both)
        features: Tensor = self.net.run({**p["weights"], **p["buffers"]}, rows, ctx, "net.")
        features = features.reshape(*next(tree.leaves(both)).shape[: axes + 2], -1)
        centres = prototypes(features[..., :shown, :], support["target"], self.classes)
        return logits(features[..., shown:, :], centres)

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Cross-entropy of the query in nats, mean over samples and tasks `[*L]`."""
        predicted, target = self.logits(p, batch["support"], batch["query"], ctx), batch["query"]["target"]
        loss = losses.cross_entropy_loss(predicted, target).mean(-1)
        ctx.info["losses/loss"] = loss.detach()
        if ctx.report:
            ctx.info["losses/accuracy"] = right(predicted.detach(), target).mean((-2, -1))
        return {"net": loss}

    def iterate(self, state: State, world: FamilyWorld) -> tuple[State, Metrics]:
        """One training iteration: draw a meta-batch of tasks, and take a gradient step."""
        count, tasks = state["count"], self.settings.num_envs
        batch = world.tasks(state["key"], count["iterations"], tasks, "train")
        bound = state["params"]["hyper"]["max_grad_norm"]
        state, info = step(self, state, batch, self.optimizer(state), max_grad_norm=bound, methods=self.methods)
        counted = {"iterations": 1, "vector_steps": 1, "env_steps": tasks, "task_steps": 1}
        state["count"] = {**state["count"], **{name: count[name] + more for name, more in counted.items()}}
        return state, info

    def draw(self, state: State, world: FamilyWorld, n: int) -> tree.Tree:
        """Draw a meta-batch of n training tasks, support and query; the state stays as it is."""
        return world.tasks(random.fold(state["key"], "draw"), 0, n, "train")

    # ------------------------------------------------------------------ answer and evaluate

    @torch.no_grad()
    def answer(self, p: Params, support: tree.Tree, query: tree.Tree, steps: int | None = None) -> Tensor:
        """Predict logits of the query's inputs from the support, `[*L, K, B, C]`.

        Raises:
            SettingError: any steps, of which it takes none.
        """
        if steps is not None:
            require_count("steps", steps, 0)
        require(not steps, f"ProtoNet averages the support, it can't take {steps} steps: leave steps out")
        return self.logits(p, support, query, Context())

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of parallel tasks: one per episode."""
        return episodes

    def evaluate(
        self, p: Params, world: FamilyWorld, key: Tensor, episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Evaluate the query accuracy on `episodes` held-out tasks, `[*L, E]`."""
        parts = []
        for number, first in enumerate(range(0, episodes, TASKS_AT_ONCE)):
            tasks = world.tasks(key, number, min(TASKS_AT_ONCE, episodes - first), world.split)
            predicted = self.answer(p, tasks["support"], tasks["query"])
            parts.append(right(predicted, tasks["query"]["target"]).double().mean(-1))
        accuracy = torch.cat(parts, -1)
        return Evaluation(accuracy, torch.zeros_like(accuracy, dtype=torch.int64))


def right(predicted: Tensor, target: Tensor) -> Tensor:
    """Accuracy of every sample, 0 or 1, `[*L, B]`."""
    return (predicted.argmax(-1) == target).to(predicted.dtype)
