"""PackNet along a stream with its loop in sight: learn with the free weights, prune, learn again, keep.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.PackNet(keep)])`, bit for bit.

python agents/packnet.py --name split-digits --seeds 5
"""

from functools import partial

import torch
import tyro

import rlmeta as rl
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.step import step
from rlmeta.runs.stages import score_tasks, turn_to
from rlmeta.runs.train import prepare


def train(name: str = "split-digits", keep: float = 0.0, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state, `matrix` included."""
    packnet = rl.PackNet(keep)
    run = prepare(rl.preset("classifier", name), rl.stream(name), rl.Budget(steps), seeds=seeds, lifelong=[packnet])
    learner, world, state = run.agent, run.world, run.state
    tests, stream, order = run.evaluation_world(1), run.stream, run.experiment.orders

    def given():
        return learner, state["params"], state["methods"]["packnet"], state["task"]

    for stage in run.stages:  # two for every task: "train" and "retrain"
        # a new task: the weights that are still free take part again
        if stage.begins_task:
            state = turn_to(learner, state, world, stream, order, stage.position)
            state["params"], state["methods"]["packnet"] = packnet.task_start(*given())

        # before the second training: give the smallest weights of the task back
        state["params"], state["methods"]["packnet"] = packnet.phase_start(*given(), stage.phase)

        # learn with the free weights, then with those that are left
        state = reset_optimizer(state)
        for i in range(stage.first, stage.last):
            state["progress"] = torch.full_like(state["progress"], stage.progress(i))
            state["task"] = {**state["task"], "progress": state["progress"]}
            optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
            for _ in range(learner.settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[packnet])

        # keep: the task's weights are its own from now on; what is left of the others, each seen through its own mask
        if stage.ends_task:
            draw = partial(learner.draw, state, world)
            state["params"], state["methods"]["packnet"] = packnet.task_end(*given(), draw)
            state["matrix"][:, stage.position + 1] = score_tasks(learner, state, tests, stream, order, state["key"], 1)
    return state


def main(name: str = "split-digits", keep: float = 0.0, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, keep, seeds, steps)["matrix"][:, 1:].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
