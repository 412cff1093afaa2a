"""Implicit Q-learning (IQL; Kostrikov, Nair and Levine, 2021): offline reinforcement learning from recorded steps.

No action outside the data is ever valued: V learns an upper expectile of the critics over the data's actions, the
critics learn from V, and the policy clones the data's actions, the better ones more. On a minibatch of recorded
transitions (s, a, r, s') each goes down the gradient of its own loss, by Adam, with A = min Q_target(s, a) - V(s):

    value    E[|tau - 1(A < 0)| A^2]
    critics  E[(Q(s, a) - r - gamma V(s'))^2],  gamma = 0 where s' is terminal
    policy   -E[min(exp(beta A), bound) log pi(a | s)]

python agents/iql.py --demonstrations FILE --task Pendulum-v1 --seeds 8 --steps 20000

FILE is what `rlmeta record RUN --out FILE` writes. Learners are an axis: every tensor, weights too, is `[S, ...]` for S
seeds; the data is shared by all. The settings are those of agents/iql.toml for Pendulum.
"""

import math
from functools import partial

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.learning.evaluate import evaluate
from rlmeta.nn import MLP, Block, Encoder, Ensemble, Sequential, ValueHead, apply, head_for, stack

BATCH_SIZE = 256  # transitions in a minibatch, drawn with replacement
EXPECTILE, BETA, LARGEST_WEIGHT = 0.7, 1.0, 100.0  # tau; beta in units of 1 / reward; the bound
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-3, 1e-3  # the policy's falls to 0 along a cosine
GAMMA, TARGET_RATE = 0.99, 0.01  # discount; how far the target critics go in each step
CRITICS, HIDDEN_SIZES = 2, (64, 64)
DECAY = 50  # gradient steps between two changes of the policy's rate


def make_networks(world: World) -> dict[str, Block]:
    """The policy, its head (which also by itself knows the actions' bounds), the value function, and the critics."""
    encoder, features, space = Encoder(world.observation_space), HIDDEN_SIZES[-1], world.action_space
    body = partial(MLP, hidden_sizes=HIDDEN_SIZES, activation="relu")
    head = head_for(space, features, initial_scale=0.01)
    both = encoder.features + math.prod(space.shape)
    critic = lambda: Sequential(body(both, initialiser="torch"), ValueHead(features, initialiser="torch"))  # noqa: E731
    return {
        "encoder": encoder,
        "head": head,
        "policy": Sequential(encoder, body(encoder.features, initialiser="orthogonal"), head),
        "value": Sequential(encoder, body(encoder.features, initialiser="orthogonal"), ValueHead(features)),
        "q": Ensemble(critic, CRITICS),
    }


class Actor:
    """The policy's most probable actions, for `evaluate`."""

    noise_hold = 1

    def __init__(self, networks: dict[str, Block]) -> None:
        self.networks = networks

    def act(self, weights: dict, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool) -> tuple:
        """Actions `[S, N, ...]`, and a memory that is none."""
        return self.networks["head"].mode(apply(self.networks["policy"], weights["policy"], observation)), memory

    def initial_memory(self, weights: dict, rows: tuple[int, ...]) -> dict:
        """None."""
        return {}


def draw(steps: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
    """Random recorded steps of every learner, `[M, ...]` -> `[seeds, B, ...]`."""
    rows = random.integers(keys, "demonstrations", 0, (BATCH_SIZE,), len(steps["action"]))
    batch = {name: steps[name][rows] for name in ("observation", "next_observation", "action", "reward")}
    return {**batch, "discount": GAMMA * (~steps["terminated"][rows]).to(batch["reward"].dtype)}


def losses_of(networks: dict, weights: dict, batch: dict) -> dict[str, Tensor]:
    """The losses `[S]` of value function, critics and policy for a minibatch `[S, B, ...]`."""
    encoder, head = networks["encoder"], networks["head"]
    action = head.units.to_policy(batch["action"])
    pair = torch.cat([encoder(batch["observation"]), action], -1)
    best = apply(networks["q"], weights["target"], pair).detach().amin(1)
    value = apply(networks["value"], weights["value"], batch["observation"])
    advantage = best - value
    level = torch.where(advantage < 0, 1 - EXPECTILE, EXPECTILE)
    after = apply(networks["value"], weights["value"], batch["next_observation"]).detach()
    y = losses.td_target(batch["reward"], batch["discount"], after)
    error = (apply(networks["q"], weights["q"], pair) - y.unsqueeze(1)).square()
    log_prob = head.log_prob(apply(networks["policy"], weights["policy"], batch["observation"]), batch["action"])
    weight = torch.exp(BETA * advantage.detach()).clamp(max=LARGEST_WEIGHT)
    return {
        "value": (level * advantage.square()).mean(-1),
        "q": error.mean(-1).sum(-1),
        "policy": -(weight * log_prob).mean(-1),
    }


def update(networks: dict, weights: dict, moments: dict, batch: dict, actor_rate: float) -> tuple[dict, dict]:
    """New weights and moments after one gradient step."""
    rates = {"value": CRITIC_LEARNING_RATE, "q": CRITIC_LEARNING_RATE, "policy": actor_rate}
    leaves = tree.map(lambda weight: weight.detach().requires_grad_(), weights)
    found = losses_of(networks, leaves, batch)
    for name, rate in rates.items():
        own = leaves[name]  # each on its own loss; seeds share no weight, so their sum will do
        gradients = dict(zip(own, torch.autograd.grad(found[name].sum(), list(own.values()), retain_graph=True)))
        changes, new_moments = optim.adam(rate).update(gradients, moments[name], weights[name])
        weights = {**weights, name: optim.apply_updates(weights[name], changes)}
        moments = {**moments, name: new_moments}
    target = {name: torch.lerp(old, weights["q"][name], TARGET_RATE) for name, old in weights["target"].items()}
    return {**weights, "target": target}, moments


def train(demonstrations: str, task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many gradient steps."""
    world, key = rl.task(task).world((seeds,), 1), random.make_keys(range(seeds))
    recorded = rl.Demonstrations.load(demonstrations)
    recorded.check(world.observation_space, world.action_space)
    networks, shown = make_networks(world), recorded.transitions()
    names = ("policy", "value", "q")
    weights = {name: stack(lambda n=name: make_networks(world)[n], random.fold(key, name)) for name in names}
    moments = {name: optim.adam().init(own, key.shape) for name, own in weights.items()}
    weights["target"] = weights["q"]
    for i in range(steps):
        done = i // DECAY * DECAY / steps
        rate = ACTOR_LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2
        weights, moments = update(networks, weights, moments, draw(shown, random.fold(key, i)), rate)
    return networks, weights


def main(demonstrations: str, task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(demonstrations, task, seeds, steps)
    key, world = random.fold(random.make_keys(range(seeds)), "evaluation"), rl.task(task).world((seeds,), 64)
    print(evaluate(Actor(networks), weights, world, key, 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
