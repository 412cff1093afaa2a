"""Rainbow (Hessel et al., 2018): deep Q-networks with all six extensions: act, remember, learn.

A network Z(s, a) gives the distribution of the return on K atoms z, Q(s, a) = E[Z(s, a)] its mean (C51); it is dueling,
and its noise explores. From a replay memory come transitions of n steps, the likelier the larger their loss was:

    P(i) ~ (loss_i + 1e-6)^alpha,   w_i = (min P / P(i))^beta
    loss = w KL(projection of r + gamma^n Z_target(s', argmax_b Q(s', b)) || Z(s, a))

python agents/rainbow.py --task MinAtar/Breakout-v1 --seeds 4 --steps 1000000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/rainbow.toml for MinAtar's Breakout.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import EVALUATION_LIMIT, State, World
from rlmeta.functional import distributional, optim, random, tree
from rlmeta.learning import prioritised, replay
from rlmeta.nn import Block, CategoricalQHead, Context, Encoder, Sequential, StreamOptions, picture_cnn, stack

NUM_ENVS, NUM_STEPS = 8, 4  # environments of each seed, steps in each between updates
GRADIENT_STEPS, BATCH_SIZE = 8, 32  # in an update
CAPACITY, LEARNING_STARTS = 100_000, 2_000  # transitions in the memory, and before the first update, at random
LEARNING_RATE, ADAM_EPSILON, MAX_GRAD_NORM = 2.5e-4, 1.5e-4, 10.0
GAMMA, N_STEPS = 0.99, 3
ATOMS, V_MIN, V_MAX = 51, 0.0, 20.0
PRIORITY_EXPONENT, IMPORTANCE_EXPONENT = 0.5, 0.4  # beta rises from here to 1
TARGET_EVERY = 1_000  # gradient steps between two copies of the weights to the target network
HEAD_SIZES = (128,)  # hidden layers of each of the two streams, after the convolution's 128 units

SOURCE = prioritised.Prioritised(BATCH_SIZE, N_STEPS)


def make_network(world: World) -> Block:
    """The distribution of the return of every action."""
    encoder = Encoder(world.observation_space, choose=picture_cnn)
    streams = StreamOptions(dueling=True, noisy=True, hidden_sizes=HEAD_SIZES)
    head = CategoricalQHead(encoder.features, int(world.action_space.n), ATOMS, V_MIN, V_MAX, streams)
    return Sequential(encoder, head)


@torch.no_grad()
def act(q: Block, weights: dict, world: World, state: State, key: Tensor, first: int, explore: float) -> tuple:
    """A rollout of the best actions under noise; step t of the whole run draws from the key folded with t."""
    rows = []
    for t in range(first, first + NUM_STEPS):
        observation, now = world.observation(state), random.fold(key, t)
        noise = random.fold(random.fold(now, "noise").unsqueeze(-1), torch.arange(NUM_ENVS))
        values = q.run(weights["q"], observation, Context(key=noise))["values"]
        other = random.uniform(now, "exploration", 0, values.shape[1:]).argmax(-1)
        explores = random.uniform(now, "epsilon", 0, other.shape[1:]) < explore
        action = torch.where(explores, other, values.argmax(-1))
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


def taken(q: Block, weights: dict, observation: Tensor, action: Tensor, key: Tensor) -> Tensor:
    """Logits of the atoms for an action in each observation, `[S, B, K]`, under one draw of noise."""
    logits = q.run(weights, observation, Context(key=key))["logits"]
    return torch.take_along_dim(logits, action[..., None, None], -2).squeeze(-2)


def losses(q: Block, weights: dict, target: dict, batch: dict, key: Tensor) -> Tensor:
    """The losses `[S, B]` of a minibatch, whose discount is gamma^n, 0 where the episode ended."""
    following = batch["next_observation"]
    with torch.no_grad():
        best = q.run(weights, following, Context(key=random.fold(key, "choice")))["values"].argmax(-1)
        probabilities = taken(q, target, following, best, random.fold(key, "target")).softmax(-1)
        goal = distributional.categorical_projection(probabilities, batch["reward"], batch["discount"], V_MIN, V_MAX)
    logits = taken(q, weights, batch["observation"], batch["action"], random.fold(key, "online"))
    return distributional.categorical_divergence(logits, goal)


def update(q: Block, weights: dict, moments: dict, memory: State, key: Tensor, first: int, progress: float) -> tuple:
    """New weights, moments and memory after some gradient steps; step k of the run draws from the key folded with k."""
    online, target = weights["q"], weights["target"]
    beta = IMPORTANCE_EXPONENT + (1 - IMPORTANCE_EXPONENT) * progress
    numbers = (torch.full(key.shape, number) for number in (GAMMA, PRIORITY_EXPONENT, beta))
    priorities, fixed = prioritised.moving(memory, N_STEPS), prioritised.fixed(memory, *numbers)
    optimizer = optim.adam(LEARNING_RATE, eps=ADAM_EPSILON)
    for k in range(first, first + GRADIENT_STEPS):
        now = random.fold(key, k)
        batch = SOURCE.draw(priorities, fixed, now)
        leaves = {name: weight.detach().requires_grad_() for name, weight in online.items()}
        each = losses(q, leaves, target, batch, now)
        total = distributional.weighted_mean(each, batch["valid"], batch["weight"]).sum()
        gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
        gradients, _ = optim.clip_by_norm(gradients, MAX_GRAD_NORM, learner_axes=1)
        changes, moments = optimizer.update(gradients, moments, online)
        online = optim.apply_updates(online, changes)
        priorities = SOURCE.update(priorities, fixed, batch, each.detach())
        if (k + 1) % TARGET_EVERY == 0:
            target = online
    return {"q": online, "target": target}, moments, prioritised.with_moved(memory, priorities, N_STEPS)


def train(task: str = "MinAtar/Breakout-v1", seeds: int = 4, steps: int = 1_000_000) -> tuple[Block, dict]:
    """The network, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    q = make_network(world)  # only its form counts, the seeds' weights are these
    first = stack(lambda: make_network(world), random.fold(key, "initialisation"))
    weights, moments = {"q": first, "target": first}, optim.adam().init(first, key.shape)
    state, per_iteration = world.reset(random.fold(key, "world")), NUM_ENVS * NUM_STEPS
    memory, learned = replay.init(world, state, CAPACITY // NUM_ENVS, prioritised=True), 0
    iterations = math.ceil(steps / per_iteration)
    for i in range(iterations):
        explore = 1.0 if i * per_iteration < LEARNING_STARTS else 0.0
        state, rollout = act(q, weights, world, state, key, i * NUM_STEPS, explore)
        memory = replay.insert(memory, rollout, rollout["reward"], learner_axes=1)
        if (i + 1) * per_iteration >= LEARNING_STARTS:
            weights, moments, memory = update(q, weights, moments, memory, key, learned, i / iterations)
            learned += GRADIENT_STEPS
    return q, weights


@torch.no_grad()
def evaluate(q: Block, weights: dict, world: World, key: Tensor) -> Tensor:
    """Each seed's mean return `[S]` over one episode in every environment, by the best actions without noise."""
    state, total, playing = world.reset(key), torch.zeros(()), torch.ones((), dtype=torch.bool)
    for _ in range(EVALUATION_LIMIT):
        action = q.run(weights["q"], world.observation(state), Context())["values"].argmax(-1)
        state, transition = world.step(state, action)
        total = total + transition.reward * playing
        playing = playing & ~(transition.terminated | transition.truncated)
        if not playing.any():
            break
    return total.mean(-1)


def main(task: str = "MinAtar/Breakout-v1", seeds: int = 4, steps: int = 1_000_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    q, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(q, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
