"""GAIL with its loop in sight: act, tell the agent from the demonstrations, learn to be mistaken for them.

The same as `rl.train(GAIL(demonstrations, ...), task)`, bit for bit.

rlmeta record RUN --out FILE
python agents/gail.py --demonstrations FILE --task CartPole-fixed --seeds 8 --steps 200000
"""

import dataclasses
import math

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.learning.collect import collect
from rlmeta.learning.minibatch import flatten_time
from rlmeta.learning.settings import hyper_tensors


def train(demonstrations: str, task: str = "CartPole-fixed", seeds: int = 8, steps: int = 200_000) -> dict:
    """Train `seeds` imitators at once; returns their state."""
    settings = dataclasses.replace(rl.preset("gail", task), demonstrations=demonstrations)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)  # PPO, whose first reward is the discriminator
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    imitation, gamma = agent.rewards[0], state["params"]["hyper"]["gamma"]
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)

        # act
        state, rollout = collect(agent, state, world, settings.num_steps)

        # tell apart: 1 is demonstrated, 0 is the agent's
        seen = imitation.read(rollout)
        discriminator = state["rewards"][imitation.name]
        discriminator, _ = imitation.train(discriminator, flatten_time(seen, 1), imitation.hyper(state))
        state["rewards"] = {imitation.name: discriminator}

        # learn from -log(1 - D)
        with torch.no_grad():
            reward = imitation.judge(discriminator["params"], seen, gamma)
        state, _ = agent.update(state, rollout, {imitation.name: reward})
        state = agent.end_iteration(state, rollout)
    return state


def main(demonstrations: str, task: str = "CartPole-fixed", seeds: int = 8, steps: int = 200_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(demonstrations, task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    settings = dataclasses.replace(rl.preset("gail", task), demonstrations=demonstrations)
    agent = settings.bind(world.observation_space, world.action_space)
    print(agent.evaluate(state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
