"""Gradient episodic memory along a stream with its loop in sight: learn, but never against what is remembered.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.GEM(memory)])`, bit for bit.

python agents/gem.py --name split-digits --memory 50 --seeds 5
"""

import math
from functools import partial

import torch
import tyro

import rlmeta as rl
from rlmeta.lab.experiment import Experiment
from rlmeta.lab.stages import evaluate_tasks, turn_to
from rlmeta.learning.step import reset_optimizer, step
from rlmeta.lifelong.recall import draw_memories, put_memories


def train(name: str = "split-digits", memory: int = 50, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state and the accuracies."""
    settings, stream, gem = rl.preset("classifier", name), rl.stream(name), rl.GEM(memory)
    experiment = Experiment((settings,), tuple(range(seeds)), stream, methods=(gem,))
    world, tests, order = experiment.world(), experiment.world(1), experiment.orders
    learner = experiment.bind(world)
    state = learner.init(experiment.keys(), experiment.hyper(), world)
    iterations = math.ceil(steps / (settings.batch_size * settings.num_steps))
    accuracy = torch.zeros(seeds, len(stream), len(stream), dtype=torch.float64)

    for task in range(len(stream)):
        state = reset_optimizer(turn_to(learner, state, world, order, task))

        # learn: the step projects the gradient so that no remembered task's loss rises
        for i in range(iterations):
            state["progress"] = torch.full((seeds,), i / iterations, dtype=torch.float64)
            state["task"] = {**state["task"], "progress": state["progress"]}
            optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
            for _ in range(settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[gem])

        # remember some samples of the task
        kept = draw_memories(learner, state["params"], partial(learner.draw, state, world), memory, 1)
        of_gem = state["methods"]["gem"]
        state["methods"] = {"gem": {**of_gem, "samples": put_memories(of_gem["samples"], task, kept, 1)}}

        # what is left of the others
        found = evaluate_tasks(learner, state, tests, order, state["key"], 1)
        accuracy[:, task] = torch.cat([one.returns for one in found], -1)
    return {"state": state, "accuracy": accuracy}


def main(name: str = "split-digits", memory: int = 50, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, memory, seeds, steps)["accuracy"].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
