"""A module whose `forward` was replaced on the instance: lifted with the new one, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from rlmeta.errors import SettingError
from rlmeta.nn import apply, lift
from rlmeta.nn.lifted import recordable


def _standardised(self, x):
    return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    module.forward = forward  # type: ignore[method-assign]
    return module


def _bound(module: nn.Module) -> nn.Module:
    return _with_forward(module, MethodType(_standardised, module))


@pytest.mark.parametrize(
    "module",
    [
        _bound(nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), _bound(nn.Linear(3, 3)), nn.Tanh()),
        nn.Sequential(nn.Linear(3, 3), _with_forward(nn.Tanh(), lambda x: x * 2)),
        nn.Sequential(nn.Linear(3, 3), _with_forward(nn.LayerNorm(3), lambda x: x * 2)),
        nn.Sequential(nn.Linear(3, 3), _with_forward(nn.Dropout(), functools.partial(torch.mul, 3.0))),
        _with_forward(nn.Sequential(nn.Linear(3, 3)), lambda x: x * 2),
    ],
)
def test_a_forward_that_was_replaced_is_the_one_that_runs(module):
    x = torch.randn(4, 3)
    block = lift(module)
    learners = {name: torch.stack((value.detach(), 0.5 * value.detach())) for name, value in block.named_parameters()}
    for i in range(2):
        with torch.no_grad():
            for name, value in module.named_parameters():
                value.copy_(learners[name][i])
        assert torch.allclose(apply(block, learners, x.expand(2, 4, 3))[i], module(x), atol=1e-6)


def test_a_replaced_forward_that_holds_the_modules_tensors_is_refused():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    plain, eye = module.forward, torch.eye(3)
    linear = nn.Linear(3, 3)
    for forward in (lambda x: x + plain(x), lambda x: x @ eye, functools.partial(nn.functional.linear, weight=eye)):
        with pytest.raises(SettingError, match="in the place of its forward holds"):
            lift(_with_forward(linear, forward))


def test_a_partial_of_the_users_is_no_function_of_torchs():
    linear = nn.Linear(3, 3)
    assert recordable(linear)
    assert not recordable(_with_forward(linear, functools.partial(_standardised, linear)))
    assert recordable(nn.TransformerEncoderLayer(4, 2))
