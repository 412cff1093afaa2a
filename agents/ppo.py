"""PPO with its loop in sight: act, credit, learn.

The same as `rl.train(rl.preset("ppo", task), task)`, bit for bit.

python agents/ppo.py --task CartPole-v1 --seeds 8 --steps 100000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.engine.parts import in_parts
from rlmeta.functional import optim, random
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.minibatch import flatten_time, minibatches
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 100_000) -> dict:
    """Train `seeds` learners at once; returns their state."""
    settings = rl.preset("ppo", task)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    def learn(state, rollout, rewards):
        p = state["params"]

        # credit
        batch = flatten_time(agent.credit(p, rollout, rewards), 1)
        del batch["valid"]  # no row of a native task is ever a mere reset

        # learn
        rate, clip_range = agent.annealed(state)
        optimizer = optim.adam(rate, eps=settings.adam_epsilon)
        for epoch in range(settings.num_epochs):
            counter = state["count"]["iterations"] * settings.num_epochs + epoch
            for minibatch in minibatches(state["key"], counter, batch, settings.batch_size):
                minibatch["clip_range"] = clip_range
                state, _ = step(agent, state, minibatch, optimizer, max_grad_norm=p["hyper"]["max_grad_norm"])
        return state

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)

        # act
        state, rollout = collect(agent, state, world, settings.num_steps)

        # some of the learners on every core
        rewards = {"task": agent.scale_reward(state, rollout, rollout["reward"])}
        state = in_parts(learn, state, rollout, rewards)
        state = agent.end_iteration(state, rollout)
    return state


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 100_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    agent = rl.preset("ppo", task).bind(world.observation_space, world.action_space)
    print(evaluate(agent, state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
