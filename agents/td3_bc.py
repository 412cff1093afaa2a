"""TD3+BC (Fujimoto and Gu, 2021): offline reinforcement learning by TD3 whose policy also clones recorded actions.

Two critics Q learn what an action is worth against the lesser of their target copies, whose next action is blurred; the
deterministic policy mu climbs the first critic and stays near the data's actions, and moves, with all targets, after
every other step of the critics. On a minibatch of recorded transitions (s, a, r, s') each goes down the gradient of its
own loss, by Adam:

    critics  E[(Q(s, a) - y)^2],  y = r + gamma min Q_target(s', mu_target(s') + clip(noise, -c, c))
    policy   E[-lambda Q_1(s, mu(s)) + (mu(s) - a)^2],  lambda = alpha / E|Q_1(s, mu(s))|, a constant

python agents/td3_bc.py --demonstrations FILE --task Pendulum-v1 --seeds 8 --steps 20000

FILE is what `rlmeta record RUN --out FILE` writes. Learners are an axis: every tensor, weights too, is `[S, ...]` for S
seeds; the data is shared by all. The settings are those of agents/td3_bc.toml for Pendulum.
"""

import math
from functools import partial

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.normalise import normalise, running_init, running_update
from rlmeta.learning.evaluate import evaluate
from rlmeta.nn import MLP, ActionUnits, Block, DeterministicHead, Encoder, Ensemble, Sequential, ValueHead, apply, stack

BATCH_SIZE = 256  # transitions in a minibatch, drawn with replacement
ALPHA = 10.0  # weight of the critic against cloning
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-3, 1e-3
TARGET_NOISE, TARGET_NOISE_CLIP = 0.2, 0.5  # deviation, and c, in units of the actions' bounds
POLICY_DELAY = 2  # the policy and the targets move in every so many gradient steps
GAMMA, TARGET_RATE = 0.99, 0.01  # discount; how far the targets go each time
CRITICS, HIDDEN_SIZES = 2, (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, whose head (also by itself) knows the actions' bounds, and the critics."""
    encoder, features, space = Encoder(world.observation_space), HIDDEN_SIZES[-1], world.action_space
    units = ActionUnits(space.shape, space.low.reshape(-1).tolist(), space.high.reshape(-1).tolist())
    head = DeterministicHead(features, units, initial_scale=1.0)
    body = partial(MLP, hidden_sizes=HIDDEN_SIZES, activation="relu", initialiser="torch")
    both = encoder.features + math.prod(space.shape)
    critics = Ensemble(lambda: Sequential(body(both), ValueHead(features, initialiser="torch")), CRITICS)
    return {"encoder": encoder, "policy": Sequential(encoder, body(encoder.features), head), "head": head, "q": critics}


class Actor:
    """The policy, for `evaluate`."""

    noise_hold = 1

    def __init__(self, networks: dict[str, Block], statistics: dict[str, Tensor]) -> None:
        self.networks, self.statistics = networks, statistics

    def act(self, weights: dict, observation: tree.Tree, memory: tree.Tree, key: Tensor, deterministic: bool) -> tuple:
        """Actions `[S, N, ...]`, and a memory that is none."""
        seen = normalise(observation, self.statistics)
        return self.networks["head"].mode(apply(self.networks["policy"], weights["policy"], seen)), memory

    def initial_memory(self, weights: dict, rows: tuple[int, ...]) -> dict:
        """None."""
        return {}


def draw(steps: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
    """Random recorded steps of every learner, `[M, ...]` -> `[seeds, B, ...]`."""
    rows = random.integers(keys, "demonstrations", 0, (BATCH_SIZE,), len(steps["action"]))
    batch = {name: steps[name][rows] for name in ("observation", "next_observation", "action", "reward")}
    return {**batch, "discount": GAMMA * (~steps["terminated"][rows]).to(batch["reward"].dtype)}


def values(networks: dict, weights: dict, observation: Tensor, action: Tensor) -> Tensor:
    """What all critics give for actions `[S, B, ...]`, `[S, critics, B]`."""
    action = networks["head"].units.to_policy(action)
    return apply(networks["q"], weights, torch.cat([networks["encoder"](observation), action], -1))


def losses_of(networks: dict, weights: dict, batch: dict, key: Tensor) -> dict[str, Tensor]:
    """The losses `[S]` of critics and policy for a minibatch `[S, B, ...]` of normalised observations."""
    policy, head = networks["policy"], networks["head"]
    with torch.no_grad():
        after = apply(policy, weights["target_policy"], batch["next_observation"])["mean"]
        noise = TARGET_NOISE * random.normal(key, "target noise", 0, after.shape[1:])
        blurred = (after + noise.clamp(-TARGET_NOISE_CLIP, TARGET_NOISE_CLIP)).clamp(-1, 1)
        next_action = head.units.to_environment(blurred)
        next_q = values(networks, weights["target_q"], batch["next_observation"], next_action).amin(1)
        y = losses.td_target(batch["reward"], batch["discount"], next_q)
    error = (values(networks, weights["q"], batch["observation"], batch["action"]) - y.unsqueeze(1)).square()
    own = apply(policy, weights["policy"], batch["observation"])
    first = values(networks, weights["q"], batch["observation"], head.mode(own))[:, 0]
    size = first.detach().abs().mean(-1)
    cloning = (own["mean"] - head.units.to_policy(batch["action"])).square().mean((-2, -1))
    return {"q": error.mean(-1).sum(-1), "policy": -ALPHA * first.mean(-1) / size + cloning}


def update(networks: dict, weights: dict, moments: dict, batch: dict, key: Tensor, delayed: bool) -> tuple[dict, dict]:
    """New weights and moments after one gradient step, of the critics alone where the policy is `delayed`."""
    leaves = tree.map(lambda weight: weight.detach().requires_grad_(), weights)
    found, rates = losses_of(networks, leaves, batch, key), {"policy": ACTOR_LEARNING_RATE, "q": CRITIC_LEARNING_RATE}
    for name in ("q",) if delayed else ("q", "policy"):
        own = leaves[name]  # each on its own loss; seeds share no weight, so their sum will do
        gradients = dict(zip(own, torch.autograd.grad(found[name].sum(), list(own.values()), retain_graph=True)))
        changes, new_moments = optim.adam(rates[name]).update(gradients, moments[name], weights[name])
        weights = {**weights, name: optim.apply_updates(weights[name], changes)}
        moments = {**moments, name: new_moments}
    for name in () if delayed else ("q", "policy"):
        target = weights[f"target_{name}"]
        moved = {part: torch.lerp(old, weights[name][part], TARGET_RATE) for part, old in target.items()}
        weights = {**weights, f"target_{name}": moved}
    return weights, moments


def train(demonstrations: str, task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> tuple[Actor, dict]:
    """The actor, and the weights of `seeds` learners after so many gradient steps."""
    world, key = rl.task(task).world((seeds,), 1), random.make_keys(range(seeds))
    recorded = rl.Demonstrations.load(demonstrations)
    recorded.check(world.observation_space, world.action_space)
    networks, given = make_networks(world), recorded.transitions()
    statistics = running_update(running_init((), given["observation"].shape[1:]), given["observation"])
    shown = {name: normalise(x, statistics) if "observation" in name else x for name, x in given.items()}
    weights = {name: stack(lambda n=name: make_networks(world)[n], random.fold(key, name)) for name in ("policy", "q")}
    moments = {name: optim.adam().init(own, key.shape) for name, own in weights.items()}
    weights |= {"target_policy": weights["policy"], "target_q": weights["q"]}
    for i in range(steps):
        now = random.fold(key, i)
        weights, moments = update(networks, weights, moments, draw(shown, now), now, (i + 1) % POLICY_DELAY != 0)
    return Actor(networks, statistics), weights


def main(demonstrations: str, task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    actor, weights = train(demonstrations, task, seeds, steps)
    key, world = random.fold(random.make_keys(range(seeds)), "evaluation"), rl.task(task).world((seeds,), 64)
    print(evaluate(actor, weights, world, key, 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
