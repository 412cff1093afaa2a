"""Model-agnostic meta-learning (MAML): initial weights from which a few gradient steps learn a new task.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.

    minimise over θ  E_task [ L_query(θ_k) ],  θ_{i+1} = θ_i - inner_rate · ∇ L_support(θ_i),  θ_0 = θ

What is learned: initial weights. Inner algorithm: gradient descent. Estimator: backpropagation through the steps, or
with the inner gradients taken for constants (first order). The K tasks of a meta-batch are learners `[*L, K]`, so that
they adapt at once, and L is whatever the inner learner's `losses` are: squared error, cross-entropy, or the surrogates
of REINFORCE and PPO, whose support and query are then rollouts before and after adaptation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.agents.networks import check_network
from rlmeta.data.samples import EVERYTHING
from rlmeta.engine.capture import Capture
from rlmeta.envs.families import FamilyWorld
from rlmeta.envs.task import TaskFamily
from rlmeta.envs.task_families import Split, minimises
from rlmeta.errors import SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.average import Average
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import Evaluation, evaluate
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics, OnPolicy, initial_memories, initial_state
from rlmeta.learning.method import Method, effective_params
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import (
    Bindable,
    LearnerSettings,
    PerLearner,
    check_choices,
    hyper_tensors,
    require,
    require_range,
    values_of,
    variants,
)
from rlmeta.learning.state import Params, State
from rlmeta.learning.step import step
from rlmeta.meta.adapt import Order, adapt, expand_tasks
from rlmeta.meta.checks import check_samples
from rlmeta.supervised.classifier import Classifier
from rlmeta.supervised.learner import Supervised
from rlmeta.supervised.regressor import Regressor

TASKS_AT_ONCE = 50
"""Tasks of each learner that an evaluation adapts to at a time."""


@dataclass(frozen=True)
class MAML:
    """Settings of MAML. A list for a number marked per learner compares its values."""

    learner: LearnerSettings = None
    """The learner whose initial weights are learned (`Regressor(hidden_sizes=(40, 40))`, as a flag `regressor
    hidden_sizes=40x40`); none: a Regressor or Classifier, whichever the targets ask for."""
    num_envs: int = 25
    """Tasks of a meta-batch."""
    inner_steps: int = 1
    """Gradient steps to adapt; 0 trains on all tasks jointly."""
    inner_rate: PerLearner = 0.01
    """Step size of the adaptation."""
    first_order: bool = False
    """First-order MAML: treat inner gradients as constants instead of differentiating through them."""
    meta_rate: PerLearner = 1e-3
    """Adam's step size for the initial weights."""
    meta_rate_schedule: ScheduleName = "constant"
    """Keep the meta rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    meta_epochs: int = 1
    """Meta-gradient steps on every meta-batch; several make sense for PPO, whose ratio bounds them."""
    max_grad_norm: PerLearner = math.inf
    """Clip each learner's meta-gradient to this norm."""

    learns_from_tasks = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("inner_rate", "meta_rate"):
            require_range(self, name, 0.0)
            require(math.inf not in values_of(getattr(self, name)), f"MAML: {name} is inf, expected a finite number")
        require_range(self, "max_grad_norm", 0.0, above=True)
        require_range(self, "inner_steps", 0)
        require(
            self.learner is None or (isinstance(self.learner, Bindable) and not isinstance(self.learner, type)),
            f"MAML: learner is {self.learner!r}, expected the settings of one, such as Regressor()",
        )
        require(
            getattr(type(self.learner), "adapts", True) and not getattr(type(self.learner), "learns_from_tasks", False),
            f"MAML can't adapt {type(self.learner).__name__}: give it a Regressor, a Classifier, REINFORCE, A2C or PPO",
        )
        for name in ("num_envs", "meta_epochs"):
            require_range(self, name, 1)

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> MAMLLearner:
        """Create the meta-learner for an observation and an action space."""
        return MAMLLearner(self, observation_space, action_space, methods)


class MAMLLearner:
    """MAML learner for an observation and an action space."""

    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    counts = "tasks"
    acts = False
    predicts: tuple[str, ...] = ()

    def __init__(
        self, settings: MAML, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        default = Regressor() if isinstance(action_space, gym.spaces.Box) else Classifier(hidden_sizes=(64, 64))
        self.settings = settings
        self.inner_settings: Any = settings.learner or default
        check_network(self.inner_settings, observation_space, rows=False)
        self.inner: Any = self.inner_settings.bind(observation_space, action_space)
        self.methods = tuple(methods)
        self.score = self.inner.score
        self.answers, self.classes = not self.inner.acts, self.inner.classes
        self.capture = None if self.inner.capture is None else Capture()
        self.steps_per_iteration = 1
        if self.inner.acts:
            s = self.inner_settings
            self.steps_per_iteration = s.num_envs * s.num_steps * (settings.inner_steps + 1)
            for name in ("normalise_observation", "normalise_reward"):
                require(not getattr(s, name, False), f"MAML adapts to single tasks: switch {name} of its learner off")
            require(getattr(s, "penalty", "clip") == "clip", 'MAML differentiates PPO with penalty="clip" alone')

    # ------------------------------------------------------------------ set-up

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: FamilyWorld) -> State:
        """Initial state of a run.

        Raises:
            SettingError: a learner that can't adapt, or tasks of another kind than the learner's.
        """
        self._check(world.family)
        own = {
            name: value.expand(key.shape).clone()
            for name, value in hyper_tensors([self.inner_settings], 1, key.device).items()
        }
        state = initial_state(self.inner.networks, key, {**own, **hyper})
        statistics = [name for name in state["params"]["buffers"] if name.endswith("running_mean")]
        require(
            not statistics,
            f"MAML: {', '.join(statistics)} would be statistics of no task: use LayerNorm, or BatchNorm with "
            "track_running_stats=False, which takes those of each batch, of the query as a whole too",
        )
        state["world"] = world.reset(key)
        state["optimizer"] = init_optimizer(self.optimizer(state), state)
        state["methods"] = initial_memories(self, self.methods, state)
        return state

    def _check(self, family: Any) -> None:
        """Check the settings and the family before training."""
        inner, name, of = self.inner, type(self.inner_settings).__name__, type(family).__name__
        fits = isinstance(inner, OnPolicy) if inner.acts else isinstance(inner, Supervised)
        require(len(variants(self.inner_settings)) == 1, f"MAML's {name} compares values: compare MAML's own settings")
        require(fits, f"MAML can't adapt {name}: give it a Regressor, a Classifier, REINFORCE, A2C or PPO")
        require(not getattr(inner, "rewards", ()), f"MAML's {name} learns from the tasks' own rewards, without others")
        require(not minimises(family), f"{of} is a family of functions to minimise: use LearnedOptimizer")
        to_act_in = isinstance(family, TaskFamily)
        kind, use = (
            ("to act in", 'REINFORCE or PPO (--learner "reinforce num_steps=100")')
            if to_act_in
            else ("of samples", "a Regressor")
        )
        require(inner.acts == to_act_in, f"{name} can't learn a family {kind}: give MAML {use}")
        if not self.inner.acts:
            check_samples(family)

    def begin_task(self, state: State, world: FamilyWorld, key: Tensor) -> State:
        """Return the state as it is: a family has no order of tasks."""
        raise SettingError("MAML learns from a family of tasks, not along a stream: give it a family")

    enter = begin_task

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes: the weights after the lifelong methods' hooks."""
        return effective_params(self, state)

    def optimizer(self, state: State) -> optim.Optimizer:
        """Adam, with the learning rate at the current progress."""
        rate = state["params"]["hyper"]["meta_rate"]
        return optim.adam(anneal(rate, self.settings.meta_rate_schedule, state["progress"]))

    # ------------------------------------------------------------------ adapt

    def start(self, p: Params, tasks: int) -> Params:
        """Expand parameters `[*L, ...]` to tasks, `[*L, K, ...]`."""
        axes = p["hyper"]["inner_rate"].dim()

        def expand(part: Any) -> Any:
            return {n: expand(v) for n, v in part.items()} if isinstance(part, dict) else _expand(part, axes, tasks)

        return {name: expand(p[name]) for name in ("weights", "buffers", "normalisers", "hyper")}

    def adapted(self, p: Params, support: tree.Tree, steps: int, order: Order = "second") -> Params:
        """Adapt parameters of tasks `[*L, K, ...]` by gradient steps on their support.

        Args:
            p: as `start` gives them, or adapted already.
            support: a batch `[*L, K, n, ...]`; or `{"0": batch, "1": batch, ...}`, one for each step.
            steps: how many.
            order: what may be differentiated afterwards.
        """

        def loss(weights: dict[str, Tensor], i: int) -> Tensor:
            batch = support[str(i)] if "0" in support else support
            return self.loss({**p, "weights": weights}, batch)

        adapted = adapt(loss, p["weights"], self.inner_optimizer(p), steps, order=order)
        return {**p, "weights": adapted.weights}

    def inner_optimizer(self, p: Params) -> optim.Optimizer:
        """Inner optimizer for the parameters `[*L, ...]`."""
        return optim.sgd(p["hyper"]["inner_rate"])

    def loss(self, p: Params, batch: tree.Tree, ctx: StepContext | None = None) -> Tensor:
        """Loss of the inner learner on every task, `[*L, K]`."""
        losses = self.inner.losses(p, batch, ctx or StepContext(training=True, report=False))
        return torch.stack(list(losses.values())).sum(0)

    # ------------------------------------------------------------------ ask

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Meta-loss: the query loss after adaptation, mean over the tasks `[*L]`."""
        tasks = next(tree.leaves(batch["query"])).shape[p["hyper"]["inner_rate"].dim()]
        order: Order = "first" if self.settings.first_order else "second"
        adapted = self.adapted(self.start(p, tasks), batch["support"], self.settings.inner_steps, order)
        inner = StepContext(training=True, report=ctx.report)
        query = self.loss(adapted, batch["query"], inner)
        ctx.info.update({name: value.mean(-1) for name, value in inner.info.items()})
        return {"query": query.mean(-1)}

    def answer(self, p: Params, support: tree.Tree, query: tree.Tree, steps: int | None = None) -> Tensor:
        """Predict the query's targets after adaptation to the support, `[*L, K, B, outputs]`.

        Args:
            p: effective parameters with the initial weights `[*L, ...]`.
            support: labelled samples `[*L, K, n, ...]`.
            query: inputs `[*L, K, B, ...]`.
            steps: how many; by default `inner_steps`.
        """
        tasks = next(tree.leaves(query)).shape[p["hyper"]["inner_rate"].dim()]
        count = self.settings.inner_steps if steps is None else steps
        adapted = self.adapted(self.start(p, tasks), support, count, "none")
        with torch.no_grad():
            prediction: Tensor = self.inner.prediction(adapted, query)
        return prediction

    # ------------------------------------------------------------------ learn

    def iterate(self, state: State, world: FamilyWorld) -> tuple[State, Metrics]:
        """One training iteration: draw a meta-batch of tasks, adapt to each, update the initial weights."""
        count = state["count"]
        tasks = world.tasks(state["key"], count["iterations"], self.settings.num_envs, "train")
        batch, metrics = self.experience(state, world, tasks) if self.inner.acts else (tasks, {})
        average = Average()
        for _ in range(self.settings.meta_epochs):
            state, info = self.meta_step(state, batch)
            average.add(info)
        state["count"] = {
            **state["count"],
            "iterations": count["iterations"] + 1,
            "vector_steps": count["vector_steps"] + self.steps_per_iteration,
            "env_steps": count["env_steps"] + self.steps_per_iteration * self.settings.num_envs,
            "task_steps": count["task_steps"] + self.steps_per_iteration,
        }
        return state, {**average.result(), **metrics}

    def meta_step(self, state: State, batch: tree.Tree) -> tuple[State, Metrics]:
        """Take one meta-gradient step with the initial weights, on a meta-batch."""
        bound = state["params"]["hyper"]["max_grad_norm"]
        return step(self, state, batch, self.optimizer(state), max_grad_norm=bound, methods=self.methods)

    def draw(self, state: State, world: FamilyWorld, n: int) -> tree.Tree:
        """Draw a meta-batch of n training tasks, support and query; the state stays as it is."""
        key = random.fold(state["key"], "draw")
        tasks = world.tasks(key, 0, n, "train")
        return self.experience({**state, "key": key}, world, tasks)[0] if self.inner.acts else tasks

    def broken_task(self, state: State, world: FamilyWorld, learner: int) -> str:
        """Find the task and the inner step at which a frozen learner became NaN; '' if all are finite.

        A frozen learner has the weights and the counters of the meta-batch that froze it.
        """
        s, number = self.settings, state["count"]["iterations"] - 1
        batch = world.tasks(state["key"], number, s.num_envs, "train")
        if self.inner.acts:
            batch, _ = self.experience({**state, "count": {**state["count"], "iterations": number}}, world, batch)
        p, support = self.start(self.effective_params(state), s.num_envs), batch["support"]
        for steps in range(s.inner_steps + 1):
            part = batch["query"] if steps == s.inner_steps else support[str(steps)] if "0" in support else support
            loss = self.loss(p, part)[learner].detach()
            bad = (~loss.isfinite()).nonzero().flatten().tolist()
            if bad:
                where = f"task {bad[0]} of meta-batch {int(number[learner])}"
                return f"{where} has loss {float(loss[bad[0]])} after {steps} of {s.inner_steps} inner steps"
            p = self.adapted(p, part, 1, "none")
        return ""

    # ------------------------------------------------------------------ reinforcement learning: rollouts as data

    def experience(self, state: State, world: FamilyWorld, physics: tree.Tree) -> tuple[tree.Tree, Metrics]:
        """Collect rollouts before every inner step and after the last, as support and query.

        Later, `losses` differentiates the same steps: the surrogates' ratios of a policy to itself are 1, and their
        derivatives count that the policy chose the actions it adapts to (Foerster et al., 2018; Rothfuss et al., 2019).
        """
        s = self.settings
        key, axes = random.fold(state["key"], "experience"), state["key"].dim()
        counter = state["count"]["iterations"]
        key = random.fold(random.fold(key, counter).unsqueeze(-1), torch.arange(s.num_envs, device=key.device))
        tasks = world.family.world(physics, tuple(key.shape), self.inner_settings.num_envs)  # type: ignore[attr-defined]
        p, support, returns = self.start(self.effective_params(state), s.num_envs), {}, []
        for i in range(s.inner_steps + 1):
            batch, mean = self.rollout(p, tasks, random.fold(key, i))
            returns.append(mean.mean(-1))
            if i < s.inner_steps:
                support[str(i)] = batch
                p = self.adapted(p, batch, 1, "none")
        assert axes == returns[0].dim()
        metrics = {"charts/return_before": returns[0], "charts/return_after": returns[-1]}
        return {"support": support, "query": batch}, metrics

    @torch.no_grad()
    def rollout(self, p: Params, world: Any, key: Tensor) -> tuple[tree.Tree, Tensor]:
        """Collect a rollout of every task's policy: training data `[*L, K, T * N, ...]`, and its mean return `[*L, K]`.

        What is left of an episode at the end of the rollout counts as one.
        """
        rows = (*key.shape, world.num_envs)
        zero = torch.zeros_like(key)
        acting: State = {
            "params": p,
            "key": key,
            "count": {"vector_steps": zero, "env_steps": zero},
            "memory": self.inner.initial_memory(p, rows),
            "world": world.reset(random.fold(key, "world")),
            "methods": {},
            "task": {},
        }
        _, rollout = collect(self.inner, acting, world, self.inner_settings.num_steps)
        reward, axes = rollout["reward"], key.dim()
        batch = self.inner.items(self.inner.credit(p, rollout, {"task": reward}), axes)
        if "clip_range" in p["hyper"]:
            batch["clip_range"] = p["hyper"]["clip_range"]
        ended = rollout["terminated"] | rollout["truncated"]
        episodes = ended.sum((-2, -1)) + (~ended[..., -1, :]).sum(-1)
        return batch, reward.double().sum((-2, -1)) / episodes

    # ------------------------------------------------------------------ evaluation

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of parallel tasks: one per episode."""
        return episodes

    def evaluate(
        self, p: Params, world: FamilyWorld, key: Tensor, episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Evaluate the score on `episodes` held-out tasks after `inner_steps` steps, `[*L, E]`."""
        curves = self.adaptation(p, world, key, episodes, self.settings.inner_steps, deterministic=deterministic)
        steps = torch.full(curves.shape[:-1], self.settings.inner_steps, dtype=torch.int64, device=key.device)
        return Evaluation(curves[..., -1], steps)

    def adaptation(
        self,
        p: Params,
        world: FamilyWorld,
        key: Tensor,
        tasks: int,
        steps: int,
        *,
        split: Split | None = None,
        deterministic: bool = True,
    ) -> Tensor:
        """Adaptation curves: query scores after 0 ... `steps` inner steps, `[*L, E, steps + 1]` float64.

        Args:
            p: effective parameters with the initial weights.
            world: of the family.
            key: `[*L]`; another key is other tasks.
            tasks: E.
            steps: of adaptation.
            split: which tasks; the world's own by default, held-out ones unless it says otherwise.
            deterministic: act by the policy's mode once adapted, or sample; of no matter in supervised learning.
        """
        parts = []
        for number, first in enumerate(range(0, tasks, TASKS_AT_ONCE)):
            count = min(TASKS_AT_ONCE, tasks - first)
            drawn = world.tasks(key, number, count, split or world.split)
            parts.append(
                self._curve(self.start(p, count), world, random.fold(key, number), drawn, count, steps, deterministic)
            )
        return torch.cat(parts, -2)

    def _curve(
        self, p: Params, world: FamilyWorld, key: Tensor, drawn: tree.Tree, count: int, steps: int, deterministic: bool
    ) -> Tensor:
        """Adaptation curves of K = `count` drawn tasks, `[*L, K, steps + 1]`."""
        if not self.inner.acts:
            scores = [self._score(p, drawn["query"])]
            for _ in range(steps):
                p = self.adapted(p, drawn["support"], 1, "none")
                scores.append(self._score(p, drawn["query"]))
            return torch.stack(scores, -1)
        key = random.fold(key.unsqueeze(-1), torch.arange(count, device=key.device))
        tasks = world.family.world(drawn, tuple(key.shape), self.inner_settings.num_envs)  # type: ignore[attr-defined]
        scores = []
        for i in range(steps + 1):
            fresh = random.fold(random.fold(key, "measure"), i)
            evaluation = evaluate(self.inner, p, tasks, fresh, tasks.num_envs, deterministic=deterministic)
            scores.append(evaluation.returns.mean(-1))
            if i < steps:
                p = self.adapted(p, self.rollout(p, tasks, random.fold(key, i))[0], 1, "none")
        return torch.stack(scores, -1)

    @torch.no_grad()
    def _score(self, p: Params, query: tree.Tree) -> Tensor:
        """Mean query score, `[*L, K]` float64."""
        return self.inner.score_of(self.inner.prediction(p, query), query).double().mean(-1)


def _expand(value: Tensor, axes: int, tasks: int) -> Tensor:
    return expand_tasks({"": value}, axes, tasks)[""]
