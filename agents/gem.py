"""Gradient episodic memory along a stream with its loop in sight: learn, but never against what is remembered.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.GEM(memory)])`, bit for bit.

python agents/gem.py --name split-digits --memory 50 --seeds 5
"""

from functools import partial

import torch
import tyro

import rlmeta as rl
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.step import step
from rlmeta.lifelong.recall import draw_memories, put_memories
from rlmeta.runs.stages import score_tasks, turn_to
from rlmeta.runs.train import prepare


def train(name: str = "split-digits", memory: int = 50, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state, `matrix` included."""
    gem = rl.GEM(memory)
    run = prepare(rl.preset("classifier", name), rl.stream(name), rl.Budget(steps), seeds=seeds, lifelong=[gem])
    learner, world, state = run.agent, run.world, run.state
    tests, stream, order = run.evaluation_world(1), run.stream, run.experiment.orders

    for stage in run.stages:  # one for every task
        state = reset_optimizer(turn_to(learner, state, world, stream, order, stage.position))

        # learn: the step projects the gradient so that no remembered task's loss rises
        for i in range(stage.first, stage.last):
            state["progress"] = torch.full_like(state["progress"], stage.progress(i))
            state["task"] = {**state["task"], "progress": state["progress"]}
            optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
            for _ in range(learner.settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[gem])

        # remember some samples of the task
        kept = draw_memories(learner, state["params"], partial(learner.draw, state, world), memory, 1)
        of_gem = state["methods"]["gem"]
        samples = put_memories(of_gem["samples"], stage.position, kept, 1)
        state["methods"] = {"gem": {**of_gem, "samples": samples}}

        # what is left of the others
        state["matrix"][:, stage.position + 1] = score_tasks(learner, state, tests, stream, order, state["key"], 1)
    return state


def main(name: str = "split-digits", memory: int = 50, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, memory, seeds, steps)["matrix"][:, 1:].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
