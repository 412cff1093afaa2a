"""Elastic weight consolidation along a stream with its loop in sight: learn, held by a spring; then stiffen the spring.

The same as `rl.train(rl.preset("classifier", name), rl.stream(name), lifelong=[rl.EWC(strength)])`, bit for bit.

python agents/ewc.py --name split-digits --strength 1000 --seeds 5
"""

import torch
import tyro

import rlmeta as rl
from rlmeta.functional import random
from rlmeta.functional.packed import Packed
from rlmeta.functional.quadratics import add_quadratic
from rlmeta.learning.optimizer_state import reset_optimizer
from rlmeta.learning.step import step
from rlmeta.lifelong.ewc import information
from rlmeta.runs.stages import score_tasks, turn_to
from rlmeta.runs.train import prepare


def train(name: str = "split-digits", strength: float = 1000.0, seeds: int = 5, steps: int = 12_800) -> dict:
    """Train `seeds` learners at once on `steps` samples of every task; returns their state, `matrix` included."""
    ewc = rl.EWC(strength)
    run = prepare(rl.preset("classifier", name), rl.stream(name), rl.Budget(steps), seeds=seeds, lifelong=[ewc])
    learner, world, state = run.agent, run.world, run.state
    tests, stream, order = run.evaluation_world(1), run.stream, run.experiment.orders

    for stage in run.stages:  # one for every task
        state = reset_optimizer(turn_to(learner, state, world, stream, order, stage.position))

        # learn: the step adds the spring's pull, strength * precision * (weights - centre)
        for i in range(stage.first, stage.last):
            state["progress"] = torch.full_like(state["progress"], stage.progress(i))
            state["task"] = {**state["task"], "progress": state["progress"]}
            optimizer, clip = learner.optimizer(state), state["params"]["hyper"]["max_grad_norm"]
            for _ in range(learner.settings.num_steps):
                state["world"], batch = world.next_batch(state["world"])
                state, _ = step(learner, state, batch, optimizer, max_grad_norm=clip, methods=[ewc])

        # consolidate: what the task needs of every weight joins the spring
        p, memory = state["params"], state["methods"]["ewc"]
        samples = learner.draw(state, world, ewc.samples)
        fisher = information(learner, p, samples, 1, ewc.fisher, random.fold(memory["key"], stage.position))
        spring = add_quadratic(memory["quadratic"], fisher, Packed.of(p["weights"], 1).flat)
        state["methods"] = {"ewc": {**memory, "quadratic": spring}}

        # what is left of the others
        state["matrix"][:, stage.position + 1] = score_tasks(learner, state, tests, stream, order, state["key"], 1)
    return state


def main(name: str = "split-digits", strength: float = 1000.0, seeds: int = 5, steps: int = 12_800) -> None:
    """Train, print the mean accuracy on every task (columns) after training on each (rows)."""
    print(train(name, strength, seeds, steps)["matrix"][:, 1:].mean(0))


if __name__ == "__main__":
    tyro.cli(main)
