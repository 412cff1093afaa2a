"""Argument checks: equal shapes, and flags of bool or integers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlmeta.functional
from rlmeta.engine.capture import Capture
from rlmeta.errors import SettingError
from rlmeta.functional import axes, distributional, distributions, losses, normalise, random, returns
from rlmeta.functional.shapes import flags, same_shape

FLAGS = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])
X, Y, Z = random.normal(random.make_keys([0])[0], "x", 0, (3, 3, 3), torch.float64)
XY = torch.stack([X, Y], -1)
GAE = returns.generalized_advantage

CALLS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("returns.discounts", "terminated"): lambda f: returns.discounts(0.9, f),
    ("returns.monte_carlo_return", "cut"): lambda f: returns.monte_carlo_return(X, Y, Z, f),
    ("returns.n_step_return", "cut"): lambda f: returns.n_step_return(X, Y, Z, f, 2),
    ("returns.lambda_return", "cut"): lambda f: returns.lambda_return(X, Y, Z, f, 0.9),
    ("returns.generalized_advantage", "cut"): lambda f: GAE(X, Y, Z, X, f, 0.9),
    ("normalise.running_update", "valid"): lambda f: normalise.running_update(normalise.running_init((3,)), X, f),
    ("normalise.reward_update", "cut"): lambda f: normalise.reward_update(normalise.reward_init((), 3), X, f, 0.9),
    ("normalise.reward_update", "valid"): lambda f: normalise.reward_update(
        normalise.reward_init((), 3), X, FLAGS, 0.9, f
    ),
    ("axes.masked_mean", "valid"): lambda f: axes.masked_mean(X, f),
    ("distributions.mask_logits", "mask"): lambda f: distributions.mask_logits(X, f),
    ("losses.policy_gradient_loss", "valid"): lambda f: losses.policy_gradient_loss(X, Y, f),
    ("losses.twice_differentiable_policy_gradient_loss", "valid"): lambda f: (
        losses.twice_differentiable_policy_gradient_loss(X, Y, f)
    ),
    ("losses.ppo_clip_loss", "valid"): lambda f: losses.ppo_clip_loss(X, Y, Z, 0.2, f),
    ("losses.ppo_kl_loss", "valid"): lambda f: losses.ppo_kl_loss(X, Y, Z, X, 0.2, f),
    ("losses.entropy_loss", "valid"): lambda f: losses.entropy_loss(X, f),
    ("losses.normalise_advantage", "valid"): lambda f: losses.normalise_advantage(X, f),
    ("losses.approx_kl", "valid"): lambda f: losses.approx_kl(X, Y, f),
    ("losses.value_loss", "valid"): lambda f: losses.value_loss(X, Y, f),
    ("losses.clipped_value_loss", "valid"): lambda f: losses.clipped_value_loss(X, Y, Z, 0.2, f),
    ("losses.huber_loss", "valid"): lambda f: losses.huber_loss(X, Y, 1.0, f),
    ("losses.explained_variance", "valid"): lambda f: losses.explained_variance(X, Y, f),
    ("losses.cross_entropy_loss", "valid"): lambda f: losses.cross_entropy_loss(
        torch.stack([X, Y], -1), FLAGS.to(torch.int64), f
    ),
    ("returns.v_trace", "cut"): lambda f: returns.v_trace(X, Y, Z, X, f, 0.1 * Y)[0],
    ("returns.retrace", "cut"): lambda f: returns.retrace(X, Y, Z, X, f, 0.1 * Y),
    ("distributional.weighted_mean", "valid"): lambda f: distributional.weighted_mean(X, f, Y.abs()),
    ("distributional.categorical_loss", "valid"): lambda f: distributional.categorical_loss(XY, XY.softmax(-1), f),
    ("distributional.quantile_loss", "valid"): lambda f: distributional.quantile_loss(XY, 2 * XY, 1.0, f),
    ("losses.squared_loss", "valid"): lambda f: losses.squared_loss(X.unsqueeze(-1), Y.unsqueeze(-1), f),
}


def test_every_function_that_takes_flags_is_called_here() -> None:
    with_flags = set()
    for module in pkgutil.iter_modules(rlmeta.functional.__path__):
        content = importlib.import_module(f"rlmeta.functional.{module.name}")
        for name, function in inspect.getmembers(content, inspect.isfunction):
            if function.__module__ == content.__name__ and not name.startswith("_"):
                taken = {"terminated", "cut", "valid", "mask"} & set(inspect.signature(function).parameters)
                with_flags |= {(f"{module.name}.{name}", parameter) for parameter in taken}
    assert with_flags == set(CALLS)


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return all(same(actual[name], value) for name, value in expected.items())
    return actual.dtype == expected.dtype and torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("call", CALLS, ids=".".join)
def test_integer_flags_mean_what_bool_does(call: tuple[str, str]) -> None:
    expected = CALLS[call](FLAGS)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert same(CALLS[call](FLAGS.to(dtype)), expected)
    assert not same(CALLS[call](~FLAGS), expected), "the flags play a part"


@pytest.mark.parametrize("call", CALLS, ids=".".join)
def test_real_numbers_are_no_flags(call: tuple[str, str]) -> None:
    """Where real numbers may be weights, 0 and 1 act as flags."""
    real = FLAGS.float()
    try:
        result = CALLS[call](real)
    except SettingError as error:
        assert call[1] in str(error) and "float32" in str(error)
    else:
        assert call[1] == "valid" and same(result, CALLS[call](FLAGS))
    with pytest.raises(SettingError, match=f"{call[1]} is of type ndarray, expected a tensor"):
        CALLS[call](FLAGS.numpy())


def test_discounts_and_advantages_by_hand() -> None:
    done = torch.tensor([0, 1])
    assert returns.discounts(0.5, done).tolist() == [0.5, 0.0]
    ones, cut = torch.ones(2, 1), done.unsqueeze(-1)
    advantage = returns.generalized_advantage(ones, ones, 0 * ones, 0 * ones, cut, 0.5)
    assert advantage.flatten().tolist() == [1.5, 1.0]


def test_bool_passes_as_it_is_and_the_others_are_recorded() -> None:
    assert flags(FLAGS, "cut") is FLAGS
    capture, done = Capture(2), FLAGS.to(torch.uint8)
    for _ in range(6):
        recorded = capture("discounts", lambda x: {"d": returns.discounts(0.9, x["done"])}, {"done": done})
    assert torch.equal(recorded["d"], returns.discounts(0.9, FLAGS))
    assert all(program is not None for program in capture._programs.values())
    with pytest.raises(SettingError, match="complex64"):
        flags(torch.zeros(2, dtype=torch.complex64), "cut")


def test_shapes_that_would_broadcast_are_refused() -> None:
    def call(a: Tensor, b: Tensor) -> None:
        same_shape(a=a, b=b)

    call(X, Y)
    with pytest.raises(ValueError, match=r"a \[3\], b \[3, 1\]"):
        call(torch.zeros(3), torch.zeros(3, 1))
