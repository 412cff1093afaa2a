"""Meta-SGD: learned initial weights with a learned step size each, from which few steps learn a new task.

Li, Zhou, Chen and Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.

    minimise over θ and α  E_task[ L_query(θ_k) ],  θ_{i+1} = θ_i - α ∘ ∇ L_support(θ_i),  θ_0 = θ

MAML whose inner rate is a vector α of the weights' shape. An α_j may become 0, and weight j is shared by all tasks, or
negative. The rates are an owner (`learning.owners`): they have an optimizer, a clip and moments of their own, so that
where they do not move (`rates_rate=0`) every number is MAML's, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.envs.families import FamilyWorld
from rlmeta.functional import optim, tree
from rlmeta.functional.axes import align
from rlmeta.functional.optim import Optimizer, Tensors
from rlmeta.functional.packed import Packed
from rlmeta.functional.schedules import anneal
from rlmeta.learning import owners
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Metrics
from rlmeta.learning.method import Method
from rlmeta.learning.minibatch import Minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.meta.maml import MAML, MAMLLearner
from rlmeta.nn import Block

PREFIX = "rates."
"""Prefix of the names of learned rates among the buffers."""


@dataclass(frozen=True)
class MetaSGD(MAML):
    """Settings of Meta-SGD: MAML's, and those of the rates. A list for a number marked per learner compares its
    values."""

    inner_rate: PerLearner = 0.01
    """Initial rate of every weight."""
    rates_rate: PerLearner = 1e-3
    """Adam's step size for the rates, on the schedule of the meta rate; 0: MAML."""
    rates_max_grad_norm: PerLearner = math.inf
    """Clip the gradient of each learner's rates to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "rates_rate", 0.0)
        require_finite(self, "rates_rate")
        require_range(self, "rates_max_grad_norm", 0.0, above=True)

    def bind(
        self, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> MetaSGDLearner:
        """Create the meta-learner for an observation and an action space."""
        return MetaSGDLearner(self, observation_space, action_space, methods)


def elementwise_sgd(rates: Tensors) -> Optimizer:
    """Gradient descent with a step size for every entry: Δ = −α ∘ g.

    Args:
        rates: α, of the parameters' names and shapes.
    """

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        return {name: g * -rates[name] for name, g in grads.items()}, {"count": state["count"] + 1}

    return Optimizer(optim.sgd(0.0).init, update)


class MetaSGDLearner(MAMLLearner):
    """Meta-SGD learner: MAML whose inner optimizer has a learned rate for every weight, trained by steps of its own.

    The rates are among the buffers of the parameters, `rates.NAME` `[*L, ...]` for the weight NAME; their moments are
    `state["rates"]`.
    """

    settings: MetaSGD

    def __init__(
        self, settings: MetaSGD, observation_space: gym.Space, action_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.rates = Rates(self)

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: FamilyWorld) -> State:
        """Initial state of a run, with the setting's initial rates.

        Raises:
            SettingError: a learner that can't adapt, or tasks of another kind than the learner's.
        """
        state = super().init(key, hyper, world)
        params, rate = state["params"], state["params"]["hyper"]["inner_rate"]
        rates = {
            PREFIX + name: align(rate, weight).to(weight.dtype).expand_as(weight).clone()
            for name, weight in params["weights"].items()
        }
        params["buffers"] = {**params["buffers"], **rates}
        state["rates"] = {
            "optimizer": init_optimizer(self.rates_optimizer(state), self.rates.of(state)),
            "active": state["active"].clone(),
            "count": {"gradient_steps": torch.zeros_like(state["count"]["gradient_steps"])},
        }
        return state

    def inner_optimizer(self, p: Params) -> Optimizer:
        """Inner optimizer: gradient descent with the rates in the parameters' buffers."""
        return elementwise_sgd({name: p["buffers"][PREFIX + name] for name in p["weights"]})

    def rates_optimizer(self, state: State) -> Optimizer:
        """Adam for the rates, with the learning rate at the current progress."""
        rate = state["params"]["hyper"]["rates_rate"]
        return optim.adam(anneal(rate, self.settings.meta_rate_schedule, state["progress"]))

    def meta_step(self, state: State, batch: tree.Tree) -> tuple[State, Metrics]:
        """Take one meta-gradient step with the initial weights and one with the rates, both at the same parameters.

        Metrics: `charts/inner_rate`, the mean of a learner's rates.
        """
        start, optimizer = state["params"], self.rates_optimizer(state)
        state, info = super().meta_step(state, batch)
        memory = owners.train_without_metrics(
            self.rates,
            self.rates.of(state),
            Minibatches(batch, 1, None),
            {"params": {**start, "weights": dict(start["weights"])}},
            optimizer,
            state["active"],
            state["params"]["hyper"]["rates_max_grad_norm"],
        )
        owners.deactivate_nonfinite(state, memory)
        rates = {name: rate.contiguous() for name, rate in memory["params"]["weights"].items()}
        state["params"] = {**state["params"], "buffers": {**state["params"]["buffers"], **rates}}
        state["rates"] = {name: memory[name] for name in state["rates"]}
        return state, {**info, "charts/inner_rate": memory["params"]["weights"].flat.mean(-1)}


class Rates:
    """Owner (see `learning.owners`) of the learned rates: its loss is the meta-learner's, as a function of them."""

    def __init__(self, learner: MetaSGDLearner) -> None:
        self.learner = learner
        self.capture = None if learner.capture is None else Capture()

    def networks(self) -> dict[str, Block]:
        """Build the networks of the inner learner, since every weight has a rate."""
        blocks: dict[str, Block] = self.learner.inner.networks()
        return blocks

    def of(self, state: State) -> State:
        """Select the owner's state from a learner's: rates packed as weights of their own, beside their moments."""
        buffers, key = state["params"]["buffers"], state["key"]
        rates = Packed.of({name: value for name, value in buffers.items() if name.startswith(PREFIX)}, key.dim())
        params = {"weights": rates, "buffers": {}, "normalisers": {}, "hyper": {}}
        return {**state.get("rates", {}), "key": key, "params": params}

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Meta-loss: the query loss after adaptation with rates p, mean over the tasks `[*L]`.

        Args:
            p: the rates, as weights.
            batch: `support`, `query`, and the learner's `params`.
            ctx: of the step.
        """
        start = batch["params"]
        return self.learner.losses({**start, "buffers": {**start["buffers"], **p["weights"]}}, batch, ctx)
