"""What is REINFORCE's own: a baseline from the batch, and a surrogate that may be differentiated twice."""

from __future__ import annotations

import pytest
import torch

from rlmeta.agents import REINFORCE
from rlmeta.envs.native import NativeWorld, Navigation
from rlmeta.errors import SettingError
from rlmeta.functional import losses, random
from rlmeta.learning.collect import collect
from rlmeta.learning.settings import hyper_tensors


def test_the_batch_is_a_baseline_that_leaves_each_row_out():
    plain = REINFORCE(num_envs=3, num_steps=100, baseline="none", hidden_sizes=(4,))
    world = NativeWorld(Navigation(), (3,), 3)
    agent = plain.bind(world.observation_space, world.action_space)
    state = agent.init(random.make_keys([0, 1, 2]), hyper_tensors([plain], 3), world)
    state, rollout = collect(agent, state, world, 100)
    reward = {"task": rollout["reward"]}
    returns = agent.credit(state["params"], rollout, reward)["credit"]
    settings = REINFORCE(num_envs=3, num_steps=100, baseline="batch", hidden_sizes=(4,))
    found = settings.bind(world.observation_space, world.action_space).credit(state["params"], rollout, reward)
    for row in range(3):
        others = returns[..., [i for i in range(3) if i != row]].mean(-1)
        torch.testing.assert_close(found["credit"][..., row], returns[..., row] - others, rtol=1e-4, atol=1e-4)
    assert "value" not in settings.bind(world.observation_space, world.action_space).networks()
    with pytest.raises(SettingError, match="num_envs of 2 or more"):
        REINFORCE(num_envs=1, baseline="batch")


def test_the_surrogates_gradient_is_the_plain_ones_bit_for_bit_and_its_hessian_has_the_second_term():
    """For a softmax of two actions with all probabilities as weights, it is the true Hessian of the expected reward."""
    logits = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weight = logits.softmax(-1).detach()

    def surrogate(function, logits):
        return function(logits.log_softmax(-1), reward, weight)

    first = [
        torch.autograd.grad(surrogate(function, logits), logits)[0]
        for function in (losses.policy_gradient_loss, losses.twice_differentiable_policy_gradient_loss)
    ]
    assert torch.equal(*first)
    hessian = torch.autograd.functional.hessian
    true = hessian(lambda x: -(x.softmax(-1) * reward).sum(), logits.detach())
    found = hessian(lambda x: surrogate(losses.twice_differentiable_policy_gradient_loss, x), logits.detach())
    torch.testing.assert_close(found, true)
    plain = hessian(lambda x: surrogate(losses.policy_gradient_loss, x), logits.detach())
    assert not torch.allclose(plain, true, atol=1e-2)
