"""A learned optimizer with its loop in sight: unroll it on many problems, move it by truncated backpropagation.

The same as `rl.train(rl.preset("learned_optimizer", family), family)`, bit for bit.

python agents/learned_optimizer.py --family quadratics --seeds 2 --steps 320000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.envs.kinds import problem_of
from rlmeta.functional import optim, random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.state import select
from rlmeta.meta.adapt import adapt


def train(family: str = "quadratics", seeds: int = 2, steps: int = 320_000) -> dict:
    """Meta-train `seeds` optimizers at once, each on many problems; returns their state."""
    settings = rl.preset("learned_optimizer", family)
    world = problem_of(family, "LearnedOptimizer", True).world((seeds,), settings.num_envs)
    learner = settings.bind(world.observation_space, world.action_space)
    state = learner.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations, bound = math.ceil(steps / (settings.num_envs * settings.unroll)), settings.max_grad_norm

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        state["count"]["iterations"] = torch.full_like(state["key"], i)
        carry = state["params"]["buffers"]["carry"]

        # new problems for those that are through
        carry = select(carry["age"] >= settings.horizon, learner.fresh(state, world), carry)

        # unroll: the optimizer on all problems, [seeds, problems]
        weights = Packed.of(state["params"]["weights"], 1)
        theta = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

        def loss(w, step, carry=carry):
            return world.family.loss(w, carry["problem"], carry["age"] + step)

        learned = learner.learned({"weights": theta})
        found = adapt(loss, carry["weights"], learned, settings.unroll, order="first", state=carry["memory"])
        after = [*found.losses[1:], loss(found.weights, settings.unroll)]
        mean = torch.stack(after).mean(0).mean(-1)
        gradient = torch.autograd.grad(mean, list(theta.values()), torch.ones_like(mean))

        # learn
        flat = torch.cat([g.reshape(seeds, -1) for g in gradient], -1)
        clipped, _ = optim.clip_by_norm({"weights": flat}, bound, 1)
        optimizer, before = learner.optimizer(state), {"weights": weights.flat}
        moved, state["optimizer"]["all"] = optimizer.update(clipped, state["optimizer"]["all"], before)
        state["params"]["weights"] = Packed.view(weights.flat + moved["weights"], weights, 1)
        end = {"weights": found.weights, "memory": found.state, "age": carry["age"] + settings.unroll}
        carry = tree.map(torch.Tensor.detach, {"problem": carry["problem"], **end})
        state["params"]["buffers"] = {"carry": carry}
    return state


def main(family: str = "quadratics", seeds: int = 2, steps: int = 320_000) -> None:
    """Meta-train, minimise 256 held-out problems, print the mean loss after 0, 20, ... 100 steps."""
    state, settings = train(family, seeds, steps), rl.preset("learned_optimizer", family)
    world = problem_of(family, "LearnedOptimizer", True).world((seeds,), settings.num_envs)
    learner = settings.bind(world.observation_space, world.action_space)
    print(learner.adaptation(state["params"], world, state["key"], 256, 100)[..., ::20].mean(1))


if __name__ == "__main__":
    tyro.cli(main)
