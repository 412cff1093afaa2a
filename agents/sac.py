"""SAC with its loop in sight: act, remember, learn.

The same as `rl.train(rl.preset("sac", task), task)`, bit for bit.

python agents/sac.py --task Pendulum-v1 --seeds 8 --steps 20000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.agents.sac import TARGET
from rlmeta.functional import random
from rlmeta.learning import off_policy, replay
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step
from rlmeta.learning.targets import follow


def train(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> dict:
    """Train `seeds` learners at once; returns their state."""
    settings = rl.preset("sac", task)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)

        # act, at random at first
        state["params"]["hyper"]["warms_up"] = off_policy.warms_up(agent, state)
        state, rollout = collect(agent, state, world, settings.num_steps)

        # remember
        state["replay"] = replay.insert(state["replay"], rollout, rollout["reward"], 1)

        # learn
        h = state["params"]["hyper"]
        if off_policy.ready(agent, state):
            groups = agent.groups(state)
            for number in range(settings.gradient_steps):
                key = random.fold(state["key"], state["count"]["gradient_steps"])
                batch = replay.sample(state["replay"], key, settings.batch_size, h["gamma"])
                state, _ = step(agent, state, batch, groups[number % len(groups)], key=key)
                follow(state, TARGET, h["target_rate"])
        state = agent.end_iteration(state, rollout)
    return state


def main(task: str = "Pendulum-v1", seeds: int = 8, steps: int = 20_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    agent = rl.preset("sac", task).bind(world.observation_space, world.action_space)
    print(evaluate(agent, state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
