"""REINFORCE (Williams, 1992) with a learned baseline: act, credit, learn, many seeds at once.

With the return from there on, G_t = r_t + gamma r_t+1 + gamma^2 r_t+2 + ..., which the value V of the last state ends
where an episode is not over, and the credit C = G - V(s) brought to mean 0 and deviation 1 within the rollout, every
rollout is one step of Adam down the gradient of

    -E[log pi(a|s) C] + c_v E[(V(s) - G)^2] - c_h E[entropy(pi(.|s))]

python agents/reinforce.py --task CartPole-v1 --seeds 8 --steps 500000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/reinforce.toml for CartPole.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, returns, tree
from rlmeta.nn import MLP, Block, Encoder, Sequential, ValueHead, apply, head_for, picture_cnn, stack

NUM_ENVS, NUM_STEPS = 8, 128  # environments of each seed, steps in each between updates
LEARNING_RATE = 3e-3  # falls to 0 in a straight line
GAMMA = 0.99
VALUE_COEFFICIENT, ENTROPY_COEFFICIENT = 0.5, 0.0  # c_v, c_h
MAX_GRAD_NORM = 1.0  # of each seed's gradient
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
    """What the loss needs of every step `[S, T, N]`."""
    next_value = run(networks, "value", weights, rollout["next_observation"])
    discount = GAMMA * ~rollout["terminated"]  # a truncated episode goes on in its value
    cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
    kept = {name: rollout[name] for name in ("observation", "action", "valid")}
    return {**kept, "return": returns.monte_carlo_return(rollout["reward"], discount, next_value, cut)}


def loss(networks: dict, weights: dict, batch: dict) -> Tensor:
    """Each seed's loss `[S]` of a batch `[S, B, ...]`."""
    head, valid = networks["head"], batch["valid"]
    distribution = run(networks, "policy", weights, batch["observation"])
    value = run(networks, "value", weights, batch["observation"])
    centred = losses.normalise_advantage(batch["return"] - value.detach(), valid)
    policy_loss = losses.policy_gradient_loss(head.log_prob(distribution, batch["action"]), centred, valid)
    value_loss = losses.value_loss(value, batch["return"], valid)
    entropy_loss = losses.entropy_loss(head.entropy(distribution), valid)
    return policy_loss + VALUE_COEFFICIENT * value_loss + ENTROPY_COEFFICIENT * entropy_loss


def update(networks: dict, weights: dict, moments: dict, rollout: dict, progress: float) -> tuple[dict, dict]:
    """New weights, and Adam's moments of them, after one step along the gradient of a whole rollout."""
    batch = tree.map(lambda x: x.flatten(1, 2), credit(networks, weights, rollout))
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    total = loss(networks, leaves, batch).sum()  # seeds share no weight, so each gets the gradient of its own loss
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    gradients, _ = optim.clip_by_norm(gradients, MAX_GRAD_NORM, learner_axes=1)
    optimizer = optim.adam(LEARNING_RATE * (1 - progress))
    changes, moments = optimizer.update(gradients, moments, weights)
    return optim.apply_updates(weights, changes), moments


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 500_000) -> tuple[dict, dict]:
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
        weights, moments = update(networks, weights, moments, rollout, i / iterations)
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


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 500_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(networks, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
