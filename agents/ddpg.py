"""Deep deterministic policy gradient (DDPG; Lillicrap et al., 2016): act, remember, learn.

A critic Q learns what an action is worth against slow copies of itself and of the policy; the deterministic policy mu
climbs the critic, and explores by noise on its actions.
On a minibatch of transitions (s, a, r, s') each goes down the gradient of its own loss, by Adam:

    critic  E[(Q(s, a) - y)^2],  y = r + gamma Q_target(s', mu_target(s'))
    policy  -E[Q(s, mu(s))]

python agents/ddpg.py --task Pendulum-v1 --seeds 8 --steps 20000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/ddpg.toml for Pendulum.
"""

import math
from functools import partial

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.functional.axes import masked_mean
from rlmeta.learning import replay
from rlmeta.nn import MLP, ActionUnits, Block, DeterministicHead, Encoder, Sequential, ValueHead, apply, stack

NUM_ENVS, NUM_STEPS = 4, 4  # environments of each seed, steps in each between updates
GRADIENT_STEPS, BATCH_SIZE = 16, 128  # in an update
CAPACITY, LEARNING_STARTS = 100_000, 1_000  # transitions in the memory, and before the first update: acting at random
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-3, 1e-3
EXPLORATION_NOISE = 0.1  # deviation, in units of the actions' bounds
GAMMA, TARGET_RATE = 0.99, 0.01  # how far the targets go in each gradient step
HIDDEN_SIZES = (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, whose head (also by itself) knows the actions' bounds, and the critic."""
    encoder, features = Encoder(world.observation_space), HIDDEN_SIZES[-1]
    space = world.action_space
    units = ActionUnits(space.shape, space.low.reshape(-1).tolist(), space.high.reshape(-1).tolist())
    head = DeterministicHead(features, units, initial_scale=1.0)
    body = partial(MLP, hidden_sizes=HIDDEN_SIZES, activation="relu", initialiser="torch")
    both = encoder.features + math.prod(space.shape)
    critic = Sequential(body(both), ValueHead(features, initialiser="torch"))
    return {"encoder": encoder, "policy": Sequential(encoder, body(encoder.features), head), "head": head, "q": critic}


def values(networks: dict, weights: dict, observation: tree.Tree, action: Tensor) -> Tensor:
    """What the critic gives for actions `[S, B, ...]`, `[S, B]`."""
    action = networks["head"].units.to_policy(action)
    return apply(networks["q"], weights, torch.cat([networks["encoder"](observation), action], -1))


@torch.no_grad()
def act(networks: dict, weights: dict, world: World, state: State, key: Tensor, first: int, at_random: bool) -> tuple:
    """A rollout of the policy and noise, or of uniform actions; step t of the run draws from the key folded with t."""
    rows = []
    for t in range(first, first + NUM_STEPS):
        observation, now = world.observation(state), random.fold(key, t)
        mean = apply(networks["policy"], weights["policy"], observation)["mean"]
        noise = EXPLORATION_NOISE * random.normal(now, "exploration noise", 0, mean.shape[1:])
        uniform = 2 * random.uniform(now, "exploration", 0, mean.shape[1:]) - 1
        action = networks["head"].units.to_environment(uniform if at_random else (mean + noise).clamp(-1, 1))
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


def losses_of(networks: dict, weights: dict, batch: dict) -> dict[str, Tensor]:
    """The losses `[S]` of critic and policy for a minibatch `[S, B, ...]`."""
    policy, head, valid = networks["policy"], networks["head"], batch["valid"]
    with torch.no_grad():
        next_action = head.mode(apply(policy, weights["target_policy"], batch["next_observation"]))
        next_q = values(networks, weights["target_q"], batch["next_observation"], next_action)
        y = losses.td_target(batch["reward"], batch["discount"], next_q)
    error = (values(networks, weights["q"], batch["observation"], batch["action"]) - y).square()
    action = head.mode(apply(policy, weights["policy"], batch["observation"]))
    best = values(networks, weights["q"], batch["observation"], action)
    return {"q": masked_mean(error, valid), "policy": -masked_mean(best, valid)}


def update(networks: dict, weights: dict, moments: dict, memory: State, key: Tensor, first: int) -> tuple[dict, dict]:
    """New weights and moments after some gradient steps; step k of the whole run draws from the key folded with k."""
    rates = {"policy": ACTOR_LEARNING_RATE, "q": CRITIC_LEARNING_RATE}
    for k in range(first, first + GRADIENT_STEPS):
        batch = replay.sample(memory, random.fold(key, k), BATCH_SIZE, torch.full(key.shape, GAMMA))
        leaves = tree.map(lambda weight: weight.detach().requires_grad_(), weights)
        for name, loss in losses_of(networks, leaves, batch).items():
            own = leaves[name]  # no actor's gradient reaches a critic; seeds share no weight, so their sum will do
            gradients = dict(zip(own, torch.autograd.grad(loss.sum(), list(own.values()), retain_graph=True)))
            changes, new_moments = optim.adam(rates[name]).update(gradients, moments[name], weights[name])
            weights = {**weights, name: optim.apply_updates(weights[name], changes)}
            moments = {**moments, name: new_moments}
        for name in ("q", "policy"):
            target = weights[f"target_{name}"]
            moved = {part: torch.lerp(old, weights[name][part], TARGET_RATE) for part, old in target.items()}
            weights = {**weights, f"target_{name}": moved}
    return weights, moments


def train(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    networks = make_networks(world)  # only their form counts, the seeds' weights are these
    weights = {name: stack(lambda n=name: make_networks(world)[n], random.fold(key, name)) for name in ("policy", "q")}
    moments = {name: optim.adam().init(own, key.shape) for name, own in weights.items()}
    weights |= {"target_policy": weights["policy"], "target_q": weights["q"]}
    state, per_iteration = world.reset(random.fold(key, "world")), NUM_ENVS * NUM_STEPS
    memory, learned = replay.init(world, state, CAPACITY // NUM_ENVS), 0
    for i in range(math.ceil(steps / per_iteration)):
        at_random = i * per_iteration < LEARNING_STARTS
        state, rollout = act(networks, weights, world, state, key, i * NUM_STEPS, at_random)
        memory = replay.insert(memory, rollout, rollout["reward"], learner_axes=1)
        if (i + 1) * per_iteration >= LEARNING_STARTS:
            weights, moments = update(networks, weights, moments, memory, key, learned)
            learned += GRADIENT_STEPS
    return networks, weights


@torch.no_grad()
def evaluate(networks: dict, weights: dict, world: World, key: Tensor) -> Tensor:
    """Each seed's mean return `[S]` over one episode in every environment, without noise."""
    state, total, playing = world.reset(key), torch.zeros(()), torch.ones((), dtype=torch.bool)
    while playing.any():
        action = networks["head"].mode(apply(networks["policy"], weights["policy"], world.observation(state)))
        state, transition = world.step(state, action)
        total = total + transition.reward * playing
        playing = playing & ~(transition.terminated | transition.truncated)
    return total.mean(-1)


def main(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(networks, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
