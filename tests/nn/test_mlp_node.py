"""The layers of an MLP as one autograd node: first and second derivatives, and torch.func's transforms."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional.random import make_keys
from rlmeta.nn import MLP, apply, stack


def stacked(activation):
    def make():
        return MLP(3, (4, 4), 2, activation=activation)

    built = stack(make, make_keys([0, 1]))
    params = {n: (v.double() + 0.1 * torch.randn(v.shape).double()).requires_grad_() for n, v in built.items()}
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    return make(), params, x


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
def test_first_and_second_derivatives(activation):
    torch.manual_seed(0)
    block, params, x = stacked(activation)

    def run(x, *weights):
        return apply(block, dict(zip(params, weights)), x)

    assert torch.autograd.gradcheck(run, (x, *params.values()))
    assert torch.autograd.gradgradcheck(run, (x, *params.values()))


def test_function_transforms_agree_with_autograd():
    torch.manual_seed(0)
    block, params, x = stacked("tanh")
    loss = apply(block, params, x).square().sum()
    expected = torch.autograd.grad(loss, list(params.values()))
    plain = {name: value.detach() for name, value in params.items()}
    gradients = torch.func.grad(lambda p: apply(block, p, x.detach()).square().sum())(plain)
    for name, value in zip(params, expected):
        torch.testing.assert_close(gradients[name], value)
