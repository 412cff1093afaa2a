"""Potential-based shaping with its loop in sight: PPO on MountainCar, helped by the car's energy.

MountainCar pays -1 a step until the flag, so an agent that never got there learns nothing. Energy is what it must gain
to get there; shaping pays for it without changing which policy is best. The same as `rl.train` with
`rewards=(ENERGY,)`, bit for bit.

python agents/reward_shaping.py --seeds 8 --steps 200000
rlmeta train ppo MountainCar-v0 --rewards agents.reward_shaping:ENERGY --seeds 8
"""

import dataclasses
import math

import torch
import tyro
from torch import Tensor

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.learning.collect import collect
from rlmeta.learning.settings import hyper_tensors


def energy(observation: Tensor) -> Tensor:
    """Height and motion, `[..., 2]` -> `[...]`: 0 with what it takes to stand at the flag, negative below."""
    position, velocity = observation.unbind(-1)
    potential, kinetic = 0.0025 / 3 * torch.sin(3 * position), velocity.square() / 2
    at_flag = 0.0025 / 3 * math.sin(3 * 0.5)
    return SCALE * (potential + kinetic - at_flag) / (2 * at_flag)


SCALE = 100.0
"""In steps: how many are saved, about, by having the energy of the flag."""
ENERGY = rl.PotentialShaping(energy)


def train(seeds: int = 8, steps: int = 200_000, task: str = "MountainCar-v0") -> dict:
    """Train `seeds` learners at once; returns their state."""
    settings = dataclasses.replace(rl.preset("ppo", task), rewards=(ENERGY,))
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    gamma = state["params"]["hyper"]["gamma"].reshape(-1, 1, 1)
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        state, rollout = collect(agent, state, world, settings.num_steps)

        # F = gamma Phi(s') - Phi(s); a terminal state has no potential
        after = energy(rollout["next_observation"]).masked_fill(rollout["terminated"], 0.0)
        shaping = gamma * after - energy(rollout["observation"])
        reward = agent.scale_reward(state, rollout, rollout["reward"] + shaping)

        state, _ = agent.update(state, rollout, {"task": reward})
        state = agent.end_iteration(state, rollout)
    return state


def main(seeds: int = 8, steps: int = 200_000) -> None:
    """Train, evaluate the final parameters by the task's own reward, print every seed's mean return."""
    state = train(seeds, steps)
    world = rl.task("MountainCar-v0").world((seeds,), 64)
    agent = rl.preset("ppo", "MountainCar-v0").bind(world.observation_space, world.action_space)
    print(agent.evaluate(state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
