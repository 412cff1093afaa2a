"""A classifier along a stream of tasks: it learns one after another, and forgets.

    minimise over θ  L(θ) = -E log softmax(f(x; θ))[y],   x and y of the task at hand alone

What is known of the classes makes three scenarios (van de Ven, Tuytelaars and Tolias, "Three types of incremental
learning", 2022): the softmax is over those of the task ("task"), over those that all tasks share ("domain"), or over
all that were met so far ("class"). `ewc.py`, `gem.py` and `packnet.py` beside this file forget less.

python agents/classifier.py --name split-digits --scenario class --seeds 5
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.data.samples import DataWorld
from rlmeta.functional import optim, random
from rlmeta.nn import MLP, Encoder, Params, Sequential, apply, stack

Batch = dict[str, Tensor]
"""`observation` `[seeds, B, ...]`, `target` `[seeds, B]`, and `allowed` `[seeds, B, C]` where the task is known."""


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    batch_size: int = 32
    hidden_sizes: tuple[int, ...] = (100, 100)
    learning_rate: float = 1e-3
    """Adam's."""


SETTINGS = Settings()


def network(world: DataWorld, s: Settings = SETTINGS) -> Sequential:
    """f: from inputs `[*L, B, ...]` to a logit for every class, `[*L, B, C]`."""
    encoder = Encoder(world.observation_space)  # flat, and bytes divided by their bound
    mlp = MLP(encoder.features, s.hidden_sizes, int(world.action_space.n), activation="relu", initialiser="torch")
    return Sequential(encoder, mlp)


def logits(net: Sequential, weights: Params, batch: Batch, known: Tensor) -> Tensor:
    """f, with minus infinity for classes that were not met yet, and for those of other tasks where the task is known.

    Args:
        net: the network.
        weights: `[*L, ...]`.
        batch: see `Batch`.
        known: which classes were met, `[*L, C]` bool.
    """
    is_open = known.unsqueeze(-2) & batch.get("allowed", torch.tensor(True))
    return apply(net, weights, batch["observation"]).masked_fill(~is_open, -torch.inf)


def loss(net: Sequential, weights: Params, batch: Batch, known: Tensor) -> Tensor:
    """L, the mean cross-entropy of every learner in nats, `[*L]`."""
    log_probability = logits(net, weights, batch, known).log_softmax(-1)
    return -log_probability.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1).mean(-1)


def update(
    net: Sequential, weights: Params, moments: optim.State, batch: Batch, known: Tensor, s: Settings = SETTINGS
) -> tuple[Params, optim.State]:
    """One gradient step of every learner."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    total = loss(net, theta, batch, known).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    updates, moments = optim.adam(s.learning_rate).update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


@torch.no_grad()
def accuracy(net: Sequential, weights: Params, world: DataWorld, known: Tensor) -> Tensor:
    """Of every learner on all test samples of the world's task, `[seeds]`; NaN before its classes were met."""
    right = count = torch.zeros(known.shape[:-1], dtype=torch.int64)
    for batch in world.test_batches(1000):
        answers = logits(net, weights, batch, known).argmax(-1)
        right = right + ((answers == batch["target"]) & batch["valid"]).sum(-1)
        count = count + batch["valid"].sum(-1)
    return (right / count).masked_fill((world.classes() & ~known).any(-1), torch.nan)


def train(
    name: str = "split-digits", scenario: str = "task", seeds: int = 5, steps: int = 12_800, s: Settings = SETTINGS
) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns `weights` and `accuracy`."""
    stream = rl.stream(name, scenario=scenario)
    world, tests = stream.world((seeds,), s.batch_size), stream.world((seeds,), 1)
    keys, net = random.make_keys(range(seeds)), network(world, s)
    weights, known = stack(lambda: network(world, s), keys), world.initial_classes().expand(seeds, -1)
    table = torch.zeros(seeds, len(stream), len(stream))

    for task in range(len(stream)):
        world.select(torch.full((seeds,), task))
        order = world.reset(random.fold(random.fold(keys, "world"), task))
        known = known | world.classes()
        moments = optim.adam(s.learning_rate).init(weights, (seeds,))
        for _ in range(-(-steps // s.batch_size)):
            order, batch = world.next_batch(order)
            weights, moments = update(net, weights, moments, batch, known, s)

        # what is left of the others
        for other in range(len(stream)):
            tests.select(torch.full((seeds,), other))
            table[:, task, other] = accuracy(net, weights, tests, known)
    return {"weights": weights, "accuracy": table}


def main(
    name: str = "split-digits",
    scenario: Literal["task", "domain", "class"] = "task",
    seeds: int = 5,
    steps: int = 12_800,
) -> None:
    """Train, print every seed's accuracy on every task (columns) after training on each (rows)."""
    print(train(name, scenario, seeds, steps)["accuracy"])


if __name__ == "__main__":
    tyro.cli(main)
