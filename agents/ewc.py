"""Elastic weight consolidation along a stream of tasks: a spring on every weight, as stiff as old tasks need it.

    minimise over θ  L(θ) + λ/2 Σₖ Σᵢ Fₖᵢ (θᵢ - θₖᵢ)²,   L(θ) = -E log softmax(f(x; θ))[y]

θₖ are the weights after old task k, and Fₖᵢ = E_x E_{y ~ p(.|x; θₖ)} (∂ log p(y|x; θₖ) / ∂θᵢ)², p = softmax(f), is the
diagonal of the Fisher information there: how much the task's answers change with weight i.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017.

python agents/ewc.py --name split-digits --strength 1000 --seeds 5
"""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.data.samples import DataWorld
from rlmeta.functional import optim, random
from rlmeta.nn import MLP, Context, Encoder, Params, Sequential, apply, categorical_fisher, stack

Batch = dict[str, Tensor]
"""`observation` `[seeds, B, ...]`, `target` `[seeds, B]`, and `allowed` `[seeds, B, C]` where the task is known."""
Spring = tuple[Tensor, Tensor]
"""Of an old task: Fₖ and θₖ, `[seeds, P]` each."""


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    strength: float = 1000.0
    """λ, with F averaged over samples."""
    samples: int = 500
    """Of a task, to average F over."""
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


def logits(net: Sequential, weights: Params, batch: Batch, ctx: Context | None = None) -> Tensor:
    """f, with minus infinity for the classes of other tasks where the task is known.

    `ctx` is what `categorical_fisher` hands over, to see every layer's input; without one `apply` evaluates.
    """
    answers = apply(net, weights, batch["observation"], ctx)
    return answers.masked_fill(~batch["allowed"], -torch.inf) if "allowed" in batch else answers


def flat(weights: Params) -> Tensor:
    """All weights of a learner in one row, `{name: [seeds, ...]}` -> `[seeds, P]`; `categorical_fisher`'s order too."""
    return torch.cat([weight.flatten(1) for weight in weights.values()], -1)


def loss(net: Sequential, weights: Params, batch: Batch, springs: list[Spring], s: Settings) -> Tensor:
    """The cross-entropy of the task at hand, and what stretching the springs of old tasks costs, `[seeds]`."""
    log_probability = logits(net, weights, batch).log_softmax(-1)
    total = -log_probability.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1).mean(-1)
    for fisher, anchor in springs:
        total = total + s.strength / 2 * (fisher * (flat(weights) - anchor).square()).sum(-1)
    return total


def update(
    net: Sequential,
    weights: Params,
    moments: optim.State,
    batch: Batch,
    springs: list[Spring],
    s: Settings = SETTINGS,
) -> tuple[Params, optim.State]:
    """One gradient step of every learner."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    total = loss(net, theta, batch, springs, s).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    updates, moments = optim.adam(s.learning_rate).update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


def spring(net: Sequential, weights: Params, samples: Batch) -> Spring:
    """What the task that has just ended needs of every weight: the expectation over labels is exact."""

    def answers(p: dict, batch: Batch, ctx: Context) -> Tensor:
        return logits(net, p["weights"], batch, ctx)

    return categorical_fisher(answers, {"weights": weights}, samples, learner_axes=1), flat(weights)


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
    keys, net, springs = random.make_keys(range(seeds)), network(world, s), []
    weights = stack(lambda: network(world, s), keys)
    table = torch.zeros(seeds, len(stream), len(stream))

    for task in range(len(stream)):
        world.select(torch.full((seeds,), task))
        order = world.reset(random.fold(random.fold(keys, "world"), task))
        moments = optim.adam(s.learning_rate).init(weights, (seeds,))
        for _ in range(-(-steps // s.batch_size)):
            order, batch = world.next_batch(order)
            weights, moments = update(net, weights, moments, batch, springs, s)
        springs.append(spring(net, weights, world.sample(random.fold(keys, "draw"), s.samples)))

        # what is left of the others
        for other in range(len(stream)):
            tests.select(torch.full((seeds,), other))
            table[:, task, other] = accuracy(net, weights, tests)
    return {"weights": weights, "accuracy": table}


def main(name: str = "split-digits", strength: float = 1000.0, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print every seed's accuracy on every task (columns) after training on each (rows)."""
    print(train(name, seeds, steps, Settings(strength))["accuracy"])


if __name__ == "__main__":
    tyro.cli(main)
