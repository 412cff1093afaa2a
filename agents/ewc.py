"""Elastic weight consolidation along a stream with its loop in sight: learn, held by a spring; then stiffen the spring.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.EWC(strength)])`, bit for bit.

python agents/ewc.py --name split-digits --strength 1000 --seeds 5
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.lab.experiment import Experiment
from rlmeta.lab.stages import evaluate_tasks, turn_to
from rlmeta.learning.state import Packed
from rlmeta.learning.step import reset_optimizer, step
from rlmeta.lifelong.ewc import add_quadratic, information


def train(name: str = "split-digits", strength: float = 1000.0, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state and the accuracies."""
    settings, stream, ewc = rl.preset("classifier", name), rl.stream(name), rl.EWC(strength)
    experiment = Experiment((settings,), tuple(range(seeds)), stream, methods=(ewc,))
    world, tests, order = experiment.world(), experiment.world(1), experiment.orders
    learner = experiment.bind(world)
    state = learner.init(experiment.keys(), experiment.hyper(), world)
    iterations = math.ceil(steps / (settings.batch_size * settings.num_steps))
    accuracy = torch.zeros(seeds, len(stream), len(stream), dtype=torch.float64)

    for task in range(len(stream)):
        state = reset_optimizer(turn_to(learner, state, world, order, task))

        # learn: the step adds the spring's pull, strength * precision * (weights - centre)
        for i in range(iterations):
            state["progress"] = torch.full((seeds,), i / iterations, dtype=torch.float64)
            state["task"] = {**state["task"], "progress": state["progress"]}
            optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
            for _ in range(settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[ewc])

        # consolidate: what the task needs of every weight joins the spring
        p, memory = state["params"], state["methods"]["ewc"]
        samples = learner.draw(state, world, ewc.samples)
        fisher = information(learner, p, samples, 1, ewc.fisher, random.fold(memory["key"], task))
        spring = add_quadratic(memory["quadratic"], fisher, Packed.of(p["weights"], 1).flat)
        state["methods"] = {"ewc": {**memory, "quadratic": spring}}

        # what is left of the others
        found = evaluate_tasks(learner, state, tests, order, state["key"], 1)
        accuracy[:, task] = torch.cat([one.returns for one in found], -1)
    return {"state": state, "accuracy": accuracy}


def main(name: str = "split-digits", strength: float = 1000.0, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, strength, seeds, steps)["accuracy"].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
