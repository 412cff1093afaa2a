"""Action scaling between a policy's units and the environment's."""

from __future__ import annotations

import math

import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.nn import ActionUnits

INFINITE, LARGEST = math.inf, torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("low", "high", "at_minus_one", "at_one"),
    [
        (0.0, 1000.0, 0.0, 1000.0),
        (-0.001, 0.001, -0.001, 0.001),
        (50.0, 150.0, 50.0, 150.0),
        (5.0, INFINITE, 5.0, 7.0),  # the bound is at -1, the unit its own
        (-INFINITE, 5.0, 3.0, 5.0),
        (-INFINITE, INFINITE, -1.0, 1.0),
        (-LARGEST, LARGEST, -1.0, 1.0),  # as many environments say that there are none
        (-1.8e308, 1.8e308, -1.0, 1.0),
        (0.0, LARGEST, 0.0, 2.0),
        (3.0, 3.0, 2.0, 4.0),
    ],
)
def test_bounds_are_the_unit(low, high, at_minus_one, at_one):
    units = ActionUnits((1,), [low], [high])
    actions = units.to_environment(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    torch.testing.assert_close(actions.flatten().tolist(), [at_minus_one, at_one], rtol=1e-6, atol=0)
    assert units.bounded == (math.isfinite(at_minus_one) and (low, high) == (at_minus_one, at_one))


def test_components_are_measured_one_by_one_and_back_again():
    low, high = [-2.0, 0.0, 5.0, -INFINITE], [2.0, 1000.0, INFINITE, INFINITE]
    units = ActionUnits((2, 2), low, high)
    u = torch.tensor([[0.5, -0.5, 1.0, 3.0], [-1.0, 1.0, 0.0, -9.0]], dtype=torch.float64)
    action = units.to_environment(u)
    torch.testing.assert_close(action[0], torch.tensor([[1.0, 250.0], [7.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(units.to_policy(action), u)
    moved = units.step(torch.ones(5, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(moved[0], torch.tensor([[2.0, 500.0], [1.0, 1.0]], dtype=torch.float64))


def test_units_of_their_own_change_no_bit():
    u = torch.randn(7, 3)
    for units in (ActionUnits((3,)), ActionUnits((3,), [-1] * 3, [1] * 3)):
        assert units.to_environment(u) is u and units.to_policy(u) is u and units.step(u) is u
    assert ActionUnits((), [-2.0], [2.0]).to_environment(torch.ones(4, 1)).shape == (4,)


def test_what_bounds_nothing_is_refused():
    for low, high in (([1.0], [0.0]), ([math.nan], [1.0]), ([0.0, 0.0], [1.0, 1.0]), ([0.0], [1.0, 1.0])):
        with pytest.raises(SettingError, match="no intervals"):
            ActionUnits((1,), low, high)


def test_units_are_on_the_processor_in_float32_whatever_the_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            units = ActionUnits((1,), [0.0], [10.0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert units.unit.dtype == torch.float32 and units.unit.device.type == "cpu"
