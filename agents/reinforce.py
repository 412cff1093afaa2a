"""REINFORCE with its loop in sight: act, credit, learn.

The same as `rl.train(rl.preset("reinforce", task), task)`, bit for bit.

python agents/reinforce.py --task CartPole-v1 --seeds 8 --steps 500000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import optim, random
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.minibatch import flatten_time
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 500_000) -> dict:
    """Train `seeds` learners at once; returns their state."""
    settings = rl.preset("reinforce", task)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        p = state["params"]

        # act
        state, rollout = collect(agent, state, world, settings.num_steps)

        # credit
        rewards = {"task": agent.scale_reward(state, rollout, rollout["reward"])}
        batch = flatten_time(agent.credit(p, rollout, rewards), 1)

        # learn
        rate = agent.annealed(state)
        optimizer = optim.adam(rate)
        state, _ = step(agent, state, batch, optimizer, max_grad_norm=p["hyper"]["max_grad_norm"])
        state = agent.end_iteration(state, rollout)
    return state


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 500_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    agent = rl.preset("reinforce", task).bind(world.observation_space, world.action_space)
    print(evaluate(agent, state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
