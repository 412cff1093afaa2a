"""Base of supervised learners: network, optimizer, minibatches of the current task, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor, nn

from rlmeta.agents.networks import build_body, check_network, zeros_of
from rlmeta.data.samples import EVERYTHING, DataWorld
from rlmeta.engine.capture import Capture
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning import hooks
from rlmeta.learning.average import Average
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics, Score, initial_memories, initial_state
from rlmeta.learning.method import Method, effective_params
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.phases import own_step
from rlmeta.learning.settings import PerLearner, check_choices, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.nn import Block, Context, Distribution, Linear, Sequential, bare

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]

EVALUATED_AT_ONCE = 1000
"""Number of test samples of each learner in a forward pass."""


@dataclass(frozen=True)
class SupervisedSettings:
    """Settings that all supervised learners share."""

    batch_size: int = 32
    """Number of samples in a minibatch."""
    num_steps: int = 10
    """Gradient steps per iteration; budgets and metrics are in whole iterations."""
    optimizer: OptimizerName = "adam"
    """Optimizer."""
    learning_rate: PerLearner = 1e-3
    """Learning rate of the optimizer."""
    learning_rate_schedule: ScheduleName = "constant"
    """Schedule of the learning rate: constant, or annealed to 0 over the budget (of each task of a stream), linearly or
    along a cosine."""
    momentum: PerLearner = 0.0
    """Momentum of the optimizers sgd and rmsprop."""
    weight_decay: PerLearner = 0.0
    """Weight decay: L2 in the gradient, decoupled for optimizer="adamw"."""
    max_grad_norm: PerLearner = math.inf
    """Clip each learner's gradient to this norm."""
    hidden_sizes: tuple[int, ...] = (400, 400)
    """Widths of the hidden layers of the default network."""
    activation: Literal["tanh", "relu"] = "relu"
    """Activation of the default network."""
    network: Callable[[gym.Space], nn.Module] | None = None
    """Feature network: a function from the observation space to a module that returns features [B, D]."""

    def __post_init__(self) -> None:
        check_choices(self)
        require_range(self, "learning_rate", 0.0, above=True)
        require_range(self, "max_grad_norm", 0.0, above=True)
        require_range(self, "momentum", 0.0, 1.0)
        require_range(self, "weight_decay", 0.0)
        require_finite(self, "learning_rate", "weight_decay")
        for name in ("batch_size", "num_steps"):
            require_range(self, name, 1)

    @property
    def num_envs(self) -> int:
        """Rows of a world: samples in a minibatch."""
        return self.batch_size


class Supervised:
    """Supervised learner, bound to the spaces of its inputs and targets.

    A subclass implements `outputs`, `losses`, `distribution` and `score_of`.

    Args:
        settings: of the learner.
        observation_space: of one input.
        target_space: of one target, Discrete classes or a Box.
        methods: lifelong methods, in order.
    """

    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    counts = "samples"
    score = Score("score")
    acts = answers = sequential = False
    predicts: tuple[str, ...] = ("net",)
    classes = 0
    """Number of classes of the targets; 0 for regression."""

    def __init__(
        self, settings: Any, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        key = torch.zeros((), dtype=torch.int64, device="cpu")
        recorded = check_network(settings, observation_space, rows=False, key=key)
        self.settings = settings
        self.observation_space, self.target_space = observation_space, target_space
        self.methods = tuple(methods)
        self.steps_per_iteration: int = settings.num_steps
        self.capture = Capture() if recorded else None
        self.net: Any = bare(self.networks)["net"]
        self._draws = any(isinstance(m, Block) and m.may_draw() for m in self.net.modules())

    def outputs(self) -> int:
        """Number of outputs of the network."""
        raise NotImplementedError

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Loss `[*L]` of a minibatch, by group of parameters."""
        raise NotImplementedError

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """Parameters of the predictive distribution over targets, `{name: [*L, B, ...]}`."""
        raise NotImplementedError

    def score_of(self, output: Tensor, batch: tree.Tree) -> Tensor:
        """Score of every sample, `[*L, B]`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    def networks(self) -> dict[str, Block]:
        """Networks: `net`, from an input to `outputs()` numbers."""
        s = self.settings
        body, features = build_body(s.network, self.observation_space, s.hidden_sizes, s.activation, "torch")
        return {"net": Sequential(body, Linear(features, self.outputs(), initialiser="torch"))}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: DataWorld) -> State:
        """Initial state of a run."""
        if not isinstance(world, DataWorld):
            name = type(self.settings).__name__
            raise SettingError(f"{name} learns from labelled samples, this problem is to act in: use PPO or DQN")
        state = initial_state(self.networks, key, hyper)
        state["world"] = world.reset(random.fold(key, "world"))
        state["optimizer"] = init_optimizer(self.optimizer(state), state)
        state["methods"] = initial_memories(self, self.methods, state)
        return state

    def begin_task(self, state: State, world: DataWorld, key: Tensor) -> State:
        """Begin the task that the world is set to."""
        state["world"] = world.reset(key)
        state["count"] = {**state["count"], "task_steps": torch.zeros_like(state["count"]["task_steps"])}
        return state

    def enter(self, state: State, world: DataWorld, key: Tensor) -> State:
        """Continue with samples of the task that the world is set to, without notice of a task boundary."""
        state["world"] = world.reset(key)
        return state

    def meet(self, state: State, world: DataWorld, batch: tree.Tree) -> State:
        """Update the state by a minibatch before the gradient step on it; here a no-op."""
        return state

    def optimizer(self, state: State) -> optim.Optimizer:
        """Optimizer, with the learning rate at the current progress."""
        s, h = self.settings, state["params"]["hyper"]
        rate = anneal(h["learning_rate"], s.learning_rate_schedule, state["progress"])
        if s.optimizer == "sgd":
            return optim.sgd(rate, momentum=h["momentum"], weight_decay=h["weight_decay"])
        if s.optimizer == "rmsprop":
            return optim.rmsprop(rate, weight_decay=h["weight_decay"], momentum=h["momentum"])
        return (optim.adam if s.optimizer == "adam" else optim.adamw)(rate, weight_decay=h["weight_decay"])

    # ------------------------------------------------------------------ learn

    def output(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Outputs of the network for a batch, `[*L, B, outputs]`."""
        return self._run(self.net, "net.", p, batch, ctx or Context())

    def features(self, p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        """Features, the input of the network's last layer, `[*L, B, D]`."""
        return self._run(self.net.get_submodule("0"), "net.0.", p, batch, ctx)

    def _run(self, block: Block, prefix: str, p: Params, batch: tree.Tree, ctx: Context) -> Tensor:
        tensors = {**p["weights"], **p["buffers"]} if p["buffers"] else p["weights"]
        output: Tensor = block.run(tensors, batch["observation"], ctx, prefix)
        return output

    def iterate(self, state: State, world: DataWorld) -> tuple[State, Metrics]:
        """Iteration: `num_steps` gradient steps, each on the next minibatch of the current task."""
        average, optimizer = Average(), self.optimizer(state)
        for _ in range(self.steps_per_iteration):
            state["world"], batch = world.next_batch(state["world"])
            state = self.meet(state, world, batch)
            other = own_step(self, state, batch)
            if other is not None:
                state, reports = other
                average.add(reports)
                continue
            key = random.fold(state["key"], state["count"]["gradient_steps"]) if self._draws else None
            state, info = step(
                self,
                state,
                batch,
                optimizer,
                max_grad_norm=state["params"]["hyper"]["max_grad_norm"],
                methods=self.methods,
                key=key,
            )
            average.add(info)
        count, steps = state["count"], self.steps_per_iteration
        state["count"] = {
            **count,
            "iterations": count["iterations"] + 1,
            "vector_steps": count["vector_steps"] + steps,
            "env_steps": count["env_steps"] + steps * world.num_envs,
            "task_steps": count["task_steps"] + steps,
        }
        return state, average.result()

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes, after the hooks of lifelong methods."""
        return effective_params(self, state)

    # ------------------------------------------------------------------ evaluation, and samples for lifelong methods

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of rows of an evaluation: 1, since it uses all test samples anyway."""
        return 1

    @torch.no_grad()
    def evaluate(
        self, p: Params, world: DataWorld, key: Tensor, episodes: int = 1, *, deterministic: bool = True
    ) -> Evaluation:
        """Mean score over all test samples of the world's task, `[*L, 1]`."""
        total = torch.zeros(key.shape, dtype=torch.float64, device=key.device)
        count = torch.zeros(key.shape, dtype=torch.int64, device=key.device)
        for batch in world.test_batches(EVALUATED_AT_ONCE):
            output = self._decide(p, batch)
            valid = batch["valid"]
            total += (self.score_of(output, batch).double() * valid).sum(-1)
            count += valid.sum(-1)
        return Evaluation((total / count).unsqueeze(-1), count.unsqueeze(-1))

    def prediction(self, p: Params, batch: tree.Tree) -> Tensor:
        """Prediction of an evaluation, `[*L, B, outputs]`."""
        return self.output(p, batch)

    def _decide(self, p: Params, batch: tree.Tree) -> Tensor:
        """Prediction of the learner, or of the first lifelong method with a decision rule of its own."""
        for method in self.methods:
            memory = p.get("memories", {}).get(method.name)
            logits = None if memory is None else method.predict(self, p, memory, batch, p["task"])
            if logits is not None:
                return hooks.logits(method, logits, (*batch["valid"].shape, self.outputs()))
        return self.prediction(p, batch)

    def blank(self, learners: tuple[int, ...], device: torch.device) -> tree.Tree:
        """Sample of zeros for every learner, with the shapes and dtypes of `draw`, `[*L, 1, ...]`."""
        observation = zeros_of(self.observation_space, learners, device)
        zero = torch.zeros(*learners, 1, dtype=torch.int64, device=device)
        target = zero if self.classes else zero.new_zeros((*zero.shape, self.outputs())).float()
        return {"observation": observation, "target": target, "identity": zero}

    def draw(self, state: State, world: DataWorld, n: int) -> tree.Tree:
        """Draw n training samples `[*L, n, ...]` of the current task without replacement; all if there are fewer."""
        return world.sample(random.fold(state["key"], "draw"), n)


def require_target(space: gym.Space, kind: type[gym.Space], learner: str, other: str) -> None:
    """Refuse a target space of another kind than the learner's.

    Raises:
        SpaceError: the space is of another kind; the message names the learner to use instead.
    """
    if not isinstance(space, kind):
        raise SpaceError(f"{learner} learns targets in {kind.__name__}, the task has {space}: use {other}")
