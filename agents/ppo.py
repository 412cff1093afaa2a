"""Proximal policy optimisation (Schulman et al., 2017): act, credit, learn, many seeds at once.

With the ratio rho = pi(a|s) / pi_old(a|s) to the policy that acted, advantages A by generalized advantage estimation
(Schulman et al., 2016) and returns G = A + V_old(s), every minibatch is a step of Adam down the gradient of

    -E[min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)] + c_v E[(V(s) - G)^2] - c_h E[entropy(pi(.|s))]

python agents/ppo.py --task CartPole-v1 --seeds 8 --steps 100000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those that rl-baselines3-zoo has for CartPole; agents/ppo.toml has other tasks'.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, returns, tree
from rlmeta.nn import MLP, Block, Encoder, Sequential, ValueHead, apply, head_for, picture_cnn, stack

NUM_ENVS, NUM_STEPS = 8, 32  # environments of each seed, steps in each between updates
NUM_EPOCHS = 20  # passes over a rollout
BATCH_SIZE = 256  # samples in a minibatch
LEARNING_RATE = 1e-3  # falls to 0 in a straight line
CLIP_RANGE = 0.2  # epsilon; falls to 0, too
GAMMA, GAE_LAMBDA = 0.98, 0.8
VALUE_COEFFICIENT, ENTROPY_COEFFICIENT = 0.5, 0.0  # c_v, c_h
MAX_GRAD_NORM = 0.5  # of each seed's gradient
ADAM_EPSILON = 1e-5
HIDDEN_SIZES = (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, from observations to a distribution over actions, and the value of a state."""
    head = head_for(world.action_space, HIDDEN_SIZES[-1])

    def body() -> list[Block]:
        encoder = Encoder(world.observation_space, choose=picture_cnn)  # convolutions of pictures, a vector of the rest
        return [encoder, MLP(encoder.features, HIDDEN_SIZES, activation="tanh")]

    policy, value = Sequential(*body(), head), Sequential(*body(), ValueHead(HIDDEN_SIZES[-1]))
    return {"policy": policy, "value": value, "head": head}  # the head once more, to sample from what the policy gave


def run(networks: dict, name: str, weights: dict, x: tree.Tree) -> tree.Tree:
    """What a network gives for `x` `[S, ..., D]`: each seed's rows go through its own weights."""
    # both networks' weights are one dictionary, "policy.2.linear.weight", ..., since their gradient is clipped as one
    own = {key.removeprefix(f"{name}."): weight for key, weight in weights.items() if key.startswith(f"{name}.")}
    return apply(networks[name], own, x)


@torch.no_grad()
def act(networks: dict, weights: dict, world: World, state: State, key: Tensor, first: int) -> tuple[State, dict]:
    """A rollout of the policy; step t of the whole run draws its actions from the key folded with t."""
    rows = []
    for t in range(first, first + NUM_STEPS):
        observation = world.observation(state)
        action = networks["head"].sample(run(networks, "policy", weights, observation), random.fold(key, t))
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


@torch.no_grad()
def credit(networks: dict, weights: dict, rollout: dict) -> dict:
    """What the loss needs of every step `[S, T, N]`, by the weights that acted."""
    value = run(networks, "value", weights, rollout["observation"])
    next_value = run(networks, "value", weights, rollout["next_observation"])
    discount = GAMMA * ~rollout["terminated"]  # a truncated episode goes on in its value
    cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
    advantage = returns.generalized_advantage(rollout["reward"], discount, value, next_value, cut, GAE_LAMBDA)
    distribution = run(networks, "policy", weights, rollout["observation"])
    old_log_prob = networks["head"].log_prob(distribution, rollout["action"])
    kept = {name: rollout[name] for name in ("observation", "action", "valid")}
    return {**kept, "advantage": advantage, "return": advantage + value, "old_log_prob": old_log_prob}


def loss(networks: dict, weights: dict, batch: dict, clip_range: float) -> Tensor:
    """Each seed's loss `[S]` of a minibatch `[S, B, ...]`."""
    head, valid = networks["head"], batch["valid"]
    distribution = run(networks, "policy", weights, batch["observation"])
    value = run(networks, "value", weights, batch["observation"])
    log_prob = head.log_prob(distribution, batch["action"])
    advantage = losses.normalise_advantage(batch["advantage"], valid)
    surrogate = losses.ppo_clip_loss(log_prob, batch["old_log_prob"], advantage, clip_range, valid)
    value_loss = losses.value_loss(value, batch["return"], valid)
    entropy_loss = losses.entropy_loss(head.entropy(distribution), valid)
    return surrogate + VALUE_COEFFICIENT * value_loss + ENTROPY_COEFFICIENT * entropy_loss


def update(
    networks: dict, weights: dict, moments: dict, rollout: dict, key: Tensor, iteration: int, progress: float
) -> tuple[dict, dict]:
    """New weights, and Adam's moments of them, after some epochs of minibatches; each seed shuffles by its own key."""
    batch = tree.map(lambda x: x.flatten(1, 2), credit(networks, weights, rollout))
    optimizer = optim.adam(LEARNING_RATE * (1 - progress), eps=ADAM_EPSILON)
    seed = torch.arange(len(key)).unsqueeze(-1)
    for epoch in range(iteration * NUM_EPOCHS, (iteration + 1) * NUM_EPOCHS):
        order = random.permutation(key, "minibatch", epoch, NUM_ENVS * NUM_STEPS)
        for rows in order.split(BATCH_SIZE, -1):
            minibatch = tree.map(lambda x, rows=rows: x[seed, rows], batch)
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            total = loss(networks, leaves, minibatch, CLIP_RANGE * (1 - progress)).sum()  # seeds share no weight
            gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
            gradients, _ = optim.clip_by_norm(gradients, MAX_GRAD_NORM, learner_axes=1)
            changes, moments = optimizer.update(gradients, moments, weights)
            weights = optim.apply_updates(weights, changes)
    return weights, moments


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 100_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    networks = make_networks(world)  # only their form counts, the seeds' weights are these
    # a ModuleDict puts each network's name before its weights'; the head's are in the policy already
    weights = stack(lambda: torch.nn.ModuleDict(make_networks(world)), random.fold(key, "initialisation"))
    moments = optim.adam().init(weights, key.shape)
    state = world.reset(random.fold(key, "world"))
    iterations = math.ceil(steps / (NUM_ENVS * NUM_STEPS))
    for i in range(iterations):
        state, rollout = act(networks, weights, world, state, key, i * NUM_STEPS)
        weights, moments = update(networks, weights, moments, rollout, key, i, i / iterations)
    return networks, weights


@torch.no_grad()
def evaluate(networks: dict, weights: dict, world: World, key: Tensor) -> Tensor:
    """Each seed's mean return `[S]` over one episode in every environment, by the most probable actions."""
    state, total, playing = world.reset(key), torch.zeros(()), torch.ones((), dtype=torch.bool)
    while playing.any():
        action = networks["head"].mode(run(networks, "policy", weights, world.observation(state)))
        state, transition = world.step(state, action)
        total = total + transition.reward * playing
        playing = playing & ~(transition.terminated | transition.truncated)
    return total.mean(-1)


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 100_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(networks, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
