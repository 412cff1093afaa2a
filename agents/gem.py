"""Gradient episodic memory along a stream of tasks: no step may raise the loss on what is remembered.

    L(θ) = -E log softmax(f(x; θ))[y],   g = ∇ L of the task at hand,   gₖ = ∇ L of what is kept of old task k
    step along the g̃ nearest to g with ⟨g̃, gₖ⟩ ≥ 0 for all k

By duality g̃ = g + Σₖ vₖ gₖ, where v ≥ margin minimises ½ vᵀ G Gᵀ v + (G g)ᵀ v with the gₖ as the rows of G: a small
quadratic programme for every learner, `functional.projection`, in as many numbers as there are old tasks.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", 2017.

python agents/gem.py --name split-digits --memory 50 --seeds 5
"""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.data.samples import DataWorld
from rlmeta.functional import optim, random
from rlmeta.functional.projection import project
from rlmeta.nn import MLP, Encoder, Params, Sequential, apply, stack

Batch = dict[str, Tensor]
"""`observation` `[seeds, B, ...]`, `target` `[seeds, B]`, and `allowed` `[seeds, B, C]` where the task is known."""


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    memory: int = 50
    """Samples kept of every task."""
    margin: float = 0.5
    """Lower bound of v where a constraint is violated; above 0 the step leans towards old tasks."""
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


def logits(net: Sequential, weights: Params, batch: Batch) -> Tensor:
    """f, with minus infinity for the classes of other tasks where the task is known."""
    answers = apply(net, weights, batch["observation"])
    return answers.masked_fill(~batch["allowed"], -torch.inf) if "allowed" in batch else answers


def loss(net: Sequential, weights: Params, batch: Batch) -> Tensor:
    """L, the mean cross-entropy of every learner in nats, `[seeds]`."""
    log_probability = logits(net, weights, batch).log_softmax(-1)
    return -log_probability.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1).mean(-1)


def gradient(net: Sequential, weights: Params, batch: Batch) -> Tensor:
    """∇ L of every learner in one row, `[seeds, P]`."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    parts = torch.autograd.grad(loss(net, theta, batch).sum(), list(theta.values()))
    return torch.cat([part.flatten(1) for part in parts], -1)


def unflatten(row: Tensor, weights: Params) -> Params:
    """Rows `[seeds, P]` under the names and shapes of the weights."""
    parts = torch.split(row, [weight[0].numel() for weight in weights.values()], -1)
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts)}


def update(
    net: Sequential,
    weights: Params,
    moments: optim.State,
    batch: Batch,
    memories: list[Batch],
    s: Settings = SETTINGS,
) -> tuple[Params, optim.State]:
    """One step of every learner along its projected gradient."""
    g = gradient(net, weights, batch)
    if memories:
        references = torch.stack([gradient(net, weights, memory) for memory in memories], 1)  # [seeds, K, P]
        g = project(g, references, s.margin)
    updates, moments = optim.adam(s.learning_rate).update(unflatten(g, weights), moments, weights)
    return optim.apply_updates(weights, updates), moments


@torch.no_grad()
def accuracy(net: Sequential, weights: Params, world: DataWorld) -> Tensor:
    """Of every learner on all test samples of the world's task, `[seeds]`."""
    right = count = 0
    for batch in world.test_batches(1000):
        right = right + ((logits(net, weights, batch).argmax(-1) == batch["target"]) & batch["valid"]).sum(-1)
        count = count + batch["valid"].sum(-1)
    return right / count


def train(name: str = "split-digits", seeds: int = 5, steps: int = 12_800, s: Settings = SETTINGS) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns `weights` and `accuracy`."""
    stream = rl.stream(name)
    world, tests = stream.world((seeds,), s.batch_size), stream.world((seeds,), 1)
    keys, net, memories = random.make_keys(range(seeds)), network(world, s), []
    weights = stack(lambda: network(world, s), keys)
    table = torch.zeros(seeds, len(stream), len(stream))

    for task in range(len(stream)):
        world.select(torch.full((seeds,), task))
        order = world.reset(random.fold(random.fold(keys, "world"), task))
        moments = optim.adam(s.learning_rate).init(weights, (seeds,))
        for _ in range(-(-steps // s.batch_size)):
            order, batch = world.next_batch(order)
            weights, moments = update(net, weights, moments, batch, memories, s)
        memories.append(world.sample(random.fold(keys, "draw"), s.memory))

        # what is left of the others
        for other in range(len(stream)):
            tests.select(torch.full((seeds,), other))
            table[:, task, other] = accuracy(net, weights, tests)
    return {"weights": weights, "accuracy": table}


def main(name: str = "split-digits", memory: int = 50, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print every seed's accuracy on every task (columns) after training on each (rows)."""
    print(train(name, seeds, steps, Settings(memory))["accuracy"])


if __name__ == "__main__":
    tyro.cli(main)
