"""Soft actor-critic (Haarnoja et al., 2018): act, remember, learn.

Two critics Q learn what an action is worth together with the entropy that follows; the policy climbs the lesser of
them; the temperature alpha, what a nat of entropy is worth, goes where the policy keeps the entropy H it is asked for.
On a minibatch of transitions (s, a, r, s') each goes down the gradient of its own loss, by Adam:

    critics      E[(Q(s, a) - y)^2],  y = r + gamma (min Q_target(s', a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
    policy       E[alpha log pi(a|s) - min Q(s, a)],  a ~ pi(.|s)
    temperature  log alpha E[-log pi(a|s) - H]

python agents/sac.py --task Pendulum-v1 --seeds 8 --steps 20000

Learners are an axis: every tensor, weights too, is `[S, ...]` for S seeds. A rollout is `[S, T, N, ...]`, T steps of N
environments. The settings are those of agents/sac.toml for Pendulum.
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
from rlmeta.nn import MLP, Block, Encoder, Ensemble, Sequential, ValueHead, apply, head_for, stack

NUM_ENVS, NUM_STEPS = 4, 4  # environments of each seed, steps in each between updates
GRADIENT_STEPS, BATCH_SIZE = 16, 128  # in an update
CAPACITY, LEARNING_STARTS = 100_000, 1_000  # transitions in the memory, and before the first update: acting at random
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE, TEMPERATURE_LEARNING_RATE = 1e-3, 1e-3, 1e-3
INITIAL_TEMPERATURE, TARGET_ENTROPY = 1.0, -1.0  # alpha; H of every component of an action in units of its bounds
GAMMA, TARGET_RATE = 0.99, 0.01  # how far the target critics go towards the critics in each gradient step
CRITICS, HIDDEN_SIZES = 2, (64, 64)


def make_networks(world: World) -> dict[str, Block]:
    """The policy, whose head (also by itself: it samples without weights) squashes a Gaussian, and the critics."""
    encoder, features = Encoder(world.observation_space), HIDDEN_SIZES[-1]
    # of the last layer; with the small initial_scale of on-policy agents all first actions would be near the middle
    head = head_for(world.action_space, features, initial_scale=1.0, action_bounds="squash")
    body = partial(MLP, hidden_sizes=HIDDEN_SIZES, activation="relu", initialiser="torch")
    both = encoder.features + math.prod(world.action_space.shape)
    critics = Ensemble(lambda: Sequential(body(both), ValueHead(features, initialiser="torch")), CRITICS)
    return {"encoder": encoder, "policy": Sequential(encoder, body(encoder.features), head), "head": head, "q": critics}


def values(networks: dict, weights: dict, observation: tree.Tree, action: Tensor) -> Tensor:
    """What all critics give for actions `[S, B, ...]`, `[S, critics, B]`."""
    action = networks["head"].units.to_policy(action)  # from the bounds to -1 ... 1
    return apply(networks["q"], weights, torch.cat([networks["encoder"](observation), action], -1))


@torch.no_grad()
def act(networks: dict, weights: dict, world: World, state: State, key: Tensor, first: int, at_random: bool) -> tuple:
    """A rollout of the policy, or of uniform actions; step t of the whole run draws from the key folded with t."""
    rows, head = [], networks["head"]
    for t in range(first, first + NUM_STEPS):
        observation, now = world.observation(state), random.fold(key, t)
        distribution = apply(networks["policy"], weights["policy"], observation)
        uniform = 2 * random.uniform(now, "exploration", 0, distribution["mean"].shape[1:]) - 1
        action = head.units.to_environment(uniform) if at_random else head.sample(distribution, now)
        state, transition = world.step(state, action)
        rows.append({**transition._asdict(), "observation": observation, "action": action})
    return state, tree.map(lambda *steps: torch.stack(steps, 1), *rows)


def losses_of(networks: dict, weights: dict, batch: dict, key: Tensor) -> dict[str, Tensor]:
    """The losses `[S]` of policy, critics and temperature for a minibatch `[S, B, ...]`."""
    policy, head, valid = networks["policy"], networks["head"], batch["valid"]
    alpha = weights["temperature"]["log"].exp()
    with torch.no_grad():
        after = apply(policy, weights["policy"], batch["next_observation"])
        next_action, next_log_prob = head.sample_log_prob(after, random.fold(key, "next action"))
        next_q = values(networks, weights["target"], batch["next_observation"], next_action).amin(1)
        y = losses.td_target(batch["reward"], batch["discount"], losses.soft_value(next_q, next_log_prob, alpha))
    error = (values(networks, weights["q"], batch["observation"], batch["action"]) - y.unsqueeze(1)).square()
    now = apply(policy, weights["policy"], batch["observation"])
    action, log_prob = head.sample_log_prob(now, random.fold(key, "action"))
    q = values(networks, weights["q"], batch["observation"], action).amin(1)
    wanted = TARGET_ENTROPY * action[0, 0].numel() + head.log_half_width  # H is of -1 ... 1, log_prob of the bounds
    return {
        "policy": -masked_mean(losses.soft_value(q, log_prob, alpha), valid),
        "q": masked_mean(error, valid.unsqueeze(1).expand_as(error)).sum(-1),
        "temperature": weights["temperature"]["log"] * (-masked_mean(log_prob.detach(), valid) - wanted),
    }


def update(networks: dict, weights: dict, moments: dict, memory: State, key: Tensor, first: int) -> tuple[dict, dict]:
    """New weights and moments after some gradient steps; step k of the whole run draws from the key folded with k."""
    rates = {"policy": ACTOR_LEARNING_RATE, "q": CRITIC_LEARNING_RATE, "temperature": TEMPERATURE_LEARNING_RATE}
    for k in range(first, first + GRADIENT_STEPS):
        now = random.fold(key, k)
        batch = replay.sample(memory, now, BATCH_SIZE, torch.full(key.shape, GAMMA))  # with their discount, 0 at an end
        leaves = tree.map(lambda weight: weight.detach().requires_grad_(), weights)
        for name, loss in losses_of(networks, leaves, batch, now).items():
            own = leaves[name]  # no actor's gradient reaches a critic; seeds share no weight, so their sum will do
            gradients = dict(zip(own, torch.autograd.grad(loss.sum(), list(own.values()), retain_graph=True)))
            changes, new_moments = optim.adam(rates[name]).update(gradients, moments[name], weights[name])
            weights = {**weights, name: optim.apply_updates(weights[name], changes)}
            moments = {**moments, name: new_moments}
        target = {name: torch.lerp(old, weights["q"][name], TARGET_RATE) for name, old in weights["target"].items()}
        weights = {**weights, "target": target}
    return weights, moments


def train(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> tuple[dict, dict]:
    """The networks, and the weights of `seeds` learners after so many steps each."""
    world, key = rl.task(task).world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    networks = make_networks(world)  # only their form counts, the seeds' weights are these
    weights = {name: stack(lambda n=name: make_networks(world)[n], random.fold(key, name)) for name in ("policy", "q")}
    weights["temperature"] = {"log": torch.full(key.shape, math.log(INITIAL_TEMPERATURE))}
    moments = {name: optim.adam().init(own, key.shape) for name, own in weights.items()}
    weights["target"] = weights["q"]
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
    """Each seed's mean return `[S]` over one episode in every environment, by the medians of the policy."""
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
