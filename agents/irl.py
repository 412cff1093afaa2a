"""Maximum causal entropy inverse reinforcement learning: the reward under which the demonstrations are most likely.

    maximise over r  E_demonstrations[ Σₜ γᵗ log π(aₜ|sₜ) ],   π = exp(Q - V),  V = log Σₐ exp Q,  Q = r + γ P V
    ∇r = how often the demonstrator visits a state - how often π does, both discounted

The dynamics P are known, so π is planned and its visits are solved for; nothing is acted in. A reward is paid for
acting in a state and for ending in one. Where a time limit cut the demonstrations π's visits end, too.

Ziebart, "Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal Entropy", 2010.

rlmeta record RUN --sampled --out FILE
python agents/irl.py --demonstrations FILE --task GridWorld-v0 --seeds 1 --steps 400
"""

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.functional import optim, random
from rlmeta.functional.tabular import occupancy_discounted, soft_plan_discounted
from rlmeta.learning.evaluate import evaluate
from rlmeta.nn import MLP, Params, apply, stack

GAMMA = 0.95
"""γ of the demonstrator."""
ADAM = optim.adam(0.05)
HIDDEN_SIZES = ()
"""Of the reward network: none is a table, one number a state."""


@dataclass(frozen=True)
class Dynamics:
    """What is known of the task, S states and A actions, in float64."""

    go_on: Tensor
    """P, the probability of each next state that does not end the episode, `[S, A, S]`."""
    end: Tensor
    """That of each state to end in, `[S, A, S]`."""
    start: Tensor
    """That of each first state, `[S]`."""


def dynamics_of(env: Any) -> Dynamics:
    """The tables of a tabular environment: GridWorld-v0, FrozenLake-v1, a TabularMDP."""
    probability, next_state, _, terminated, _ = env.tables
    go_on = env.dynamics()[0]
    return Dynamics(
        go_on, torch.zeros_like(go_on).scatter_add_(-1, next_state, probability * terminated), env.tables.start
    )


def demonstrated(given: rl.Demonstrations, states: int) -> tuple[Tensor, Tensor]:
    """Mean discounted visits of every state, and γᵀ at the state where a time limit cut an episode, `[S]` each."""
    visits, cut = torch.zeros(2, states, dtype=torch.float64).unbind()
    episodes = torch.split(given.observation, (given.lengths + 1).tolist())
    for episode, terminated in zip(episodes, given.terminated.tolist()):
        weight = GAMMA ** torch.arange(len(episode), dtype=torch.float64)
        counted = len(episode) if terminated else len(episode) - 1  # of a cut one the last state was not acted in
        visits = visits.index_add(0, episode[:counted], weight[:counted])
        cut = cut if terminated else cut.index_add(0, episode[-1:], weight[-1:])
    return visits / len(episodes), cut / len(episodes)


def network(states: int) -> MLP:
    """r: from a one-hot state to a number."""
    return MLP(states, HIDDEN_SIZES, 1)


def reward_of(net: MLP, weights: Params, states: int) -> Tensor:
    """r of every state, `[*L, S]` float64."""
    like = next(iter(weights.values()))
    every_state = torch.eye(states, dtype=like.dtype).expand(*like.shape[:-2], -1, -1)
    return apply(net, weights, every_state).squeeze(-1).double()


@torch.no_grad()
def plan(reward: Tensor, d: Dynamics) -> Tensor:
    """log π(a|s) of a reward `[*L, S]`, `[*L, S, A]`."""
    paid = reward.unsqueeze(-1) + GAMMA * torch.einsum("saz,...z->...sa", d.end, reward)
    return soft_plan_discounted(d.go_on, paid, GAMMA).log_policy


@torch.no_grad()
def visited(log_policy: Tensor, d: Dynamics, cut: Tensor) -> Tensor:
    """How often π acts or ends in every state, discounted, `[*L, S]`; less what it would after the cuts `[S]`."""
    policy = log_policy.exp()
    acts = occupancy_discounted(d.go_on, d.start - cut, policy, GAMMA).unsqueeze(-1) * policy
    return acts.sum(-1) + GAMMA * torch.einsum("...sa,saz->...z", acts, d.end)


def update(
    net: MLP, weights: Params, moments: optim.State, shown: tuple[Tensor, Tensor], d: Dynamics
) -> tuple[Params, optim.State]:
    """One step of every learner's reward; `shown` are the visits and cuts of `demonstrated`."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    reward = reward_of(net, theta, len(d.start))
    visits, cut = shown
    difference = visited(plan(reward, d), d, cut) - visits
    # a sum, because learners share no weight: each gets the gradient of its own likelihood
    total = (difference * reward).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    updates, moments = ADAM.update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


def train(demonstrations: str, task: str = "GridWorld-v0", seeds: int = 1, steps: int = 400) -> Tensor:
    """Find `seeds` rewards at once, `[seeds, S]`."""
    world = rl.task(task).world((seeds,), 1)
    given = rl.Demonstrations.load(demonstrations)
    given.check(world.observation_space, world.action_space)
    d = dynamics_of(world.env)
    states, shown = len(d.start), demonstrated(given, len(d.start))
    net, weights = network(states), stack(lambda: network(states), random.make_keys(range(seeds)))
    moments = ADAM.init(weights, (seeds,))
    for _ in range(steps):
        weights, moments = update(net, weights, moments, shown, d)
    return reward_of(net, weights, states).detach()


class Planned:
    """A policy that was planned, as `evaluate` asks for it."""

    noise_hold = 1

    def act(self, log_policy: Tensor, state: Tensor, memory: Any, key: Tensor, deterministic: bool = False) -> Any:
        """Actions in states `[*L, N]`: a sample, or the most probable."""
        chances = log_policy.gather(-2, state.unsqueeze(-1).expand(*state.shape, log_policy.shape[-1]))
        noise = 0.0 if deterministic else random.gumbel(key, "policy", 0, chances.shape[1:], chances.dtype)
        return (chances + noise).argmax(-1), memory

    def initial_memory(self, log_policy: Tensor, rows: tuple[int, ...]) -> Any:
        """None."""
        return {}


def main(demonstrations: str, task: str = "GridWorld-v0", seeds: int = 1, steps: int = 400) -> None:
    """Train, print every seed's reward of every state, and what its policy earns in the task itself."""
    print(reward := train(demonstrations, task, seeds, steps))
    world, keys = rl.task(task).world((seeds,), 64), random.make_keys(range(seeds))
    log_policy = plan(reward, dynamics_of(world.env))
    print(evaluate(Planned(), log_policy, world, keys, 64, deterministic=False).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
