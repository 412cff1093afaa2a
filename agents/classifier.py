"""A classifier along a stream of tasks with its loop in sight: turn to the task, learn, see what is left of the others.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name))`, bit for bit.

python agents/classifier.py --name split-digits --scenario class --seeds 5
"""

import math
from typing import Literal

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step


def train(name: str = "split-digits", scenario: str = "task", seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state and the accuracies."""
    settings, stream = rl.preset("classifier", name), rl.stream(name, scenario=scenario)
    world, tests = stream.world((seeds,), settings.batch_size), stream.world((seeds,), 1)
    learner = settings.bind(world.observation_space, world.action_space)
    state = learner.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / (settings.batch_size * settings.num_steps))
    accuracy = torch.zeros(seeds, len(stream), len(stream), dtype=torch.float64, device=state["key"].device)

    for task in range(len(stream)):
        # turn to the task
        world.select(torch.full_like(state["key"], task))
        key = random.fold(state["key"], "world")
        state = learner.begin_task(state, world, random.fold(key, task) if task else key)
        state = reset_optimizer(state)

        # learn
        for i in range(iterations):
            state["progress"] = torch.full_like(state["progress"], i / iterations)
            optimizer = learner.optimizer(state)
            for _ in range(settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(
                    learner, state, batch, optimizer, max_grad_norm=state["params"]["hyper"]["max_grad_norm"]
                )

        # what is left of the others
        for other in range(len(stream)):
            tests.select(torch.full_like(state["key"], other))
            accuracy[:, task, other] = learner.evaluate(state["params"], tests, state["key"]).returns.mean(-1)
    return {"state": state, "accuracy": accuracy}


def main(
    name: str = "split-digits",
    scenario: Literal["task", "domain", "class"] = "task",
    seeds: int = 5,
    steps: int = 12_800,
) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, scenario, seeds, steps)["accuracy"].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
