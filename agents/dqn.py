"""Deep Q-networks (Mnih et al., 2015), double (van Hasselt et al., 2016) and with n-step targets: act, remember, learn.

From a replay memory of every seed's own come transitions (s, a, r, s'), r the discounted sum of n rewards and s' the
state after them. Every minibatch is a step of Adam down the gradient of Huber's error h

    E[h(Q(s, a) - y)],  y = r + gamma^n Q_target(s', argmax_b Q(s', b))

The target network, and an average of the weights which evaluation acts by, follow the weights slowly.

python agents/dqn.py --task CartPole-v1 --seeds 8 --steps 50000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/dqn.toml for CartPole.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, tree
from rlmeta.learning import replay
from rlmeta.nn import MLP, Block, Encoder, QHead, Sequential, apply, picture_cnn, stack

NUM_ENVS, NUM_STEPS = 8, 4  # environments of each seed, steps in each between updates
GRADIENT_STEPS, BATCH_SIZE = 16, 64  # in an update
CAPACITY, LEARNING_STARTS = 50_000, 1_000  # transitions in the memory, and before the first update
LEARNING_RATE, MAX_GRAD_NORM, HUBER_DELTA = 1e-3, 10.0, 1.0
GAMMA, N_STEPS = 0.99, 5
TARGET_EVERY, TARGET_RATE = 4, 0.02  # after so many gradient steps the target goes so far towards the weights
AVERAGE_RATE = 0.01  # and so far the average after each update
EXPLORATION_FRACTION, EPSILON_END = 0.16, 0.04  # the part of the steps in which epsilon falls from 1 to its end
HIDDEN_SIZES = (64, 64)


def make_network(world: World) -> Block:
    """The values of all actions in a state."""
    encoder = Encoder(world.observation_space, choose=picture_cnn)  # convolutions of pictures, a vector of the rest
    body = MLP(encoder.features, HIDDEN_SIZES, activation="relu", initialiser="torch")
    return Sequential(encoder, body, QHead(HIDDEN_SIZES[-1], int(world.action_space.n)))


def epsilon(progress: float) -> float:
    """The probability of a random action when so much of the training is done."""
    return 1 - (1 - EPSILON_END) * min(1.0, progress / EXPLORATION_FRACTION)


@torch.no_grad()
def act(q: Block, weights: dict, world: World, state: State, key: Tensor, first: int, explore: float) -> tuple:
    """A rollout of the best actions and some random ones; step t of the whole run draws from the key folded with t."""
    rows = []
    for t in range(first, first + NUM_STEPS):
        observation, now = world.observation(state), random.fold(key, t)
        values = apply(q, weights["q"], observation)
        other = random.uniform(now, "exploration", 0, values.shape[1:]).argmax(-1)
        explores = random.uniform(now, "epsilon", 0, other.shape[1:]) < explore
        action = torch.where(explores, other, values.argmax(-1))
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


def loss(q: Block, weights: dict, target: dict, batch: dict) -> Tensor:
    """Each seed's loss `[S]` of a minibatch `[S, B, ...]`, whose discount is gamma^n, 0 where the episode ended."""
    with torch.no_grad():
        next_q = apply(q, target, batch["next_observation"])
        next_online = apply(q, weights, batch["next_observation"])
        y = losses.double_q_target(batch["reward"], batch["discount"], next_q, next_online)
    chosen = apply(q, weights, batch["observation"]).gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
    return losses.huber_loss(chosen, y, HUBER_DELTA, batch["valid"])


def nearer(copy: dict, weights: dict, rate: float) -> dict:
    """A copy of the weights that has gone some way towards them."""
    return {name: torch.lerp(copy[name], weight, rate) for name, weight in weights.items()}


def update(q: Block, weights: dict, moments: dict, memory: State, key: Tensor, first: int) -> tuple[dict, dict]:
    """New weights and moments after some gradient steps; step k of the whole run draws from the key folded with k."""
    online, target, average = weights["q"], weights["target"], weights["average"]
    gamma, optimizer = torch.full(key.shape, GAMMA), optim.adam(LEARNING_RATE)
    for k in range(first, first + GRADIENT_STEPS):
        batch = replay.sample(memory, random.fold(key, k), BATCH_SIZE, gamma, N_STEPS)
        leaves = {name: weight.detach().requires_grad_() for name, weight in online.items()}
        total = loss(q, leaves, target, batch).sum()  # seeds share no weight, so each gets the gradient of its own loss
        gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
        gradients, _ = optim.clip_by_norm(gradients, MAX_GRAD_NORM, learner_axes=1)
        changes, moments = optimizer.update(gradients, moments, online)
        online = optim.apply_updates(online, changes)
        if (k + 1) % TARGET_EVERY == 0:
            target = nearer(target, online, TARGET_RATE)
    return {"q": online, "target": target, "average": nearer(average, online, AVERAGE_RATE)}, moments


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 50_000) -> tuple[Block, dict]:
    """The network, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    q = make_network(world)  # only its form counts, the seeds' weights are these
    first = stack(lambda: make_network(world), random.fold(key, "initialisation"))
    weights, moments = {"q": first, "target": first, "average": first}, optim.adam().init(first, key.shape)
    state, per_iteration = world.reset(random.fold(key, "world")), NUM_ENVS * NUM_STEPS
    memory, learned = replay.init(world, state, CAPACITY // NUM_ENVS), 0
    iterations = math.ceil(steps / per_iteration)
    for i in range(iterations):
        explore = 1.0 if i * per_iteration < LEARNING_STARTS else epsilon(i / iterations)
        state, rollout = act(q, weights, world, state, key, i * NUM_STEPS, explore)
        memory = replay.insert(memory, rollout, rollout["reward"], learner_axes=1)
        if (i + 1) * per_iteration >= LEARNING_STARTS:
            weights, moments = update(q, weights, moments, memory, key, learned)
            learned += GRADIENT_STEPS
    return q, weights


@torch.no_grad()
def evaluate(q: Block, weights: dict, world: World, key: Tensor) -> Tensor:
    """Each seed's mean return `[S]` over one episode in every environment, by the best actions of the average."""
    state, total, playing = world.reset(key), torch.zeros(()), torch.ones((), dtype=torch.bool)
    while playing.any():
        action = apply(q, weights["average"], world.observation(state)).argmax(-1)
        state, transition = world.step(state, action)
        total = total + transition.reward * playing
        playing = playing & ~(transition.terminated | transition.truncated)
    return total.mean(-1)


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 50_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    q, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(q, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
