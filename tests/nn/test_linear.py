from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from rlmeta import nn
from rlmeta.errors import SettingError
from rlmeta.nn.linear import activation_function, linear
from tests.nn.learners import LEARNER_SHAPES, as_torch, assert_close, assert_equals_loop, data, keys, scattered


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 3), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch(learner_shape: tuple[int, ...], batch_shape: tuple[int, ...], bias: bool) -> None:
    block, reference = nn.Linear(3, 4, bias=bias), torch.nn.Linear(3, 4, bias=bias)
    params = scattered(nn.stack(lambda: reference, keys(*learner_shape)))
    x = data(*learner_shape, *batch_shape, 3)
    out = assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(reference), params, x, learner_shape)
    assert out.shape == (*learner_shape, *batch_shape, 4)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"),
    [
        ((3, 5), (4, 3)),
        ((2, 3), (3, 4, 3)),
        ((5, 3, 3), (3, 4, 3)),
        ((3,), (3, 4, 3)),
        ((), (4, 3)),
        ((3, 5, 3), (3, 2, 4, 3)),
    ],
)
def test_linear_refuses_other_shapes(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .* expected"):
        linear(data(*x_shape), data(*weight_shape), None)


def test_a_missing_bias_is_not_taken_for_none() -> None:
    params = {"weight": data(3, 4, 3)}
    with pytest.raises(KeyError, match="bias"):
        nn.apply(nn.Linear(3, 4), params, data(3, 2, 3))
    assert nn.apply(nn.Linear(3, 4, bias=False), params, data(3, 2, 3)).shape == (3, 2, 4)


def test_second_derivatives() -> None:
    block = nn.MLP(2, [3], 2)
    params = scattered(nn.stack(lambda: nn.MLP(2, [3], 2), keys(2)))
    names = list(params)
    inputs = [params[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(
        lambda x, *values: nn.apply(block, dict(zip(names, values)), x), [data(2, 2, 2).requires_grad_(), *inputs]
    )


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
def test_sequential_of_blocks_and_modules_equals_torch(learner_shape: tuple[int, ...]) -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(9, 4), torch.nn.ELU(), torch.nn.Sequential(torch.nn.Linear(4, 3))
        )

    reference = build()
    block = nn.Sequential(
        nn.Flatten(), nn.Linear(9, 4), nn.Activation("elu"), torch.nn.Sequential(torch.nn.Linear(4, 3))
    )
    params = scattered(nn.stack(build, keys(*learner_shape)))
    assert params.keys() == dict(block.state_dict()).keys()
    x = data(*learner_shape, 3, 3, 3)
    assert_equals_loop(lambda p, x: nn.apply(block, p, x), as_torch(reference), params, x, learner_shape)


def test_sequential_keeps_names() -> None:
    named = OrderedDict(body=torch.nn.Linear(3, 4), head=nn.Linear(4, 2))
    block = nn.Sequential(named)
    assert set(block.state_dict()) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    reference = torch.nn.Sequential(named)
    assert_close(block(torch.ones(2, 3)), reference(torch.ones(2, 3)))
    with pytest.raises(SettingError, match="expected modules"):
        nn.Sequential(nn.Linear(2, 2), torch.tanh)  # type: ignore[arg-type]


@pytest.mark.parametrize("learner_shape", LEARNER_SHAPES)
@pytest.mark.parametrize(("start", "end"), [(1, -1), (0, 1), (1, 2), (-2, -1)])
def test_flatten_counts_axes_as_one_learner_does(learner_shape: tuple[int, ...], start: int, end: int) -> None:
    x = data(*learner_shape, 3, 3, 3, 3)
    expected = torch.nn.Flatten(start, end)(data(3, 3, 3, 3)).shape
    ctx = nn.Context(learner_axes=len(learner_shape))
    out = nn.apply(nn.Flatten(start, end), {}, x, ctx)
    assert out.shape == (*learner_shape, *expected)
    by_key = nn.apply(nn.Flatten(start, end), {}, x, nn.Context(key=keys(*learner_shape)))
    assert torch.equal(out, by_key)


@pytest.mark.parametrize("name", ["tanh", "relu", "elu", "gelu", "silu", "sigmoid", "leaky_relu", "softplus"])
def test_activations_by_name(name: str) -> None:
    x = data(5)
    expected = getattr(torch.nn.functional, name)(x)
    assert torch.equal(activation_function(name)(x), expected)  # type: ignore[arg-type]
    assert torch.equal(nn.Activation(name)(x), expected)  # type: ignore[arg-type]
    assert activation_function(torch.cos) is torch.cos


def test_unknown_activation() -> None:
    with pytest.raises(SettingError, match="'tahn' is unknown, expected a function or one of tanh, relu"):
        activation_function("tahn")  # type: ignore[arg-type]
