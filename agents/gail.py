"""GAIL (Ho and Ermon, 2016): a judge tells the agent's steps from demonstrated ones, PPO learns to fool it.

    maximise over D  E_demonstrations[log D(s, a)] + E_π[log(1 - D(s, a))],   D = sigmoid(f(s, a)),
                     less κ E (‖∇f‖ - 1)² at mixtures of the two sides (Gulrajani et al., 2017)
    maximise over π  E_π Σₜ γᵗ r(sₜ, aₜ),   r = -log(1 - D) = log(1 + exp f)

r is never negative and pays for surviving: imitate in tasks of a fixed length. f sees steps whitened, actions one-hot.

rlmeta record RUN --out FILE
python agents/gail.py --demonstrations FILE --task CartPole-fixed --seeds 8 --steps 200000
"""

from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import softplus

import rlmeta as rl
from rlmeta.functional import losses, optim, random
from rlmeta.functional.normalise import normalise, running_init, running_update
from rlmeta.functional.returns import generalized_advantage
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.minibatch import flatten_time, gather, minibatches
from rlmeta.nn import MLP, Context, Encoder, Params, Sequential, ValueHead, head_for, stack

NUM_ENVS, NUM_STEPS, EPOCHS, BATCH_SIZE = 8, 500, 10, 200  # whole episodes: in shorter rollouts nothing but falls
LEARNING_RATE, GAMMA, LAMBDA, CLIP_RANGE, VALUE_COEFFICIENT, MAX_GRAD_NORM = 1e-3, 0.98, 0.95, 0.2, 0.5, 0.5
JUDGE_UPDATES, JUDGE_BATCH, JUDGE_RATE, KAPPA = 50, 256, 3e-3, 1.0  # for each rollout, of either side


class Imitator:
    """Policy π, value V and judge f on the spaces of the demonstrations; acts as `collect` and `evaluate` ask."""

    noise_hold = 1  # for how many steps a key serves

    def __init__(self, given: rl.Demonstrations) -> None:
        self.spaces, steps = (given.observation_space, given.action_space), given.transitions()
        self.encoders, self.statistics = [Encoder(space) for space in self.spaces], None
        self.net, self.head, raw = self.networks(), head_for(self.spaces[1], 64), self.step(**steps)
        self.statistics = running_update(running_init((), raw.shape[1:]), raw)
        self.shown = self.step(**steps)

    def networks(self) -> nn.ModuleDict:
        """Fresh ones, with weights named policy.*, value.* and judge.*."""
        size, actions = (encoder.features for encoder in self.encoders)
        policy = Sequential(self.encoders[0], MLP(size, (64, 64)), head_for(self.spaces[1], 64))
        value = Sequential(self.encoders[0], MLP(size, (64, 64)), ValueHead(64))
        judge = Sequential(MLP(size + actions, (32, 32)), ValueHead(32))
        return nn.ModuleDict({"policy": policy, "value": value, "judge": judge})

    def run(self, name: str, weights: Params, x: Tensor) -> Any:
        """The parameters of π(.|s) or V(s) of observations, or f of whitened steps, `[*L, ...]`."""
        return self.net[name].run(weights, x, Context(), f"{name}.")

    def step(self, observation: Tensor, action: Tensor, **_: Any) -> Tensor:
        """Observation and one-hot action as the judge sees them, `[*L, ..., D]`."""
        pair = torch.cat([e.run({}, x, Context()) for e, x in zip(self.encoders, (observation, action))], -1)
        return pair if self.statistics is None else normalise(pair, self.statistics, eps=1e-4)

    def act(self, weights: Params, observation: Tensor, memory: Any, key: Tensor, deterministic: bool = False) -> Any:
        """Actions `[*L, N]`, a sample or the most probable, and a memory that is none."""
        given = self.run("policy", weights, observation)
        return self.head.mode(given) if deterministic else self.head.sample(given, key), memory

    def initial_memory(self, weights: Params, rows: tuple[int, ...]) -> Any:
        """None."""
        return {}

    def effective_params(self, state: dict[str, Any]) -> Params:
        """The weights to act with."""
        return state["params"]


def judge_loss(agent: Imitator, shown: Tensor, own: Tensor, mix: Tensor, judge: Params) -> Tensor:
    """What D minimises, `[seeds]`, on demonstrated steps and the agent's own, `[seeds, B, D]` each."""
    told_apart = softplus(-agent.run("judge", judge, shown)) + softplus(agent.run("judge", judge, own))
    mixed = torch.lerp(own, shown, mix).requires_grad_()
    (slope,) = torch.autograd.grad(agent.run("judge", judge, mixed).sum(), mixed, create_graph=True)
    return (told_apart + KAPPA * (slope.square().sum(-1).add(1e-12).sqrt() - 1).square()).mean(-1)


def policy_loss(agent: Imitator, batch: dict[str, Tensor], weights: Params) -> Tensor:
    """What PPO minimises, `[seeds]`: the clipped surrogate and the value's squared error."""
    log_prob = agent.head.log_prob(agent.run("policy", weights, batch["observation"]), batch["action"])
    advantage = losses.normalise_advantage(batch["advantage"])
    surrogate = losses.ppo_clip_loss(log_prob, batch["old_log_prob"], advantage, CLIP_RANGE)
    error = agent.run("value", weights, batch["observation"]) - batch["return"]
    return surrogate + VALUE_COEFFICIENT * error.square().mean(-1)


def descend(loss: Any, weights: Params, moments: Any, adam: Any, max_norm: float = torch.inf) -> tuple[Params, Any]:
    """One gradient step of every learner."""
    theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    gradient = dict(zip(theta, torch.autograd.grad(loss(theta).sum(), list(theta.values()))))
    gradient, _ = optim.clip_by_norm(gradient, max_norm, learner_axes=1)
    updates, moments = adam.update(gradient, moments, weights)
    return optim.apply_updates(weights, updates), moments


@torch.no_grad()
def credit(agent: Imitator, weights: Params, rollout: dict[str, Tensor], reward: Tensor) -> dict[str, Tensor]:
    """What PPO learns from, `[seeds, T * N, ...]`: advantages and returns of every step of a rollout."""
    value, after = (agent.run("value", weights, rollout[name]) for name in ("observation", "next_observation"))
    ended, discount = rollout["terminated"] | rollout["truncated"], GAMMA * (~rollout["terminated"]).to(reward.dtype)
    advantage = generalized_advantage(reward, discount, value, after, ended, LAMBDA)
    old = agent.head.log_prob(agent.run("policy", weights, rollout["observation"]), rollout["action"])
    found = {"advantage": advantage, "return": advantage + value, "old_log_prob": old}
    return flatten_time({"observation": rollout["observation"], "action": rollout["action"], **found}, 1)


def train(demonstrations: str, task: str = "CartPole-fixed", seeds: int = 8, steps: int = 200_000) -> Any:
    """Train `seeds` imitators at once; returns the `Imitator` and its weights `[seeds, ...]`."""
    agent, keys = Imitator(rl.Demonstrations.load(demonstrations)), random.make_keys(range(seeds))
    world, weights = rl.task(task).world((seeds,), NUM_ENVS), stack(agent.networks, keys)
    judge = {name: weights.pop(name) for name in list(weights) if name.startswith("judge.")}
    judge_moments, moments = (optim.adam().init(group, (seeds,)) for group in (judge, weights))
    count = dict.fromkeys(("vector_steps", "env_steps"), torch.zeros_like(keys))
    state = {"key": keys, "count": count, "memory": {}, "world": world.reset(keys)}
    for i in range(iterations := -(-steps // (NUM_ENVS * NUM_STEPS))):
        # act
        state, rollout = collect(agent, {**state, "params": weights}, world, NUM_STEPS)
        own = agent.step(rollout["observation"], rollout["action"])  # [seeds, T, N, D]
        # tell apart
        for k in range(i * JUDGE_UPDATES, (i + 1) * JUDGE_UPDATES):
            shown = agent.shown[random.integers(keys, "demonstrations", k, (JUDGE_BATCH,), len(agent.shown))]
            some = gather(own.flatten(1, 2), random.integers(keys, "rollout", k, (JUDGE_BATCH,), NUM_STEPS * NUM_ENVS))
            told_apart = partial(judge_loss, agent, shown, some, random.uniform(keys, "mix", k, (JUDGE_BATCH, 1)))
            judge, judge_moments = descend(told_apart, judge, judge_moments, optim.adam(JUDGE_RATE))
        # learn to fool it
        batch = credit(agent, weights, rollout, softplus(agent.run("judge", judge, own)).detach())
        adam = optim.adam(LEARNING_RATE * (1 - i / iterations), eps=1e-5)
        for rows in minibatches(keys, i * EPOCHS, batch, BATCH_SIZE, EPOCHS):
            weights, moments = descend(partial(policy_loss, agent, rows), weights, moments, adam, MAX_GRAD_NORM)
    return agent, weights


def main(demonstrations: str, task: str = "CartPole-fixed", seeds: int = 8, steps: int = 200_000) -> None:
    """Train, play 64 episodes with the most probable actions, print every seed's mean return."""
    agent, weights = train(demonstrations, task, seeds, steps)
    world, keys = rl.task(task).world((seeds,), 64), random.make_keys(range(seeds))
    print(evaluate(agent, weights, world, keys, 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
