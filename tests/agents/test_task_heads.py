"""A last layer for every task of a stream: apart in values and gradients, and refused where no task can be seen."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents.networks import value_network
from rlmeta.errors import SettingError
from rlmeta.nn import Context

TASKS = 3
SPACE = gym.spaces.Box(np.float32([-1, -1, 0, 0, 0]), np.float32([1, 1, 1, 1, 1]))
"""Two numbers and the task."""


def _observations(task: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(task)
    return torch.cat([torch.rand(4, 2, generator=generator), torch.eye(TASKS)[task].expand(4, TASKS)], -1)


@pytest.mark.parametrize("task", range(TASKS))
def test_every_task_has_a_last_layer_of_its_own(task):
    network = value_network(rl.PPO(), SPACE, tasks=TASKS)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in network.named_parameters()}
    x = _observations(task)
    value = network.run(weights, x, Context())
    features = network.body.body.run(weights, x, Context(), "body.body.")
    own = weights["head.linear.weight"].unflatten(-1, (TASKS, -1))[:, task]
    torch.testing.assert_close(value, (features @ own.mT + weights["head.linear.bias"]).squeeze(-1))
    value.sum().backward()
    reached = weights["head.linear.weight"].grad.unflatten(-1, (TASKS, -1)).abs().sum((0, 2)) > 0
    assert reached.tolist() == [place == task for place in range(TASKS)]


@pytest.mark.parametrize("share", [False, True])
def test_along_a_stream_every_task_trains_its_own_last_layer(share):
    stream = rl.stream("cartpole-conflicts")
    settings = rl.PPO(num_steps=32, batch_size=64, num_epochs=1, task_heads=4, share_network=share)
    run = rl.train(settings, stream, steps=512, seeds=2, progress=False)
    assert torch.isfinite(run.matrix[:, -1]).all()
    trained = run.state["params"]["weights"]["policy.head.linear.weight"]
    run.start()
    moved = (trained != run.state["params"]["weights"]["policy.head.linear.weight"]).unflatten(-1, (4, -1))
    assert moved.any(-1).all()


@pytest.mark.parametrize("space", [gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(4), gym.spaces.Box(0, 1, (2, 2))])
def test_without_a_task_in_sight_heads_are_refused(space):
    with pytest.raises(SettingError, match="do not end with a one-hot vector of 3 tasks: train on a stream"):
        rl.PPO(task_heads=3).bind(space, gym.spaces.Discrete(2))


def test_a_negative_number_of_heads_is_refused():
    with pytest.raises(SettingError, match="task_heads"):
        rl.PPO(task_heads=-1)
