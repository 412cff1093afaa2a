"""Potential-based reward shaping: PPO on MountainCar, helped by the car's energy.

    r' = r + F,   F(s, s') = γ Φ(s') - Φ(s),   Φ(terminal) = 0
    maximise over π  E Σₜ γᵗ r'(sₜ, sₜ₊₁) = E Σₜ γᵗ r(sₜ, sₜ₊₁) - Φ(s₀): the same policies are best, whatever Φ is

MountainCar pays -1 a step until the flag, so an agent that never got there learns nothing. Energy is what the car must
gain to get there; F pays for it at once.

Ng, Harada and Russell, "Policy invariance under reward transformations", 1999; PPO: Schulman et al., 2017.

python agents/reward_shaping.py --seeds 8 --steps 200000
rlmeta train ppo MountainCar-v0 --rewards agents.reward_shaping:ENERGY --seeds 8
"""

import math
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import rlmeta as rl
from rlmeta.functional import losses, optim, random
from rlmeta.functional.normalise import normalise, running_init, running_update
from rlmeta.functional.returns import generalized_advantage
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.minibatch import flatten_time, minibatches
from rlmeta.nn import MLP, CategoricalHead, Context, Params, Sequential, ValueHead, stack

NUM_ENVS, NUM_STEPS, EPOCHS, BATCH_SIZE = 16, 200, 10, 400
LEARNING_RATE, GAMMA, LAMBDA, CLIP_RANGE, VALUE_COEFFICIENT, MAX_GRAD_NORM = 1e-3, 0.99, 0.98, 0.2, 0.5, 0.5
SCALE = 100.0
"""In steps: how many are saved, about, by having the energy of the flag."""


def energy(observation: Tensor) -> Tensor:
    """Φ: height and motion, `[..., 2]` -> `[...]`; 0 with what it takes to stand at the flag, negative below."""
    position, velocity = observation.unbind(-1)
    potential, kinetic = 0.0025 / 3 * torch.sin(3 * position), velocity.square() / 2
    at_flag = 0.0025 / 3 * math.sin(3 * 0.5)
    return SCALE * (potential + kinetic - at_flag) / (2 * at_flag)


ENERGY = rl.PotentialShaping(energy)
"""The same for any agent of the package: `rewards=(ENERGY,)`."""


def shaping(rollout: dict[str, Tensor]) -> Tensor:
    """F of every step of a rollout, `[seeds, T, N]`; a truncated one keeps the potential of its final observation."""
    after = energy(rollout["next_observation"]).masked_fill(rollout["terminated"], 0.0)
    return GAMMA * after - energy(rollout["observation"])


class Driver:
    """Policy π and value V of whitened observations; acts as `collect` and `evaluate` ask."""

    noise_hold = 1  # for how many steps a key serves

    def __init__(self) -> None:
        self.net, self.head = self.networks(), CategoricalHead(64, 3)

    def networks(self) -> nn.ModuleDict:
        """Fresh ones, with weights named policy.* and value.*."""
        policy = Sequential(MLP(2, (64, 64)), CategoricalHead(64, 3))
        return nn.ModuleDict({"policy": policy, "value": Sequential(MLP(2, (64, 64)), ValueHead(64))})

    def run(self, name: str, p: dict[str, Any], observation: Tensor) -> Any:
        """The parameters of π(.|s), or V(s), of observations `[*L, ...]`; p holds weights and statistics."""
        return self.net[name].run(p["weights"], normalise(observation, p["statistics"]), Context(), f"{name}.")

    def act(self, p: Any, observation: Tensor, memory: Any, key: Tensor, deterministic: bool = False) -> Any:
        """Actions `[*L, N]`, a sample or the most probable, and a memory that is none."""
        given = self.run("policy", p, observation)
        return self.head.mode(given) if deterministic else self.head.sample(given, key), memory

    def initial_memory(self, p: Any, rows: tuple[int, ...]) -> Any:
        """None."""
        return {}

    def effective_params(self, state: dict[str, Any]) -> Any:
        """What to act with."""
        return state["params"]


DRIVER = Driver()


@torch.no_grad()
def credit(p: dict[str, Any], rollout: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PPO learns from, `[seeds, T * N, ...]`: advantages and returns of every step, by the shaped reward."""
    value, after = (DRIVER.run("value", p, rollout[name]) for name in ("observation", "next_observation"))
    reward, ended = rollout["reward"] + shaping(rollout), rollout["terminated"] | rollout["truncated"]
    discount = GAMMA * (~rollout["terminated"]).to(reward.dtype)
    advantage = generalized_advantage(reward, discount, value, after, ended, LAMBDA)
    old = DRIVER.head.log_prob(DRIVER.run("policy", p, rollout["observation"]), rollout["action"])
    found = {"advantage": advantage, "return": advantage + value, "old_log_prob": old}
    return flatten_time({"observation": rollout["observation"], "action": rollout["action"], **found}, 1)


def loss(p: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    """PPO's, `[seeds]`: the clipped surrogate and the value's squared error."""
    log_prob = DRIVER.head.log_prob(DRIVER.run("policy", p, batch["observation"]), batch["action"])
    advantage = losses.normalise_advantage(batch["advantage"])
    surrogate = losses.ppo_clip_loss(log_prob, batch["old_log_prob"], advantage, CLIP_RANGE)
    error = DRIVER.run("value", p, batch["observation"]) - batch["return"]
    return surrogate + VALUE_COEFFICIENT * error.square().mean(-1)


def update(p: dict[str, Any], moments: optim.State, batch: dict[str, Tensor], rate: float) -> tuple[Any, optim.State]:
    """One gradient step of every learner."""
    theta: Params = {name: weight.detach().requires_grad_() for name, weight in p["weights"].items()}
    # a sum, because learners share no weight: each gets the gradient of its own loss
    total = loss({**p, "weights": theta}, batch).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    gradient, _ = optim.clip_by_norm(gradient, MAX_GRAD_NORM, learner_axes=1)
    updates, moments = optim.adam(rate, eps=1e-5).update(gradient, moments, p["weights"])
    return {**p, "weights": optim.apply_updates(p["weights"], updates)}, moments


def train(seeds: int = 8, steps: int = 200_000) -> dict[str, Any]:
    """Train `seeds` learners at once; returns their weights and statistics `[seeds, ...]`."""
    world, keys = rl.task("MountainCar-v0").world((seeds,), NUM_ENVS), random.make_keys(range(seeds))
    p = {"weights": stack(DRIVER.networks, keys), "statistics": running_init((seeds,), (2,))}
    moments, count = optim.adam().init(p["weights"], (seeds,)), torch.zeros_like(keys)
    count = {"vector_steps": count, "env_steps": count}
    state = {"key": keys, "count": count, "memory": {}, "world": world.reset(keys)}
    iterations = -(-steps // (NUM_ENVS * NUM_STEPS))
    for i in range(iterations):
        state, rollout = collect(DRIVER, {**state, "params": p}, world, NUM_STEPS)
        batch = credit(p, rollout)
        for rows in minibatches(keys, i * EPOCHS, batch, BATCH_SIZE, EPOCHS):
            p, moments = update(p, moments, rows, LEARNING_RATE * (1 - i / iterations))
        p["statistics"] = running_update(p["statistics"], batch["observation"])
    return p


def main(seeds: int = 8, steps: int = 200_000) -> None:
    """Train, play 64 episodes by the task's own reward, print every seed's mean return."""
    world, keys = rl.task("MountainCar-v0").world((seeds,), 64), random.make_keys(range(seeds))
    print(evaluate(DRIVER, train(seeds, steps), world, keys, 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
