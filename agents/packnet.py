"""PackNet along a stream of tasks: every task owns some weights, which no later task may change.

    minimise over the task's own θ  L(θ) = -E log softmax(f(x; θ))[y],   θ of earlier tasks fixed
    owner(i) = k where |θᵢ| is among the largest of the free weights of its layer, the others become 0 and stay free

A task trains on all that is free, beside the weights of earlier tasks; keeps its share of every layer; is trained again
without the rest. Biases are few: every task has its own. Seen through its owners and its biases, a task's answers never
change again. Two additions keep later tasks learning: free weights are drawn anew when a task begins, and a task keeps
none that has no gradient, such as those of a rectified unit that never fires.

Mallya and Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", 2018.

python agents/packnet.py --name split-digits --seeds 5
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.data.samples import DataWorld
from rlmeta.functional import optim, random
from rlmeta.functional.pruning import largest_free
from rlmeta.nn import MLP, Encoder, Params, Sequential, apply, stack

Batch = dict[str, Tensor]
"""`observation` `[seeds, B, ...]`, `target` `[seeds, B]`, and `allowed` `[seeds, B, C]` where the task is known."""
Owner = dict[str, Tensor]
"""Of every matrix `[seeds, out, in]` who owns its entries, 0 nobody, k + 1 task k (from 0); or flags of them."""

BATCH_SIZE = 32
HIDDEN_SIZES = (100, 100)
ADAM = optim.adam(1e-3)
RETRAIN = 0.5  # steps after the pruning, as a part of those before


def network(world: DataWorld) -> Sequential:
    """f: from inputs `[*L, B, ...]` to a logit for every class, `[*L, B, C]`."""
    encoder = Encoder(world.observation_space)  # flat, and bytes divided by their bound
    mlp = MLP(encoder.features, HIDDEN_SIZES, int(world.action_space.n), activation="relu", initialiser="torch")
    return Sequential(encoder, mlp)


def logits(net: Sequential, weights: Params, batch: Batch) -> Tensor:
    """f, with minus infinity for the classes of other tasks where the task is known."""
    answers = apply(net, weights, batch["observation"])
    return answers.masked_fill(~batch["allowed"], -torch.inf) if "allowed" in batch else answers


def loss(net: Sequential, weights: Params, batch: Batch) -> Tensor:
    """L, the mean cross-entropy of every learner in nats, `[seeds]`."""
    log_probability = logits(net, weights, batch).log_softmax(-1)
    return -log_probability.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1).mean(-1)


def minibatches(world: DataWorld, keys: Tensor) -> Iterator[Batch]:
    """The samples of the world's task in a new order every epoch, endlessly."""
    order = world.reset(keys)
    while True:
        order, batch = world.next_batch(order)
        yield batch


def learn(net: Sequential, weights: Params, batches: Iterable[Batch], mine: Owner) -> tuple[Params, Owner]:
    """Train the entries that are `mine`, and the biases; the weights, and which entries have had a gradient."""
    moments, useful = ADAM.init(weights, next(iter(weights.values())).shape[:1]), dict.fromkeys(mine, False)
    for batch in batches:
        theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        # a sum, because learners share no weight: each gets the gradient of its own loss
        gradient = dict(zip(theta, torch.autograd.grad(loss(net, theta, batch).sum(), list(theta.values()))))
        useful = {name: (gradient[name] != 0) | useful[name] for name in mine}
        gradient |= {name: gradient[name].where(mine[name], 0.0) for name in mine}
        updates, moments = ADAM.update(gradient, moments, weights)
        weights = optim.apply_updates(weights, updates)
    return weights, useful


def prune(weights: Params, owner: Owner, useful: Owner, task: int, tasks: int) -> tuple[Params, Owner]:
    """In every layer the task keeps the largest useful weights, 1 / (tasks left) of the free ones; the others are 0."""
    kept = {}
    for name, who in owner.items():
        free, size = who.flatten(1) == 0, (weights[name].abs() * useful[name]).flatten(1)
        share = (free.sum(-1, keepdim=True).double() / (tasks - task)).ceil().long()
        kept[name] = torch.where(largest_free(size, free, share).view_as(who), task + 1, who)
    return {n: w.where(kept[n] > 0, 0.0) if n in kept else w for n, w in weights.items()}, kept


def give_back(weights: Params, owner: Owner, useful: Owner, task: int) -> tuple[Params, Owner]:
    """Weights of the task that have had no gradient since the pruning are 0, and free."""
    useless = {name: (who == task + 1) & ~useful[name] for name, who in owner.items()}
    weights = {n: w.masked_fill(useless[n], 0.0) if n in useless else w for n, w in weights.items()}
    return weights, {name: who.masked_fill(useless[name], 0) for name, who in owner.items()}


def seen(weights: Params, owner: Owner, biases: Params, task: int) -> Params:
    """What the task may see: its own weights, those of tasks before it, and its own biases."""
    visible = {name: (who > 0) & (who <= task + 1) for name, who in owner.items()}
    return {n: w.where(visible[n], 0.0) if n in visible else biases[n] for n, w in weights.items()}


@torch.no_grad()
def accuracy(net: Sequential, weights: Params, world: DataWorld) -> Tensor:
    """Of every learner on all test samples of the world's task, `[seeds]`."""
    right = count = 0
    for batch in world.test_batches(1000):
        right = right + ((logits(net, weights, batch).argmax(-1) == batch["target"]) & batch["valid"]).sum(-1)
        count = count + batch["valid"].sum(-1)
    return right / count


def train(name: str = "split-digits", seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns `weights` and `accuracy`."""
    stream = rl.stream(name)
    world, tests = stream.world((seeds,), BATCH_SIZE), stream.world((seeds,), 1)
    keys, net, biases = random.make_keys(range(seeds)), network(world), []
    weights = stack(lambda: network(world), random.fold(keys, 0))
    owner = {n: torch.zeros_like(w, dtype=torch.int64) for n, w in weights.items() if w.dim() > 2}  # matrices
    table = torch.zeros(seeds, len(stream), len(stream))
    updates = -(-steps // BATCH_SIZE)

    for task in range(len(stream)):
        world.select(torch.full((seeds,), task))
        fresh = stack(lambda: network(world), random.fold(keys, task))
        weights |= {n: torch.where(who == 0, fresh[n], weights[n]) for n, who in owner.items()}
        batches = minibatches(world, random.fold(random.fold(keys, "world"), task))
        free = {n: who == 0 for n, who in owner.items()}
        weights, useful = learn(net, weights, itertools.islice(batches, updates), free)
        weights, owner = prune(weights, owner, useful, task, len(stream))
        mine = {n: who == task + 1 for n, who in owner.items()}
        weights, useful = learn(net, weights, itertools.islice(batches, max(1, round(RETRAIN * updates))), mine)
        weights, owner = give_back(weights, owner, useful, task)
        biases.append({n: w for n, w in weights.items() if n not in owner})

        # what is left of the others
        for other in range(len(stream)):
            tests.select(torch.full((seeds,), other))
            table[:, task, other] = accuracy(net, seen(weights, owner, biases[min(other, task)], other), tests)
    return {"weights": weights, "accuracy": table}


def main(name: str = "split-digits", seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print every seed's accuracy on every task (columns) after training on each (rows)."""
    print(train(name, seeds, steps)["accuracy"])


if __name__ == "__main__":
    tyro.cli(main)
