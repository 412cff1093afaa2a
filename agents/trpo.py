"""Trust region policy optimization (Schulman et al., 2015): act, credit, one natural gradient step, many seeds at once.

With advantages A by generalized advantage estimation and the ratio rho = pi(a|s) / pi_old(a|s), each rollout is good
for one step of the policy's weights, along d = (F + damping I)^-1 g by conjugate gradient: g is the gradient of
E[rho A], F the curvature of E[KL(pi_old || pi)]. The step is sqrt(2 KL_TARGET / d'(F + damping I)d) d, cut until
E[rho A] has grown and the divergence is at most KL_TARGET. The value function learns G = A + V_old(s) by Adam.

python agents/trpo.py --task Pendulum-v1 --seeds 8 --steps 100000

Every tensor, weights too, is `[S, ...]` for S seeds, a rollout `[S, T, N, ...]`. The settings are rl-baselines3-zoo's.
"""

import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.world import State, World
from rlmeta.functional import losses, optim, random, returns, tree
from rlmeta.functional.axes import masked_mean
from rlmeta.functional.packed import Packed
from rlmeta.functional.trust_region import conjugate_gradient, line_search, step_within
from rlmeta.nn import MLP, Block, Context, Encoder, Sequential, ValueHead, head_for, stack

NUM_ENVS, NUM_STEPS = 2, 1_024  # environments of each seed, steps in each between updates
KL_TARGET, DAMPING, CONJUGATE_STEPS = 0.01, 0.1, 15  # the trust region, the diagonal's addition, products F v
LINE_SEARCH_STEPS, LINE_SEARCH_SHRINK = 10, 0.8  # lengths that are tried, from one to the next
VALUE_EPOCHS, BATCH_SIZE, VALUE_LEARNING_RATE = 15, 128, 1e-3  # of the value function
NOISE_HOLD, ACTION_BOUNDS = 4, "clip"  # steps for which the noise, a function of the state, is held; raw units
GAMMA, GAE_LAMBDA, HIDDEN_SIZES = 0.9, 0.95, (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, whose head (also by itself) knows the distribution over actions, and the value of a state."""
    encoder = Encoder(world.observation_space)
    head = head_for(world.action_space, HIDDEN_SIZES[-1], action_bounds=ACTION_BOUNDS, state_dependent_noise=True)
    ends = {"policy": head, "value": ValueHead(HIDDEN_SIZES[-1])}
    networks = {n: Sequential(encoder, MLP(encoder.features, HIDDEN_SIZES), end) for n, end in ends.items()}
    return {**networks, "head": head}


def run(networks: dict, name: str, weights: dict, x: tree.Tree) -> tree.Tree:
    """What a network gives for `x` `[S, ..., D]`: each seed's rows go through its own weights."""
    return networks[name].run(weights, x, Context(), f"{name}.")


@torch.no_grad()
def act(networks: dict, weights: dict, world: World, state: State, key: Tensor, first: int) -> tuple[State, dict]:
    """A rollout of the policy; step t of the whole run draws from the key folded with t, as far as noise is held."""
    rows = []
    for t in range(first, first + NUM_STEPS):
        observation = world.observation(state)
        distribution = run(networks, "policy", weights, observation)
        action = networks["head"].sample(distribution, random.fold(key, t // NOISE_HOLD))
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


@torch.no_grad()
def credit(networks: dict, weights: dict, rollout: dict) -> dict:
    """What an update needs of every step, `[S, T N]`, by the weights that acted."""
    value, next_value = (run(networks, "value", weights, rollout[f"{n}observation"]) for n in ("", "next_"))
    discount = GAMMA * ~rollout["terminated"]  # a truncated episode goes on in its value
    cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
    advantage = returns.generalized_advantage(rollout["reward"], discount, value, next_value, cut, GAE_LAMBDA)
    kept = {name: rollout[name] for name in ("observation", "action", "valid")}
    return tree.map(lambda x: x.flatten(1, 2), {**kept, "advantage": advantage, "return": advantage + value})


@torch.no_grad()
def policy_step(networks: dict, weights: dict, batch: dict) -> dict:
    """The weights after the policy's step on a rollout `[S, B, ...]`."""
    theta = Packed.of({name: weight for name, weight in weights.items() if name.startswith("policy.")}, 1)
    head, valid, old = networks["head"], batch["valid"], run(networks, "policy", weights, batch["observation"])
    advantage = losses.normalise_advantage(batch["advantage"], valid)

    def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
        now = run(networks, "policy", Packed.view(flat, theta, 1), batch["observation"])
        ratio = (head.log_prob(now, batch["action"]) - head.log_prob(old, batch["action"])).exp()
        return masked_mean(ratio * advantage, valid), masked_mean(head.kl(old, now), valid)

    leaf = theta.flat.clone().requires_grad_()
    with torch.enable_grad():
        objective, divergence = evaluate(leaf)
        (gradient,) = torch.autograd.grad(objective.sum(), leaf, retain_graph=True)  # seeds share no weight
        (slope,) = torch.autograd.grad(divergence.sum(), leaf, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        # F v is the derivative of the slope along v
        return torch.autograd.grad(slope, leaf, vector, retain_graph=True)[0] + DAMPING * vector

    direction = conjugate_gradient(product, gradient, CONJUGATE_STEPS)
    step = step_within(KL_TARGET, direction, product(direction))
    point, _ = line_search(evaluate, theta.flat, step, KL_TARGET, LINE_SEARCH_STEPS, LINE_SEARCH_SHRINK)
    return {**weights, **Packed.view(point, theta, 1)}


def update(networks: dict, weights: dict, moments: dict, rollout: dict, key: Tensor, iteration: int) -> tuple:
    """New weights, and Adam's moments of the value function's."""
    batch, seed = credit(networks, weights, rollout), torch.arange(len(key)).unsqueeze(-1)
    weights = policy_step(networks, weights, batch)
    own = {name: weight for name, weight in weights.items() if name.startswith("value.")}
    for epoch in range(iteration * VALUE_EPOCHS, (iteration + 1) * VALUE_EPOCHS):
        for rows in random.permutation(key, "minibatch", epoch, NUM_ENVS * NUM_STEPS).split(BATCH_SIZE, -1):
            b = tree.map(lambda x, rows=rows: x[seed, rows], batch)
            leaves = {name: weight.detach().requires_grad_() for name, weight in own.items()}
            loss = losses.value_loss(run(networks, "value", leaves, b["observation"]), b["return"], b["valid"])
            gradients = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values()))))
            changes, moments = optim.adam(VALUE_LEARNING_RATE).update(gradients, moments, own)
            own = optim.apply_updates(own, changes)
    return {**weights, **own}, moments


def train(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 100_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    networks = make_networks(world)  # only their form counts, the seeds' weights are these
    weights = stack(lambda: torch.nn.ModuleDict(make_networks(world)), random.fold(key, "initialisation"))
    moments = optim.adam().init({name: w for name, w in weights.items() if name.startswith("value.")}, key.shape)
    state = world.reset(random.fold(key, "world"))
    for i in range(math.ceil(steps / (NUM_ENVS * NUM_STEPS))):
        state, rollout = act(networks, weights, world, state, key, i * NUM_STEPS)
        weights, moments = update(networks, weights, moments, rollout, key, i)
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


def main(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 100_000) -> None:
    """Train, then print every seed's mean return over 64 new episodes."""
    networks, weights = train(task, seeds, steps)
    key = random.fold(random.make_keys(range(seeds)), "evaluation")
    print(evaluate(networks, weights, rl.task(task).world((seeds,), 64), key))


if __name__ == "__main__":
    tyro.cli(main)
