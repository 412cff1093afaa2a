"""A learned optimizer: an LSTM that turns each weight's gradient into its update.

Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016.

What is learned: the optimizer. Inner algorithm: that optimizer. Estimator: backpropagation through `unroll` steps of
`horizon`, or evolution strategies on them (ES, PES). The K problems of a meta-batch are minimised at once, `[*L, K]`,
each at its own place of its own unroll, so that all parts of an unroll count in every meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor, nn

from rlmeta.data.samples import EVERYTHING
from rlmeta.engine.capture import Capture
from rlmeta.envs.families import FamilyWorld
from rlmeta.envs.task_families import Split, minimises
from rlmeta.errors import SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.optim import Optimizer, State, Tensors
from rlmeta.functional.packed import Packed
from rlmeta.functional.schedules import ScheduleName, anneal
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics, Score, initial_memories, initial_state
from rlmeta.learning.method import Method, effective_params
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, check_choices, require, require_range, values_of
from rlmeta.learning.state import Params, select
from rlmeta.learning.step import step
from rlmeta.meta.adapt import adapt
from rlmeta.meta.checks import check_problems
from rlmeta.meta.estimators import backpropagated, evolved
from rlmeta.nn import Block, Context, Linear, bare
from rlmeta.nn.recurrent import LSTMCell

PROBLEMS_AT_ONCE = 64
"""Problems of each learner that an evaluation minimises at a time."""

# ---------------------------------------------------------------------- the optimizer


def features_of(gradient: Tensor, k: float) -> Tensor:
    """Input features of the LSTM: `log_and_sign`, or with k = 0 the gradient; `[...]` -> `[..., 2]` or `[..., 1]`."""
    return log_and_sign(gradient, k) if k > 0 else gradient.unsqueeze(-1)


def log_and_sign(gradient: Tensor, k: float = 10.0) -> Tensor:
    """Encode a gradient of any size as log magnitude and sign, two numbers of moderate size, `[...]` -> `[..., 2]`.

    (log |g| / k, sign g) where |g| ≥ e^(−k), else (−1, e^k g); continuous, and finite at 0. (Appendix A.)
    """
    magnitude = gradient.abs()
    large = magnitude >= math.exp(-k)
    logarithm = torch.where(large, magnitude.clamp(min=math.exp(-k)).log() / k, -1.0)
    return torch.stack([logarithm, torch.where(large, gradient.sign(), math.exp(k) * gradient)], -1)


class CoordinateLSTM(Block):
    """Coordinatewise LSTM: layers of cells and a linear layer, with the same weights for every coordinate.

    Args:
        hidden_sizes: of the cells; () leaves the linear layer alone.
        features: numbers that describe a gradient.
        zero: begin with updates of 0.
    """

    def __init__(self, hidden_sizes: tuple[int, ...] = (20, 20), features: int = 2, zero: bool = False) -> None:
        super().__init__()
        self.hidden_sizes = hidden_sizes
        sizes = [features, *hidden_sizes]
        self.cells = nn.ModuleList(LSTMCell(size, hidden) for size, hidden in zip(sizes, hidden_sizes))
        self.output = Linear(sizes[-1], 1)
        if zero:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def run(self, params: Params, x: Any, ctx: Context, prefix: str = "") -> Any:
        """Forward pass: `{"input": [*L, B, features], "0": {hidden, cell}, ...}` -> `{"output": [*L, B], "0": ...}`."""
        value, memory = x["input"], {}
        for i, cell in enumerate(self.cells):
            memory[str(i)] = cell.run(params, {"input": value, **x[str(i)]}, ctx, f"{prefix}cells.{i}.")  # type: ignore[operator]
            value = memory[str(i)]["hidden"]
        return {"output": self.output.run(params, value, ctx, f"{prefix}output.").squeeze(-1), **memory}


def learned_optimizer(
    network: CoordinateLSTM, theta: Params, *, output_scale: float = 0.1, k: float = 10.0
) -> Optimizer:
    """Learned optimizer with meta-parameters θ: Δᵢ = output_scale · LSTM(log_and_sign(gᵢ), stateᵢ; θ) for weight i.

    An optimizer like any of `functional.optim`. θ has the first axes of the weights' learner axes: with θ `[S, ...]`
    and weights `[S, K, ...]` every learner optimizes K problems. Gradients count as constants (the problem's second
    derivatives are left out, as in the paper); what an update did to θ's gradient goes through the LSTM's state and
    the sum of the updates.

    Args:
        network: the LSTM.
        theta: its weights, `{name: [*L', ...]}`.
        output_scale: factor of the updates.
        k: of `features_of`.
    """
    axes = theta["output.bias"].dim() - 1

    def init(params: Tensors, learner_shape: Any = ()) -> State:
        learner_shape = tuple(learner_shape)
        size = sum(value.shape[len(learner_shape) :].numel() for value in params.values())
        count = torch.zeros(learner_shape, dtype=torch.int64, device=theta["output.bias"].device)
        cells: State = {}
        for i, hidden in enumerate(network.hidden_sizes):
            zero = theta["output.bias"].new_zeros((*learner_shape, size, hidden))
            cells[str(i)] = {"hidden": zero, "cell": zero.clone()}
        return {"count": count, **cells}

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        shape, like = state["count"].shape, theta["output.bias"]
        grads = dict(sorted(grads.items()))  # the cells lie in this order
        flat = torch.cat([g.detach().reshape(*shape, -1) for g in grads.values()], -1).to(like.dtype)
        rows = shape[axes:].numel() * flat.shape[-1]

        def fold(x: Tensor) -> Tensor:  # [*L, P, H] -> [*L', rows, H]
            return x.reshape(*shape[:axes], rows, x.shape[-1])

        memory = {
            str(i): {name: fold(value.to(like.dtype)) for name, value in state[str(i)].items()}
            for i in range(len(network.hidden_sizes))
        }
        output = network.run(theta, {"input": fold(features_of(flat, k)), **memory}, Context())
        move = (output_scale * output.pop("output")).reshape(flat.shape)
        pieces = torch.split(move, [g.shape[len(shape) :].numel() for g in grads.values()], -1)
        updates = {name: piece.reshape(g.shape).to(g.dtype) for (name, g), piece in zip(grads.items(), pieces)}
        cells = {
            i: {name: value.reshape(*shape, -1, value.shape[-1]) for name, value in cell.items()}
            for i, cell in output.items()
        }
        return updates, {"count": state["count"] + 1, **cells}

    return Optimizer(init, update)


class TorchLearnedOptimizer(torch.optim.Optimizer):
    """Learned optimizer as a `torch.optim.Optimizer`, for the parameters of any module.

    Its learning rate, which groups of parameters and torch's schedulers may change, is the factor of the updates.

    Args:
        params: as every `torch.optim` optimizer takes them.
        network: the LSTM.
        theta: its weights, of one learner.
        lr: factor of the updates; the one it was meta-trained with is `output_scale`.
        k: of `features_of`.
    """

    def __init__(
        self, params: Any, network: CoordinateLSTM, theta: Params, *, lr: float = 0.1, k: float = 10.0
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._optimizer = learned_optimizer(network, theta, output_scale=1.0, k=k)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise SettingError("a learned optimizer has a state for every weight: no sparse gradients")
                named, memory = {"p": parameter}, self.state[parameter]
                if not memory:
                    memory.update(_flat(self._optimizer.init(named)))
                updates, new = self._optimizer.update({"p": parameter.grad}, _nested(memory), named)
                parameter.add_(updates["p"] * group["lr"])
                memory.update(_flat(new))
        return loss


def _flat(state: State) -> dict[str, Tensor]:
    """Flatten the state to one level of names, for torch's `state_dict`."""
    cells = {f"{i}.{name}": value for i, cell in state.items() if i != "count" for name, value in cell.items()}
    return {"step": state["count"], **cells}


def _nested(flat: dict[str, Tensor]) -> State:
    state: State = {"count": flat["step"]}
    for name, value in flat.items():
        if name != "step":
            i, part = name.split(".")
            state.setdefault(i, {})[part] = value
    return state


# ---------------------------------------------------------------------- how it is learned


@dataclass(frozen=True)
class LearnedOptimizer:
    """Settings of a learned optimizer's meta-training. A list for a number marked per learner compares its values."""

    num_envs: int = 32
    """Problems that are minimised at once."""
    horizon: int = 100
    """Steps after which a problem is left for a new one."""
    unroll: int = 20
    """Steps between two meta-updates; divides the horizon."""
    estimator: Literal["truncated", "es", "pes"] = "truncated"
    """Backpropagation through each piece of an unroll, evolution strategies on it, or persistent ones, unbiased."""
    sigma: PerLearner = 0.01
    """Deviation of the perturbations of ES and PES."""
    hidden_sizes: tuple[int, ...] = (20, 20)
    """Widths of the LSTM's layers; none leaves a linear map of the gradient's features."""
    output_scale: float = 0.1
    """Factor of the updates."""
    preprocess: float = 10.0
    """k of the gradient's features: below e^-k a gradient counts as it is, above by its logarithm; 0: always as it
    is."""
    zero_output: bool = False
    """Begin with updates of 0 instead of random ones."""
    meta_rate: PerLearner = 1e-3
    """Adam's step size for the LSTM's weights."""
    meta_rate_schedule: ScheduleName = "constant"
    """Keep the meta rate, or anneal it to 0 over the budget in a straight line or along a cosine."""
    max_grad_norm: PerLearner = 1.0
    """Clip each learner's meta-gradient to this norm."""

    learns_from_tasks = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("meta_rate", "output_scale", "preprocess"):
            require_range(self, name, 0.0)
            finite = math.inf not in values_of(getattr(self, name))
            require(finite, f"LearnedOptimizer: {name} is inf, expected a finite number")
        for name in ("max_grad_norm", "sigma"):
            require_range(self, name, 0.0, above=True)
        for name in ("num_envs", "horizon", "unroll"):
            require_range(self, name, 1)
        sizes = self.hidden_sizes
        require(
            isinstance(sizes, tuple) and all(type(size) is int and size > 0 for size in sizes),
            f"LearnedOptimizer: hidden_sizes is {sizes!r}, expected widths of at least 1, such as (20, 20), or ()",
        )
        require(
            self.horizon % self.unroll == 0,
            f"LearnedOptimizer: unroll {self.unroll} does not divide horizon {self.horizon}",
        )
        require(
            self.estimator == "truncated" or self.num_envs % 2 == 0,
            f"LearnedOptimizer: num_envs is {self.num_envs}, but {self.estimator} perturbs problems in pairs",
        )

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> LearnedOptimizerLearner:
        """Create the meta-learner, whose optimizer works on problems of any size."""
        return LearnedOptimizerLearner(self, methods)


class LearnedOptimizerLearner:
    """Meta-training of an optimizer on a family of problems.

    The problems under way, `carry`, are among the parameters' buffers: the losses of a step move them on, as they do
    with batch-norm statistics.
    """

    num_tasks = 1
    reveals = EVERYTHING
    task_samples: int | None = None
    idle_steps = 0
    counts = "steps of the optimizer"
    score = Score("final loss", maximise=False)
    acts = answers = False
    predicts: tuple[str, ...] = ()

    def __init__(self, settings: LearnedOptimizer, methods: Sequence[Method] = ()) -> None:
        self.settings, self.methods = settings, tuple(methods)
        self.steps_per_iteration = settings.unroll
        self.network = bare(self.networks)["optimizer"]
        self.capture = Capture()
        self.family: Any = None

    # ------------------------------------------------------------------ set-up

    def networks(self) -> dict[str, CoordinateLSTM]:
        """Build the network: `optimizer`, from gradients to updates."""
        s = self.settings
        return {"optimizer": CoordinateLSTM(s.hidden_sizes, 2 if s.preprocess > 0 else 1, s.zero_output)}

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: FamilyWorld) -> State:
        """Initial state of a run, with problems at steps spread over the horizon."""
        s = self.settings
        check_problems(_problems(world))
        state = initial_state(self.networks, key, hyper)  # type: ignore[arg-type]
        state["world"] = world.reset(key)
        state["optimizer"] = init_optimizer(self.optimizer(state), state)
        carry = self.fresh(state, world)
        pair = s.num_envs // 2 if s.estimator != "truncated" else s.num_envs
        phase = torch.arange(s.num_envs, device=key.device) % pair % (s.horizon // s.unroll)
        carry["age"] = carry["age"] + phase * s.unroll
        state["params"]["buffers"] = {"carry": carry}
        if s.estimator == "pes":
            state["accumulator"] = self._no_noise(state)
        state["methods"] = initial_memories(self, self.methods, state)
        return state

    def begin_task(self, state: State, world: FamilyWorld, key: Tensor) -> State:
        """Return the state as it is: a family has no order of tasks."""
        raise SettingError("LearnedOptimizer learns from a family of problems, not along a stream: give it a family")

    enter = begin_task

    def effective_params(self, state: State) -> Params:
        """Effective parameters of forward passes: the weights after the lifelong methods' hooks."""
        return effective_params(self, state)

    def optimizer(self, state: State) -> Optimizer:
        """Adam for the meta-parameters, with the learning rate at the current progress."""
        rate = state["params"]["hyper"]["meta_rate"]
        return optim.adam(anneal(rate, self.settings.meta_rate_schedule, state["progress"]))

    def learned(self, p: Params) -> Optimizer:
        """Learned optimizer of meta-parameters `[*L, ...]`, for weights `[*L, ...]` or `[*L, K, ...]`."""
        theta = {name.removeprefix("optimizer."): value for name, value in p["weights"].items()}
        s = self.settings
        return learned_optimizer(self.network, theta, output_scale=s.output_scale, k=s.preprocess)

    def as_torch(self, p: Params, parameters: Iterable[Any], learner: int = 0) -> TorchLearnedOptimizer:
        """Export the learned optimizer as a `torch.optim.Optimizer` of a module's parameters.

        Args:
            p: the meta-parameters `[S, ...]`, as `seen` gives them.
            parameters: what to optimize.
            learner: which of the S.
        """
        learners = p["hyper"]["meta_rate"].shape[0]
        require(0 <= learner < learners, f"learner is {learner}, expected 0 to {learners - 1}")
        theta = {name.removeprefix("optimizer."): value[learner] for name, value in p["weights"].items()}
        s = self.settings
        return TorchLearnedOptimizer(parameters, self.network, theta, lr=s.output_scale, k=s.preprocess)

    # ------------------------------------------------------------------ problems

    def fresh(self, state: State, world: FamilyWorld) -> State:
        """Draw K new problems, in equal pairs for antithetic perturbations."""
        s, key = self.settings, state["key"]
        self.family = _problems(world)
        paired = s.estimator != "truncated"
        count = s.num_envs // 2 if paired else s.num_envs
        problem = world.tasks(key, state["count"]["iterations"], count, "train")
        if paired:
            problem = tree.map(lambda x: torch.cat([x, x], key.dim()), problem)
        weights, shape = self.family.start(problem), (*key.shape, s.num_envs)
        return {
            "problem": problem,
            "weights": weights,
            "memory": self.learned(state["params"]).init(weights, shape),
            "age": torch.zeros(shape, dtype=torch.int64, device=key.device),
        }

    def _no_noise(self, state: State) -> Tensor:
        flat = Packed.of(state["params"]["weights"], state["key"].dim()).flat
        return flat.new_zeros((*state["key"].shape, self.settings.num_envs, flat.shape[-1]))

    def unroll(self, weights: Tensors, carry: State) -> tuple[Tensor, State]:
        """Unroll the optimizer for `unroll` steps on every problem: the mean loss, `[*L, K]`, and the new carry.

        Args:
            weights: the learner's, `[*L, ...]` or `[*L, K, ...]`.
            carry: the problems under way.
        """
        steps, problem, age = self.settings.unroll, carry["problem"], carry["age"]

        def loss(w: Tensors, i: int) -> Tensor:
            value: Tensor = self.family.loss(w, problem, age + i)
            return value

        learned = self.learned({"weights": weights})
        order: Literal["first", "none"] = "first" if torch.is_grad_enabled() else "none"
        adapted = adapt(loss, carry["weights"], learned, steps, order=order, state=carry["memory"])
        after = [*adapted.losses[1:], loss(adapted.weights, steps)]
        carry = {"problem": problem, "weights": adapted.weights, "memory": adapted.state, "age": age + steps}
        return torch.stack(after).mean(0), carry

    # ------------------------------------------------------------------ learn

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Meta-loss: the mean loss of the problems over a truncation of their unrolls, `[*L]`; the problems advance.

        With an estimated gradient `[*L, P]` in the batch, a linear function that has it.
        """
        if "gradient" in batch:
            flat = torch.cat([w.flatten(p["hyper"]["meta_rate"].dim()) for w in p["weights"].values()], -1)
            return {"unroll": (flat * batch["gradient"]).sum(-1)}
        loss, ctx.new_buffers["carry"] = backpropagated(self.unroll, p["weights"], p["buffers"]["carry"])
        return {"unroll": loss}

    def iterate(self, state: State, world: FamilyWorld) -> tuple[State, Metrics]:
        """One training iteration: replace finished problems, unroll all for `unroll` steps, take one meta-update."""
        s, params, count = self.settings, state["params"], state["count"]
        carry = params["buffers"]["carry"]
        over = carry["age"] >= s.horizon
        if bool(over.any()):
            carry = select(over, self.fresh(state, world), carry)
            if "accumulator" in state:
                state["accumulator"] = state["accumulator"].masked_fill(over.unsqueeze(-1), 0.0)
        state["params"] = {**params, "buffers": {"carry": carry}}
        bound = params["hyper"]["max_grad_norm"]
        metrics: Metrics = {}
        batch: State = {}
        if s.estimator != "truncated":
            state, batch, metrics = self._estimate(state)
        state, info = step(self, state, batch, self.optimizer(state), max_grad_norm=bound, methods=self.methods)
        state["count"] = {
            **state["count"],
            "iterations": count["iterations"] + 1,
            "vector_steps": count["vector_steps"] + s.unroll,
            "env_steps": count["env_steps"] + s.unroll * s.num_envs,
            "task_steps": count["task_steps"] + s.unroll,
        }
        return state, {**info, **metrics}

    def _estimate(self, state: State) -> tuple[State, State, Metrics]:
        """Estimate the meta-gradient by evolution strategies; the problems advance."""
        p, key = state["params"], random.fold(state["key"], "evolution")
        sigma, counter = p["hyper"]["sigma"], state["count"]["iterations"]
        accumulator = state.get("accumulator")
        estimate = evolved(self.unroll, p["weights"], p["buffers"]["carry"], key, counter, sigma, accumulator)
        state["params"] = {**p, "buffers": {"carry": estimate.carry}}
        if accumulator is not None:
            state["accumulator"] = estimate.accumulator
        return state, {"gradient": estimate.gradient}, {"losses/unroll": estimate.loss}

    def draw(self, state: State, world: FamilyWorld, n: int) -> tree.Tree:
        """Draw n training problems; the state stays as it is."""
        return world.tasks(random.fold(state["key"], "draw"), 0, n, "train")

    # ------------------------------------------------------------------ evaluation

    def evaluation_rows(self, episodes: int, native: bool) -> int:
        """Number of parallel problems: one per episode."""
        return episodes

    def evaluate(
        self, p: Params, world: FamilyWorld, key: Tensor, episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Evaluate the loss after `horizon` steps on `episodes` held-out problems, `[*L, E]`."""
        final = self.adaptation(p, world, key, episodes, self.settings.horizon)[..., -1]
        return Evaluation(final, torch.full_like(final, self.settings.horizon, dtype=torch.int64))

    def adaptation(
        self, p: Params, world: FamilyWorld, key: Tensor, tasks: int, steps: int, *, split: Split | None = None
    ) -> Tensor:
        """Adaptation curves: losses on held-out problems after 0 ... `steps` steps, `[*L, E, steps + 1]` float64."""
        family, learned, axis = _problems(world), self.learned(p), key.dim()
        problem = world.tasks(key, 0, tasks, split or world.split)
        parts = []
        for first in range(0, tasks, PROBLEMS_AT_ONCE):
            count = min(PROBLEMS_AT_ONCE, tasks - first)
            part = tree.map(lambda x, first=first, count=count: x.narrow(axis, first, count), problem)
            parts.append(minimise(family, part, learned, steps))
        return torch.cat(parts, axis)


def minimise(family: Any, problem: tree.Tree, optimizer: Optimizer, steps: int) -> Tensor:
    """Minimise with any optimizer: losses of all problems after 0 ... `steps` steps, `[*L, K, steps + 1]` float64.

    Args:
        family: of `Problems`.
        problem: as its `tasks` drew them, `[*L, K, ...]`.
        optimizer: of `functional.optim`, with settings of shape `[*L]` or `[*L, K]`, or a learned one.
        steps: how many.
    """

    start = family.start(problem)
    device = next(iter(start.values())).device

    def loss(w: Tensors, i: int) -> Tensor:
        value: Tensor = family.loss(w, problem, torch.tensor(i, device=device))
        return value

    minimised = adapt(loss, start, optimizer, steps, order="none")
    with torch.no_grad():
        return torch.stack([*minimised.losses, loss(minimised.weights, steps)], -1).double()


def _problems(world: FamilyWorld) -> Any:
    """Validate that the world's family is one of functions to minimise, and return it."""
    if not minimises(world.family):
        raise SettingError(
            f"LearnedOptimizer minimises functions, {type(world.family).__name__} is a family of other tasks: "
            "use quadratics or digit-mlps, or MAML"
        )
    return world.family
