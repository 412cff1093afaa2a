"""PackNet along a stream with its loop in sight: learn with the free weights, prune, learn again, keep.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.PackNet(keep)])`, bit for bit.

python agents/packnet.py --name split-digits --seeds 5
"""

import math
from functools import partial

import torch
import tyro

import rlmeta as rl
from rlmeta.lab.experiment import Experiment
from rlmeta.lab.stages import evaluate_tasks, turn_to
from rlmeta.learning.step import reset_optimizer, step


def train(name: str = "split-digits", keep: float = 0.0, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state and the accuracies."""
    settings, stream, packnet = rl.preset("classifier", name), rl.stream(name), rl.PackNet(keep)
    experiment = Experiment((settings,), tuple(range(seeds)), stream, methods=(packnet,))
    world, tests, order = experiment.world(), experiment.world(1), experiment.orders
    learner = experiment.bind(world)
    state = learner.init(experiment.keys(), experiment.hyper(), world)
    iterations = math.ceil(steps / (settings.batch_size * settings.num_steps))
    accuracy = torch.zeros(seeds, len(stream), len(stream), dtype=torch.float64)

    for task in range(len(stream)):
        # begin the task: the weights that are still free take part again
        state = turn_to(learner, state, world, order, task)
        given = (learner, state["params"], state["methods"]["packnet"], state["task"])
        state["params"], state["methods"]["packnet"] = packnet.task_start(*given)

        # learn with the free weights; give the smallest back and learn again with those that are left
        for phase, count in [("train", iterations), *packnet.phases(iterations)]:
            given = (learner, state["params"], state["methods"]["packnet"], state["task"])
            state["params"], state["methods"]["packnet"] = packnet.phase_start(*given, phase)
            state = reset_optimizer(state)
            for i in range(count):
                state["progress"] = torch.full((seeds,), i / count, dtype=torch.float64)
                state["task"] = {**state["task"], "progress": state["progress"]}
                optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
                for _ in range(settings.num_steps):
                    state["world"], batch = world.next_batch(state["world"])
                    state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[packnet])

        # keep: the task's weights are its own from now on
        given = (learner, state["params"], state["methods"]["packnet"], state["task"])
        draw = partial(learner.draw, state, world)
        state["params"], state["methods"]["packnet"] = packnet.task_end(*given, draw)

        # what is left of the others, each seen through its own mask
        found = evaluate_tasks(learner, state, tests, order, state["key"], 1)
        accuracy[:, task] = torch.cat([one.returns for one in found], -1)
    return {"state": state, "accuracy": accuracy}


def main(name: str = "split-digits", keep: float = 0.0, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, keep, seeds, steps)["accuracy"].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
