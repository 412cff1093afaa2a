"""DQN with its loop in sight: act, remember, learn.

The same as `rl.train(rl.preset("dqn", task), task)`, bit for bit.

python agents/dqn.py --task CartPole-v1 --seeds 8 --steps 50000
"""

import math

import torch
import tyro

import rlmeta as rl
from rlmeta.agents.dqn import AVERAGE, TARGET
from rlmeta.functional import optim, random
from rlmeta.learning import replay
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.settings import hyper_tensors
from rlmeta.learning.step import step
from rlmeta.learning.targets import follow


def train(task: str = "CartPole-v1", seeds: int = 8, steps: int = 50_000) -> dict:
    """Train `seeds` learners at once; returns their state."""
    settings = rl.preset("dqn", task)
    world = rl.task(task).world((seeds,), settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys(range(seeds)), hyper_tensors([settings], seeds), world)
    iterations = math.ceil(steps / (settings.num_envs * settings.num_steps))

    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)

        # act
        state["params"]["hyper"]["epsilon"] = agent.epsilon(state)
        state, rollout = collect(agent, state, world, settings.num_steps)

        # remember
        state["replay"] = replay.insert(state["replay"], rollout, rollout["reward"], 1)

        # learn
        h, end = state["params"]["hyper"], (i + 1) * settings.num_steps
        if end * settings.num_envs >= max(settings.learning_starts, settings.n_steps * settings.num_envs):
            optimizer = optim.adam(agent.annealed(state))
            for _ in range(settings.gradient_steps):
                key = random.fold(state["key"], state["count"]["gradient_steps"])
                batch = replay.sample(state["replay"], key, settings.batch_size, h["gamma"], settings.n_steps)
                state, _ = step(agent, state, batch, optimizer, max_grad_norm=h["max_grad_norm"], key=key)
                if int(state["count"]["gradient_steps"].max()) % settings.target_every == 0:
                    follow(state, TARGET, h["target_rate"])
            if agent.averaged:
                follow(state, AVERAGE, h["average_rate"])
        state = agent.end_iteration(state, rollout)
    return state


def main(task: str = "CartPole-v1", seeds: int = 8, steps: int = 50_000) -> None:
    """Train, evaluate the final parameters, print every seed's mean return."""
    state = train(task, seeds, steps)
    world = rl.task(task).world((seeds,), 64)
    agent = rl.preset("dqn", task).bind(world.observation_space, world.action_space)
    print(evaluate(agent, state["params"], world, state["key"], 64).returns.mean(-1))


if __name__ == "__main__":
    tyro.cli(main)
