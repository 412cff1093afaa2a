"""Hard attention to the task (HAT; Serra et al., 2018): every task learns which units it uses, and keeps those.

Gates of task t on the units of hidden layer l, from an embedding e, which open or close as the task goes on:

    a_l = σ(s e_l),  h_l ← a_l ∘ h_l,  s = 1 / s_max + (s_max - 1 / s_max) · progress;  s = s_max once it is evaluated

What earlier tasks attend to, c = max over them of a, holds the weights between units that they use:

    ∇W_l[i, j] ← (1 - min(c_l[i], c_{l-1}[j])) ∇W_l[i, j]              c of every input is 1
    loss + strength · Σ a (1 - c) / Σ (1 - c)                          new units cost, old ones are free
    ∇e ← s_max (cosh(s e) + 1) / (s (cosh(e) + 1)) ∇e                  a steep σ has no gradient

(eq. 1 to 7; |s e| ≤ 50 and |e| ≤ 6, as in the authors' code). An output that no earlier task was answered by has c = 0,
others 1: of a head for every task each keeps its own rows, and of a head that tasks share they keep its old units'
columns.

No network changes for the gates: a_l ∘ h_l enters the next layer alone, and W_{l+1} (a_l ∘ h_l) = (W_{l+1} diag(a_l))
h_l, so they scale the columns of its weights. That gives their gradient, too, without another backward pass, from the
task gradient ∇W of the weights themselves:

    ∂L/∂e_l[j] = s (1 - a_l[j]) Σ_i W_{l+1}[i, j] ∇W_{l+1}[i, j]

The embeddings are nobody else's: they have a rate and moments of their own, and no clip, mask or projection of the
learner's sees them. An optimizer that divides by the gradient's size, such as Adam, divides a factor away; so weights
that are more an earlier task's than not (a factor below 1/2) stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmeta.functional import optim, random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.method import Draw, Gradients, Memory, Method, StepInfo, Task
from rlmeta.learning.phases import TRAINING
from rlmeta.learning.predictive import predicting
from rlmeta.learning.settings import PerLearner, check_choices, require, require_finite, require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import per_learner

LARGEST_PRODUCT, LARGEST_EMBEDDING = 50.0, 6.0
"""|s e| in the compensation, and |e|."""
HELD = 0.5
"""Weights with a smaller factor stay as they are."""


@dataclass(frozen=True)
class HAT(Method):
    """Settings of hard attention to the task, and the method itself."""

    s_max: float = 400.0
    """Steepness of the gates at the end of a task."""
    strength: PerLearner = 0.75
    """Weight of what new units cost."""
    learning_rate: PerLearner = 1e-2
    """Adam's step size for the embeddings."""

    name = "hat"
    recordable = True
    needs = frozenset({"boundaries", "train_id", "test_id"})

    def __post_init__(self) -> None:
        check_choices(self)
        require_range(self, "s_max", 1.0)
        require_range(self, "strength", 0.0)
        require_range(self, "learning_rate", 0.0)
        require_finite(self, "s_max", "strength", "learning_rate")

    def init(self, learner: Any, state: State) -> Memory:
        """Random embeddings of every task; no weight is held.

        Raises:
            SettingError: the gated network is no chain of linear layers.
        """
        weights, key, axes = state["params"]["weights"], state["key"], state["key"].dim()
        require(
            not getattr(learner, "copies", ()),
            f"HAT gates classifiers, regressors and policies without target copies: {type(learner).__name__} has some",
        )
        require(
            "observation" not in state["params"]["normalisers"],
            "HAT: statistics of observations would change what old tasks see: set normalise_observation to false",
        )
        chain = self._layers(learner, weights, axes)
        s = learner.settings
        own = getattr(s, "network", None) is not None or getattr(s, "share_network", False)
        require(bool(chain) and not own, NO_CHAIN)
        flat = Packed.of(weights, axes).flat
        units, outputs = sum(layer.outputs for layer in chain[:-1]), chain[-1].outputs
        nothing = flat.new_zeros(*key.shape, units)
        embeddings = random.normal(random.fold(key, self.name), "embeddings", 0, (learner.num_tasks, units), flat.dtype)
        rate = per_learner(self.learning_rate, state)
        return {
            "embeddings": embeddings,
            "optimizer": optim.adam(rate).init({"embedding": nothing}, key.shape),
            "attention": nothing,
            "answered": torch.zeros(*key.shape, 2, outputs, dtype=torch.bool, device=key.device),
            "free": torch.ones_like(flat),
            "strength": per_learner(self.strength, state),
            "rate": rate,
        }

    def _layers(self, learner: Any, weights: dict[str, Tensor], axes: int) -> list[Layer]:
        """The linear layers of the gated network, in order; [] where it is no chain of them."""
        return chain_of({name: weights[name].shape[axes:] for name in predicting(learner, weights)})

    # ------------------------------------------------------------------ gates

    def gates(self, m: Memory, task: Task) -> Gates:
        """Of the units of all hidden layers of the task, `[*L, H]`."""
        embedding = m["embeddings"].gather(-2, _row(task, m["embeddings"])).squeeze(-2)
        rising = steepness(task["progress"].to(embedding.dtype), self.s_max)
        s = torch.where(task["phase"] == TRAINING, rising, self.s_max).unsqueeze(-1)
        return Gates(embedding, s, (s * embedding).sigmoid())

    def params(self, learner: Any, p: Params, m: Memory, task: Task) -> Params:
        """Weights that take every hidden unit as far as its gate is open."""
        weights, axes = dict(p["weights"]), task["index"].dim()
        layers = self._layers(learner, weights, axes)
        opened = torch.split(self.gates(m, task).open, [layer.outputs for layer in layers[:-1]], -1)
        for layer, gate in zip(layers[1:], opened):
            weights[layer.weight] = weights[layer.weight] * gate.unsqueeze(-2)
        return {**p, "weights": weights}

    # ------------------------------------------------------------------ every step

    def grads(self, learner: Any, gradients: Gradients, p: Params, m: Memory, task: Task) -> Tensor:
        """As much of the gradient as no earlier task holds."""
        return gradients.total * m["free"]

    def frozen(self, p: Params, m: Memory, task: Task) -> Tensor | None:
        """What is more an earlier task's than not."""
        held: Tensor = m["free"] < HELD
        return held

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """A step of the embedding, along its gradient where the weights were; notes which outputs it is answered by."""
        axes = task["index"].dim()
        packed = Packed.of(p["weights"], axes)
        before, slope = (Packed.view(x, packed, axes) for x in (packed.flat - info.delta, info.gradient))
        layers, now = self._layers(learner, packed, axes), self.gates(m, task)
        pull = torch.cat([(before[x.weight] * slope[x.weight]).sum(-2) for x in layers[1:]], -1)
        gradient = embedding_gradient(now, pull, m["attention"], m["strength"], self.s_max)
        named = {"embedding": now.embedding}
        updates, moments = optim.adam(m["rate"]).update({"embedding": gradient}, m["optimizer"], named)
        moved = (now.embedding + updates["embedding"]).clamp(-LARGEST_EMBEDDING, LARGEST_EMBEDDING)
        embeddings = m["embeddings"].scatter(-2, _row(task, m["embeddings"]), moved.unsqueeze(-2))
        last = layers[-1]
        answers = (slope[last.weight] != 0).any(-1) | (slope[last.bias] != 0)
        earlier, current = m["answered"].unbind(-2)
        answered = torch.stack([earlier, current | answers], -2)
        return {**m, "embeddings": embeddings, "optimizer": moments, "answered": answered}

    # ------------------------------------------------------------------ tasks

    def task_start(self, learner: Any, p: Params, m: Memory, task: Task) -> tuple[Params, Memory]:
        """The new embedding's moments start at zero."""
        return p, {**m, "optimizer": tree.map(torch.zeros_like, m["optimizer"])}

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """What the task attends to, and the outputs it is answered by, are held from now on."""
        done = {**task, "phase": torch.full_like(task["phase"], TRAINING - 1)}
        attention = torch.maximum(m["attention"], self.gates(m, done).open)
        answered = m["answered"].any(-2)
        free = self._free(learner, p["weights"], attention, answered)
        answered = torch.stack([answered, torch.zeros_like(answered)], -2)
        return p, {**m, "attention": attention, "answered": answered, "free": free}

    def _free(self, learner: Any, weights: dict[str, Tensor], attention: Tensor, answered: Tensor) -> Tensor:
        """1 - min(c_l, c_{l-1}) for every weight and 1 - c_l for every bias, `[*L, P]`; 1 for what is not gated."""
        axes = attention.dim() - 1
        layers = self._layers(learner, weights, axes)
        parts = [*torch.split(attention, [layer.outputs for layer in layers[:-1]], -1), answered.to(attention.dtype)]
        inputs = attention.new_ones(*attention.shape[:-1], layers[0].inputs)
        free = {name: torch.ones_like(weight) for name, weight in weights.items()}
        for layer, below, own in zip(layers, [inputs, *parts], parts):
            free[layer.weight] = 1 - torch.minimum(own.unsqueeze(-1), below.unsqueeze(-2))
            free[layer.bias] = 1 - own
        return Packed.of(free, axes).flat


# ---------------------------------------------------------------------- the paper's equations


class Gates(NamedTuple):
    """Of one task, `[*L, H]` over the units of all hidden layers."""

    embedding: Tensor
    """e."""
    s: Tensor
    """How steep they are, `[*L, 1]`."""
    open: Tensor
    """a = σ(s e), 0 for closed and 1 for open."""


def steepness(progress: Tensor, s_max: float) -> Tensor:
    """s, from 1 / s_max at the start of a task to s_max at its end (eq. 3).

    Args:
        progress: in [0, 1].
        s_max: of the gates, at least 1.
    """
    return 1 / s_max + (s_max - 1 / s_max) * progress


def embedding_gradient(gates: Gates, pull: Tensor, attention: Tensor, strength: Tensor, s_max: float) -> Tensor:
    """The gradient of the loss and of what new units cost with respect to an embedding, compensated, `[*L, H]`.

    Args:
        gates: of the task.
        pull: Σ_i W[i, j] ∂L/∂W[i, j] over the weights that unit j enters by; that is a_j ∂L/∂a_j.
        attention: c, what earlier tasks attend to, `[*L, H]`.
        strength: of the cost, `[*L]`.
        s_max: of the gates.
    """
    e, s, opened = gates
    new = 1 - attention
    cost = strength.unsqueeze(-1) * opened * new / new.sum(-1, keepdim=True).clamp(min=1e-6)
    gradient = s * (-s * e).sigmoid() * (pull + cost)
    product = (s * e).clamp(-LARGEST_PRODUCT, LARGEST_PRODUCT)
    return s_max / s * (product.cosh() + 1) / (e.cosh() + 1) * gradient


# ---------------------------------------------------------------------- which weights a unit enters by


class Layer(NamedTuple):
    """A linear layer of a chain."""

    weight: str
    """Name of its weight `[out, in]`."""
    bias: str
    """Name of its bias `[out]`."""
    inputs: int
    """How many units it takes."""
    outputs: int
    """How many it gives."""


NO_CHAIN = (
    "HAT gates the units of linear layers in a row, at least one of them hidden, with one last layer: leave network, "
    "share_network, memory and task_heads at their defaults, set hidden_sizes, and let actions be discrete and "
    "observations no pictures"
)


def chain_of(shapes: dict[str, Sequence[int]]) -> list[Layer]:
    """The layers of a network that is a chain of linear layers with biases, by names and shapes; [] if it is none."""
    layers: list[Layer] = []
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith("weight"):
            bias = f"{name.removesuffix('weight')}bias"
            if shapes.get(bias) != shape[:1] or (layers and layers[-1].outputs != shape[1]):
                return []
            layers.append(Layer(name, bias, shape[1], shape[0]))
    return layers if len(layers) > 1 and 2 * len(layers) == len(shapes) else []


def _row(task: Task, embeddings: Tensor) -> Tensor:
    """The index of the task's row among embeddings `[*L, T, H]`, for `gather` and `scatter`."""
    index = task["index"].clamp(min=0)[..., None, None]
    return index.expand(*embeddings.shape[:-2], 1, embeddings.shape[-1])
