"""Behaviour cloning with its loop in sight: draw demonstrated steps, make their actions more likely.

The same as `rl.train(BehaviourCloning(demonstrations, ...), task)`, bit for bit.

rlmeta record RUN --out FILE
python agents/behaviour_cloning.py --demonstrations FILE --task CartPole-v1 --seeds 8 --steps 2000
"""

import dataclasses
import math

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import optim, random
from rlmeta.imitation.behaviour_cloning import count_steps, draw
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step


def train(demonstrations: str, task: str = "CartPole-v1", seeds: int = 8, steps: int = 2_000) -> dict:
    """Train `seeds` imitators at once; returns their state."""
    settings = dataclasses.replace(rl.preset("behaviour_cloning", task), demonstrations=demonstrations)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    hyper, iterations = state["params"]["hyper"], math.ceil(steps / settings.num_steps)

    for i in range(iterations):
        rate = hyper["learning_rate"] * (1 - i / iterations)
        optimizer = optim.adamw(rate, weight_decay=hyper["weight_decay"])
        for k in range(settings.num_steps):
            batch = draw(agent.transitions, state["key"], i * settings.num_steps + k, settings.batch_size)
            state, _ = step(agent, state, batch, optimizer, max_grad_norm=hyper["max_grad_norm"])
        state = count_steps(state, settings.num_steps)
    return state


def main(demonstrations: str, task: str = "CartPole-v1", seeds: int = 8, steps: int = 2_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(demonstrations, task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    settings = dataclasses.replace(rl.preset("behaviour_cloning", task), demonstrations=demonstrations)
    agent = settings.bind(world.observation_space, world.action_space)
    with torch.no_grad():
        print(agent.evaluate(state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
