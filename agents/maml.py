"""MAML with its loop in sight: adapt to every task, ask, move the initial weights.

The same as `rl.train(rl.preset("maml", family), family)`, bit for bit.

python agents/maml.py --family sinusoid --seeds 4 --steps 75000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.kinds import problem_of
from rlmeta.functional import optim, random
from rlmeta.functional.packed import Packed
from rlmeta.learning.settings import hyper_tensors
from rlmeta.meta.adapt import adapt, expand_tasks


def train(family: str = "sinusoid", seeds: int = 4, steps: int = 75_000) -> dict:
    """Meta-train `seeds` learners at once; returns their state."""
    settings = rl.preset("maml", family)
    problem: NamedFamily = problem_of(family, "MAML", True)
    world = problem.world((seeds,), settings.num_envs)
    maml = settings.bind(world.observation_space, world.action_space)
    state = maml.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations, hyper = math.ceil(steps / settings.num_envs), state["params"]["hyper"]
    inner = optim.sgd(hyper["inner_rate"].unsqueeze(-1).expand(seeds, settings.num_envs))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        tasks = world.tasks(state["key"], torch.full_like(state["key"], i), settings.num_envs, "train")
        weights = Packed.of(state["params"]["weights"], 1)
        theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

        p = maml.start(state["params"], settings.num_envs)

        def loss(weights, part, tasks=tasks, p=p):
            return maml.loss({**p, "weights": weights}, tasks[part])

        # adapt: every task is a learner of its own, [seeds, tasks]
        started = expand_tasks(theta, 1, settings.num_envs)
        adapted = adapt(lambda weights, _, loss=loss: loss(weights, "support"), started, inner, settings.inner_steps)

        # ask: the gradient goes back through the adaptation
        query = loss(adapted.weights, "query").mean(-1)
        gradient = torch.autograd.grad(query, list(theta.values()), torch.ones_like(query))

        # learn
        flat = torch.cat([g.reshape(seeds, -1) for g in gradient], -1)
        clipped, _ = optim.clip_by_norm({"weights": flat}, hyper["max_grad_norm"], 1)
        moments, before = state["optimizer"]["all"], {"weights": weights.flat}
        moved, state["optimizer"]["all"] = maml.optimizer(state).update(clipped, moments, before)
        state["params"]["weights"] = Packed.view(weights.flat + moved["weights"], weights, 1)
    return state


def main(family: str = "sinusoid", seeds: int = 4, steps: int = 75_000) -> None:
    """Meta-train, adapt to 600 held-out tasks, print the mean score against the inner steps."""
    state, settings = train(family, seeds, steps), rl.preset("maml", family)
    world = problem_of(family, "MAML", True).world((seeds,), settings.num_envs)
    maml = settings.bind(world.observation_space, world.action_space)
    print(maml.adaptation(state["params"], world, state["key"], 600, 10).mean(1))


if __name__ == "__main__":
    tyro.cli(main)
