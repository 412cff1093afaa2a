"""Behaviour cloning: make the demonstrated actions more likely, as in supervised learning.

    minimise over θ  L(θ) = -E_demonstrations[ log π(a|s; θ) + β H(π(.|s; θ)) ]

Nothing is acted in while it learns: its steps are gradient steps. Observations are whitened by the mean and deviation
of the demonstrations' own.

Pomerleau, "Efficient Training of Artificial Neural Networks for Autonomous Navigation", 1991.

rlmeta record RUN --out FILE
python agents/behaviour_cloning.py --demonstrations FILE --task CartPole-v1 --seeds 8 --steps 2000
"""

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.functional import optim, random
from rlmeta.functional.normalise import normalise, running_init, running_update
from rlmeta.learning.evaluate import evaluate
from rlmeta.nn import MLP, Encoder, Params, Sequential, apply, head_for, stack


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    batch_size: int = 64
    """Steps of demonstrations in a minibatch, drawn with replacement."""
    learning_rate: float = 1e-3
    """Adam's, annealed to 0 in a straight line."""
    entropy_coefficient: float = 1e-3
    """β."""
    max_grad_norm: float = 0.5
    hidden_sizes: tuple[int, ...] = (64, 64)


SETTINGS = Settings()


class Policy:
    """π, and what `evaluate` asks of whoever acts.

    Args:
        world: whose observations and actions it is for.
        statistics: of the demonstrations' observations, to whiten by.
        s: the widths of its layers.
    """

    noise_hold = 1
    """For how many steps a key serves."""

    def __init__(self, world: Any, statistics: dict[str, Tensor], s: Settings = SETTINGS) -> None:
        self.spaces, self.statistics, self.s = (world.observation_space, world.action_space), statistics, s
        self.net = self.network()
        self.head: Any = self.net.get_submodule("2")

    def network(self) -> Sequential:
        """Fresh weights: an observation to the parameters of a distribution over actions."""
        encoder, width = Encoder(self.spaces[0]), self.s.hidden_sizes[-1]
        return Sequential(encoder, MLP(encoder.features, self.s.hidden_sizes), head_for(self.spaces[1], width))

    def __call__(self, weights: Params, observation: Tensor) -> dict[str, Tensor]:
        """The distribution's parameters in states `[*L, ...]`."""
        return apply(self.net, weights, normalise(observation, self.statistics))

    def act(self, weights: Params, observation: Tensor, memory: Any, key: Tensor, deterministic: bool = False) -> Any:
        """Actions `[*L, N, ...]`, a sample or the most probable, and a memory that is none."""
        distribution = self(weights, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    def initial_memory(self, weights: Params, rows: tuple[int, ...]) -> Any:
        """None."""
        return {}


def statistics_of(steps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean and variance of the demonstrated observations `[M, ...]`."""
    return running_update(running_init((), steps["observation"].shape[1:]), steps["observation"])


def draw(steps: dict[str, Tensor], keys: Tensor, i: int, count: int) -> dict[str, Tensor]:
    """Random demonstrated steps of every learner, `[M, ...]` -> `[seeds, count, ...]`."""
    rows = random.integers(keys, "demonstrations", i, (count,), len(steps["action"]))
    return {name: steps[name][rows] for name in ("observation", "action")}


def loss(policy: Policy, weights: Params, batch: dict[str, Tensor], s: Settings) -> Tensor:
    """L of every learner, `[seeds]`."""
    distribution = policy(weights, batch["observation"])
    log_probability, entropy = policy.head.log_prob(distribution, batch["action"]), policy.head.entropy(distribution)
    return -(log_probability + s.entropy_coefficient * entropy).mean(-1)


def update(
    policy: Policy,
    weights: Params,
    moments: optim.State,
    batch: dict[str, Tensor],
    rate: float,
    s: Settings = SETTINGS,
) -> tuple[Params, optim.State]:
    """One gradient step of every learner."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    total = loss(policy, theta, batch, s).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    gradient, _ = optim.clip_by_norm(gradient, s.max_grad_norm, learner_axes=1)
    updates, moments = optim.adam(rate).update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


def train(
    demonstrations: str, task: str = "CartPole-v1", seeds: int = 8, steps: int = 2_000, s: Settings = SETTINGS
) -> tuple[Policy, Params]:
    """Train `seeds` imitators at once; returns the policy and its weights `[seeds, ...]`."""
    world = rl.task(task).world((seeds,), 1)
    given = rl.Demonstrations.load(demonstrations)
    given.check(world.observation_space, world.action_space)
    shown, keys = given.transitions(), random.make_keys(range(seeds))
    policy = Policy(world, statistics_of(shown), s)
    weights = stack(policy.network, keys)
    moments = optim.adam(s.learning_rate).init(weights, (seeds,))
    for i in range(steps):
        batch = draw(shown, keys, i, s.batch_size)
        weights, moments = update(policy, weights, moments, batch, s.learning_rate * (1 - i / steps), s)
    return policy, weights


def main(demonstrations: str, task: str = "CartPole-v1", seeds: int = 8, steps: int = 2_000) -> None:
    """Train, play 64 episodes with the most probable actions, print every seed's mean return."""
    policy, weights = train(demonstrations, task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    print(evaluate(policy, weights, world, random.make_keys(range(seeds)), 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
