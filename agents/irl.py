"""Maximum causal entropy IRL with its loop in sight: plan, count visits, pay where the demonstrator was more often.

The same as `rl.train(IRL(demonstrations, ...), task)`, bit for bit.

rlmeta record RUN --sampled --out FILE
python agents/irl.py --demonstrations FILE --task GridWorld-v0 --seeds 1 --steps 400
"""

import dataclasses
import math

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import optim, random
from rlmeta.functional.packed import Packed
from rlmeta.imitation.behaviour_cloning import count_steps
from rlmeta.learning.settings import hyper_tensors


def train(demonstrations: str, task: str = "GridWorld-v0", seeds: int = 1, steps: int = 400) -> dict:
    """Find `seeds` rewards at once; returns their state."""
    settings = dataclasses.replace(rl.preset("irl", task), demonstrations=demonstrations)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / settings.num_steps)
    adam = optim.adam(state["params"]["hyper"]["learning_rate"])

    for _ in range(iterations):
        for _ in range(settings.num_steps):
            weights = Packed.of(state["params"]["weights"], 1)
            theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            reward = agent.reward({**state["params"], "weights": theta})  # [seeds, S]

            # plan the soft policy of this reward, and count what it visits
            with torch.no_grad():
                visits = agent.policy_visits(agent.plan(reward))

            # the likelihood's gradient: what the demonstrator visits more often pays more
            loss = ((visits - agent.visits) * reward).sum()
            gradient = torch.autograd.grad(loss, list(theta.values()))
            flat = torch.cat([g.reshape(seeds, -1) for g in gradient], -1)
            before = {"weights": weights.flat}
            moved, state["optimizer"]["all"] = adam.update({"weights": flat}, state["optimizer"]["all"], before)
            state["params"]["weights"] = Packed.view(weights.flat + moved["weights"], weights, 1)
        state = count_steps(state, settings.num_steps)
    return state


def main(demonstrations: str, task: str = "GridWorld-v0", seeds: int = 1, steps: int = 400) -> None:
    """Train, print the reward of every state and what its policy earns in the task itself."""
    state = train(demonstrations, task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    settings = dataclasses.replace(rl.preset("irl", task), demonstrations=demonstrations)
    agent = settings.bind(world.observation_space, world.action_space)
    agent.init(state["key"], state["params"]["hyper"], world)
    print(agent.reward(state["params"]))
    print(agent.evaluate(state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
