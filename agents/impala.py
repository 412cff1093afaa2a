"""V-trace actor-critic (IMPALA; Espeholt et al., 2018): act, learn off-policy from sequences, many seeds at once.

A rollout is learned from for several epochs, so the policy pi moves away from mu, which acted. With importance weights
rho = min(RHO_CLIP, pi/mu) and traces c = min(C_CLIP, pi/mu), every minibatch of sequences is a step of Adam down

    -E[log pi(a|s) A] + c_v E[(V(s) - G)^2]    where, with delta = rho (r + gamma V(s') - V(s)) and G' of the next step,
    G = V(s) + delta + gamma c (G' - V(s'))    A = rho (r + gamma G' - V(s))

python agents/impala.py --task CartPole-v1 --seeds 8 --steps 200000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/impala.toml for CartPole.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, returns, tree
from rlmeta.nn import MLP, Block, Context, Encoder, Sequential, ValueHead, head_for, picture_cnn, stack

NUM_ENVS, NUM_STEPS = 8, 32  # environments of each seed, steps in each between updates: the length of a sequence
NUM_EPOCHS, SEQUENCES = 4, 4  # passes over a rollout, sequences in a minibatch
LEARNING_RATE = 5e-4  # falls to 0 in a straight line
GAMMA = 0.98
RHO_CLIP, C_CLIP, TRACE_LAMBDA = 1.0, 1.0, 1.0
VALUE_COEFFICIENT, ENTROPY_COEFFICIENT = 0.5, 0.0  # c_v, and the entropy's
MAX_GRAD_NORM = 0.5  # of each seed's gradient
EPSILON = 1e-5  # Adam's
HIDDEN_SIZES = (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, whose head (also by itself) knows the distribution over actions, and the value of a state."""
    head = head_for(world.action_space, HIDDEN_SIZES[-1])

    def body() -> list[Block]:
        encoder = Encoder(world.observation_space, choose=picture_cnn)  # convolutions of pictures, a vector of the rest
        return [encoder, MLP(encoder.features, HIDDEN_SIZES, activation="tanh")]

    policy, value = Sequential(*body(), head), Sequential(*body(), ValueHead(HIDDEN_SIZES[-1]))
    return {"policy": policy, "value": value, "head": head}  # the head once more, to sample from what the policy gave


def run(networks: dict, name: str, weights: dict, x: tree.Tree) -> tree.Tree:
    """What a network gives for `x` `[S, ..., D]`: each seed's rows go through its own weights."""
    return networks[name].run(weights, x, Context(), f"{name}.")


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
def sequences_of(networks: dict, weights: dict, rollout: dict) -> dict:
    """The rollout by sequences `[S, N, T, ...]`, with how likely each action was to be taken."""
    acted = networks["head"].log_prob(run(networks, "policy", weights, rollout["observation"]), rollout["action"])
    names = ("observation", "next_observation", "action", "reward", "terminated", "truncated", "valid")
    return tree.map(lambda x: x.transpose(1, 2), {"acted": acted} | {name: rollout[name] for name in names})


def loss(networks: dict, weights: dict, batch: dict) -> Tensor:
    """Each seed's loss `[S]` of a minibatch of sequences `[S, B, T, ...]`."""
    b, head = tree.map(lambda x: x.transpose(1, 2), batch), networks["head"]
    distribution = run(networks, "policy", weights, b["observation"])
    value, log_prob = run(networks, "value", weights, b["observation"]), head.log_prob(distribution, b["action"])
    with torch.no_grad():
        next_value = run(networks, "value", weights, b["next_observation"])
        cut = b["terminated"] | b["truncated"] | ~b["valid"]
        target, advantage = returns.v_trace(
            b["reward"], GAMMA * ~b["terminated"], value.detach(), next_value, cut, log_prob - b["acted"],
            RHO_CLIP, C_CLIP, TRACE_LAMBDA,
        )  # fmt: skip
    valid = b["valid"].flatten(1)
    policy = losses.policy_gradient_loss(log_prob.flatten(1), advantage.flatten(1), valid)
    value_loss = losses.value_loss(value.flatten(1), target.flatten(1), valid)
    entropy_loss = losses.entropy_loss(head.entropy(distribution).flatten(1), valid)
    return policy + VALUE_COEFFICIENT * value_loss + ENTROPY_COEFFICIENT * entropy_loss


def update(
    networks: dict, weights: dict, moments: dict, rollout: dict, key: Tensor, iteration: int, progress: float
) -> tuple[dict, dict]:
    """New weights, and Adam's moments of them, after some epochs of minibatches; each seed shuffles by its own key."""
    batch, optimizer = sequences_of(networks, weights, rollout), optim.adam(LEARNING_RATE * (1 - progress), eps=EPSILON)
    seed = torch.arange(len(key)).unsqueeze(-1)
    for epoch in range(iteration * NUM_EPOCHS, (iteration + 1) * NUM_EPOCHS):
        order = random.permutation(key, "minibatch", epoch, NUM_ENVS)
        for rows in order.split(SEQUENCES, -1):
            minibatch = tree.map(lambda x, rows=rows: x[seed, rows], batch)
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            total = loss(networks, leaves, minibatch).sum()  # seeds share no weight
            gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
            gradients, _ = optim.clip_by_norm(gradients, MAX_GRAD_NORM, learner_axes=1)
            changes, moments = optimizer.update(gradients, moments, weights)
            weights = optim.apply_updates(weights, changes)
    return weights, moments


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 200_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    networks = make_networks(world)  # only their form counts, the seeds' weights are these
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


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 200_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(networks, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
