"""MAML: initial weights from which one gradient step learns a new sine wave.

    minimise over θ  E_task [ L_query(θₖ) ],   θ₀ = θ,  θᵢ₊₁ = θᵢ - α ∇ L_support(θᵢ),   L(θ) = mean (f(x; θ) - y)²

Backpropagation goes through the k inner steps, second derivatives included. Seeds and tasks are both learner axes:
weights `[seeds, ...]` become `[seeds, tasks, ...]`, and all tasks of a meta-batch adapt in one go.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017.

python agents/maml.py --seeds 4 --steps 75000
"""

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from rlmeta.envs.regression import Sinusoid
from rlmeta.functional import optim, random
from rlmeta.nn import MLP, Params, apply, stack


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    tasks: int = 25
    """Of a meta-batch."""
    inner_steps: int = 1
    """k."""
    inner_rate: float = 0.02
    """α."""
    meta_rate: float = 8e-3
    """Adam's, annealed to 0 in a straight line."""
    max_grad_norm: float = 10.0


SETTINGS = Settings()
FAMILY = Sinusoid(shots=10, queries=10)
"""Its `tasks` are `{"support": {"observation", "target"}, "query": ...}`, `[seeds, tasks, points, 1]` each."""


def network() -> MLP:
    """f: from x to y, `[*L, points, 1]` to the same."""
    return MLP(1, (40, 40), 1, activation="relu", initialiser="torch")


NET = network()


def loss(weights: Params, points: dict[str, Tensor]) -> Tensor:
    """L, the mean squared error of every learner, `[*L]`."""
    return (apply(NET, weights, points["observation"]) - points["target"]).square().mean((-2, -1))


def adapt(weights: Params, support: dict[str, Tensor], steps: int, rate: float) -> Params:
    """θₖ of every task, `{name: [seeds, tasks, ...]}`, with a graph that leads back to θ₀."""
    for _ in range(steps):
        # a sum, because learners share no weight: each gets the gradient of its own loss
        total = loss(weights, support).sum()
        gradient = torch.autograd.grad(total, list(weights.values()), create_graph=True)
        weights = {name: weight - rate * g for (name, weight), g in zip(weights.items(), gradient)}
    return weights


def for_tasks(weights: Params, tasks: int) -> Params:
    """Every task starts from its seed's weights, `[seeds, ...]` -> `[seeds, tasks, ...]`; gradients add up."""
    return {name: w.unsqueeze(1).expand(-1, tasks, *w.shape[1:]) for name, w in weights.items()}


def update(
    weights: Params, moments: optim.State, tasks: dict[str, Any], rate: float, s: Settings
) -> tuple[Params, optim.State]:
    """One step of the initial weights `[seeds, ...]`: adapt, ask, go back through the adaptation."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    adapted = adapt(for_tasks(theta, s.tasks), tasks["support"], s.inner_steps, s.inner_rate)
    query = loss(adapted, tasks["query"]).mean(-1)
    gradient = dict(zip(theta, torch.autograd.grad(query.sum(), list(theta.values()))))
    gradient, _ = optim.clip_by_norm(gradient, s.max_grad_norm, learner_axes=1)
    updates, moments = optim.adam(rate).update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


def train(seeds: int = 4, steps: int = 75_000, s: Settings = SETTINGS) -> Params:
    """Meta-train `seeds` learners at once on `steps` tasks each; returns their weights `[seeds, ...]`."""
    keys = random.make_keys(range(seeds))
    weights = stack(network, keys)
    moments = optim.adam(s.meta_rate).init(weights, (seeds,))
    iterations = -(-steps // s.tasks)
    for i in range(iterations):
        tasks = FAMILY.tasks(keys, i, s.tasks, "train")
        weights, moments = update(weights, moments, tasks, s.meta_rate * (1 - i / iterations), s)
    return weights


def evaluate(weights: Params, tasks: int = 600, steps: int = 10, s: Settings = SETTINGS) -> Tensor:
    """The mean squared error on held-out tasks after 0 ... `steps` inner steps, `[seeds, steps + 1]`."""
    keys = random.make_keys(range(len(next(iter(weights.values())))))
    drawn, own, scores = FAMILY.tasks(keys, 0, tasks, "test"), for_tasks(weights, tasks), []
    for _ in range(steps + 1):
        own = {name: weight.detach().requires_grad_() for name, weight in own.items()}
        scores.append(loss(own, drawn["query"]).mean(-1).detach())
        own = adapt(own, drawn["support"], 1, s.inner_rate)
    return torch.stack(scores, -1)


def main(seeds: int = 4, steps: int = 75_000) -> None:
    """Meta-train, print every seed's error (rows) after 0 ... 10 inner steps (columns)."""
    print(evaluate(train(seeds, steps)))


if __name__ == "__main__":
    tyro.cli(main)
