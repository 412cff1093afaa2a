"""A last layer for every task of a stream: apart in values and gradients, and refused where no task can be seen."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents.networks import value_network
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.learner import initial_tensors
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
    features = network.body.run(weights, x, Context(), "body.")
    own = weights["head.linear.weight"].unflatten(-1, (TASKS, -1))[:, task]
    torch.testing.assert_close(value, (features @ own.mT + weights["head.linear.bias"]).squeeze(-1))
    value.sum().backward()
    reached = weights["head.linear.weight"].grad.unflatten(-1, (TASKS, -1)).abs().sum((0, 2)) > 0
    assert reached.tolist() == [place == task for place in range(TASKS)]


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("share", [False, True])
def test_along_a_stream_every_task_trains_its_own_last_layer(share, memory):
    stream = rl.stream("cartpole-conflicts")
    settings = rl.PPO(num_steps=32, batch_size=64, num_epochs=1, task_heads=4, share_network=share, memory=memory)
    run = rl.train(settings, stream, steps=512, seeds=2, progress=False)
    assert torch.isfinite(run.matrix[:, -1]).all()
    trained = run.state["params"]["weights"]["policy.head.linear.weight"]
    run.start()
    moved = (trained != run.state["params"]["weights"]["policy.head.linear.weight"]).unflatten(-1, (4, -1))
    assert moved.any(-1).all()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("memory", ["none", "gru"])
def test_policy_value_and_features_are_those_of_the_task_at_hand(share, memory):
    """Another task's last layers change nothing, one's own do."""
    actions = gym.spaces.Discrete(2)
    settings = rl.PPO(num_steps=2, batch_size=2, task_heads=TASKS, share_network=share, memory=memory, memory_size=5)
    agent = settings.bind(SPACE, actions)
    p = {"weights": initial_tensors(agent.networks, random.make_keys([0, 1])), "buffers": {}, "normalisers": {}}
    inputs = agent.blank((2,), torch.device("cpu"))["observation"]
    observation = inputs["observation"] if memory == "gru" else inputs
    shown = _observations(1)[0].expand(observation.shape)
    batch = {"observation": {**inputs, "observation": shown} if memory == "gru" else shown}
    features, logits = agent.features(p, batch, Context()), agent.distribution(p, batch, Context())["logits"]
    width = features.shape[-1] // TASKS
    assert features[..., :width].eq(0).all() and features[..., 2 * width :].eq(0).all() and features.ne(0).any()
    asked = agent.recurrence.time_first(batch["observation"]) if memory == "gru" else batch["observation"]
    value = agent._evaluate(p, asked, Context())[1]
    for task in range(TASKS):
        places = torch.zeros(TASKS, width)
        places[task] = 1.0
        changed = {n: w + places.flatten() if n.endswith("head.linear.weight") or n == "value.linear.weight" else w
                   for n, w in p["weights"].items()}  # fmt: skip
        other = {**p, "weights": changed}
        assert torch.equal(agent.distribution(other, batch, Context())["logits"], logits) == (task != 1)
        assert torch.equal(agent._evaluate(other, asked, Context())[1], value) == (task != 1)


@pytest.mark.parametrize("space", [gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(4), gym.spaces.Box(0, 1, (2, 2))])
def test_without_a_task_in_sight_heads_are_refused(space):
    with pytest.raises(SettingError, match="do not end with a one-hot vector of 3 tasks: train on a stream"):
        rl.PPO(task_heads=3).bind(space, gym.spaces.Discrete(2))


def test_a_whitened_observation_is_refused():
    with pytest.raises(SettingError, match="does not say which task it is"):
        rl.PPO(task_heads=2, normalise_observation=True)


def test_a_negative_number_of_heads_is_refused():
    with pytest.raises(SettingError, match="task_heads"):
        rl.PPO(task_heads=-1)
