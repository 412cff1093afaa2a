from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlmeta.errors import SettingError
from rlmeta.functional.schedules import Schedule, anneal, constant, cosine, exponential, linear, warm_up

SHAPES: dict[str, Callable[..., Schedule]] = {"linear": linear, "cosine": cosine, "exponential": exponential}


def test_literal_values() -> None:
    assert [constant(3.0)(p) for p in (0.0, 0.5, 1.0)] == [3, 3, 3]
    assert [linear(2.0)(p) for p in (0.0, 0.25, 1.0)] == [2, 1.5, 0]
    assert [linear(1.0, 3.0)(p) for p in (0.0, 0.25, 1.0)] == [1, 1.5, 3]
    assert [cosine(2.0)(p) for p in (0.0, 1 / 3, 0.5, 1.0)] == pytest.approx([2, 1.5, 1, 0])
    assert [cosine(2.0, 1.0)(p) for p in (0.0, 1 / 3, 1.0)] == pytest.approx([2, 1.75, 1])
    assert [exponential(8.0, 2.0)(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([8, 4, 2])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(p=st.floats(-1, 2))
def test_between_the_ends_and_clamped(shape: Callable[..., Schedule], p: float) -> None:
    for start, end in ((0.1, 5.0), (5.0, 0.1)):
        value = shape(start, end)(p)
        assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
        assert p > 0 or value == pytest.approx(start)
        assert p < 1 or value == pytest.approx(end)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_elementwise_in_progress_and_ends(shape: Callable[..., Schedule]) -> None:
    """Numbers and tensors `[*L]` agree in any combination; with numbers alone the result is a number."""
    starts, ends, progress = [0.5, 1.0, 4.0], [0.25, 2.0, 0.1], [-0.5, 0.3, 1.5]
    expected = [shape(s, e)(p) for s, e, p in zip(starts, ends, progress)]
    assert all(isinstance(value, float) for value in expected)
    start, end, p = (torch.tensor(values, dtype=torch.float64) for values in (starts, ends, progress))
    assert shape(start, end)(p).tolist() == pytest.approx(expected)
    assert shape(0.5, 0.25)(p).tolist() == pytest.approx([shape(0.5, 0.25)(x) for x in progress])
    assert shape(start, end)(0.3).tolist() == pytest.approx([shape(s, e)(0.3) for s, e in zip(starts, ends)])
    warm = warm_up(shape(start, end), 0.4)(p).tolist()
    assert warm == pytest.approx([warm_up(shape(s, e), 0.4)(x) for s, e, x in zip(starts, ends, progress)])


def test_warm_up_then_the_whole_schedule() -> None:
    schedule = warm_up(linear(2.0, 1.0), 0.2)
    assert [schedule(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 1, 2, 1.5, 1])
    assert schedule(-1.0) == 0
    assert warm_up(constant(3.0), 0.5)(0.25) == 1.5
    plain = linear(2.0)
    assert warm_up(plain, 0.0) is plain


def test_cosine_is_torchs() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.02)
    for step in range(11):
        assert cosine(0.3, 0.02)(step / 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_differentiable_and_traceable() -> None:
    start = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    progress = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for shape in SHAPES.values():
        assert torch.autograd.gradcheck(lambda s, shape=shape: warm_up(shape(s, 0.5), 0.1)(progress), start)
    schedule = warm_up(cosine(1.0, 0.5), 0.5)
    traced = torch.jit.trace(schedule, torch.tensor([0.1, 0.2, 0.3]))
    for p in (torch.tensor([0.0, 0.25, 0.5]), torch.tensor([0.6, 0.9, 1.1])):
        torch.testing.assert_close(traced(p), schedule(p))


def test_wrong_arguments_are_refused() -> None:
    for start, end in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0), (torch.tensor([1.0, 0.0]), 1.0)):
        with pytest.raises(SettingError, match="exponential schedule"):
            exponential(start, end)
    for fraction in (-0.1, 1.0, math.nan):
        with pytest.raises(SettingError, match="warm_up fraction"):
            warm_up(constant(1.0), fraction)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_settings_are_annealed_to_zero_in_their_own_type(name: Any) -> None:
    """A value and a progress per learner; the linear schedule equals v (1 - p) bit for bit."""
    value = torch.tensor([3e-4, 1e-3, 0.2])
    progress = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    annealed = anneal(value, name, progress)
    left = {"constant": lambda p: 1.0, "linear": lambda p: 1 - p, "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2}
    expected = [v * left[name](p) for v, p in zip(value.double().tolist(), progress.tolist())]
    assert annealed.dtype == torch.float32
    torch.testing.assert_close(annealed.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    if name == "linear":
        assert torch.equal(annealed, value * (1 - progress).float())
