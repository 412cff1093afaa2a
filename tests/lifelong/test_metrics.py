"""Metrics of a stream by hand, and what they must not do: take NaN for 0, divide by T, count the last row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.lifelong import metrics

R = np.array(
    [
        [0.1, 0.2, 0.3],
        [0.8, 0.3, 0.2],
        [0.9, 0.7, 0.5],
        [0.6, 0.75, 0.9],
    ]
)
"""Row 0 before any training; three tasks."""


def test_three_tasks_by_hand():
    assert metrics.accuracy(R) == pytest.approx((0.6 + 0.75 + 0.9) / 3)
    assert metrics.learning_accuracy(R) == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert metrics.backward_transfer(R) == pytest.approx(((0.6 - 0.8) + (0.75 - 0.7)) / 2)  # by T - 1, not T
    assert metrics.forward_transfer(R) == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)
    assert metrics.forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.75)) / 2)  # the best, not the first
    assert metrics.forgetting_first(R) == pytest.approx(((0.8 - 0.6) + (0.7 - 0.75)) / 2)
    np.testing.assert_allclose(metrics.task_forgetting(R), [0.3, -0.05, np.nan])


def test_the_final_row_does_not_hide_negative_forgetting():
    improved = R.copy()
    improved[3, 0] = 1.0
    assert metrics.task_forgetting(improved)[0] == pytest.approx(-0.1)


def test_losses_are_forgotten_upwards():
    assert metrics.forgetting(-R, maximise=False) == pytest.approx(metrics.forgetting(R))
    assert metrics.forgetting_first(-R, maximise=False) == pytest.approx(metrics.forgetting_first(R))


def test_transfer_that_helps_is_positive_for_a_loss_too():
    better, worse = metrics.summary(R), metrics.summary(-R, maximise=False)
    for name in ("backward_transfer", "forward_transfer", "forgetting", "forgetting_first"):
        assert worse[name] == pytest.approx(better[name]), name
    for name in ("accuracy", "learning_accuracy"):
        assert worse[name] == pytest.approx(-better[name]), name


def test_nan_is_not_zero():
    holed = R.copy()
    holed[3, 1] = np.nan
    assert np.isnan(metrics.accuracy(holed)) and np.isnan(metrics.backward_transfer(holed))
    assert np.isnan(metrics.forgetting(holed))
    assert metrics.learning_accuracy(holed) == pytest.approx(0.8)


def test_what_is_not_born_has_no_forward_transfer():
    """Class-incremental: nobody can be right about a task before its classes are added."""
    scores = R.copy()
    scores[np.triu_indices(3)] = np.nan
    found = metrics.summary(scores)
    assert np.isnan(found["forward_transfer"])
    for name, value in metrics.summary(R).items():
        if name != "forward_transfer":
            assert found[name] == pytest.approx(value), name
    assert np.isnan(metrics.estimates(scores[None].repeat(5, 0))["forward_transfer"])[0]


def test_tasks_count_the_same_unless_they_are_weighted():
    counts = np.array([3, 1, 0])
    assert metrics.accuracy(R, counts) == pytest.approx((3 * 0.6 + 0.75) / 4)
    several = metrics.accuracy(np.stack([R, R]), np.array([[3, 1, 0], [1, 1, 1]]))
    assert several == pytest.approx([(3 * 0.6 + 0.75) / 4, metrics.accuracy(R)])
    assert metrics.accuracy(R, torch.tensor(counts)) == metrics.accuracy(R, counts)
    for wrong in ([1.0, 2.0], [0, 0, 0], [1, -1, 1], 1.0):
        with pytest.raises(SettingError, match="expected one of at least 0 for each of the 3 tasks"):
            metrics.accuracy(R, wrong)


def test_a_single_task_has_no_transfer_and_no_forgetting():
    single = np.array([[0.1], [0.9]])
    found = metrics.summary(single)
    assert found["accuracy"] == found["learning_accuracy"] == 0.9
    for name in ("backward_transfer", "forward_transfer", "forgetting", "forgetting_first"):
        assert np.isnan(found[name])


def test_zeros_count():
    zeros = np.zeros((4, 3))
    zeros[1:, :] = 0.5
    zeros[3, 0] = 0.0
    assert metrics.accuracy(zeros) == pytest.approx(1 / 3)
    assert metrics.backward_transfer(zeros) == pytest.approx(-0.25)


def test_runs_are_axes_and_estimates_have_intervals():
    rng = np.random.default_rng(0)
    many = rng.uniform(size=(4, 4, 5, 4))  # two axes of runs, T = 4 of as many
    for name, values in metrics.summary(torch.from_numpy(many)).items():
        for index in np.ndindex(4, 4):
            assert values[index] == pytest.approx(metrics.summary(many[index])[name])
    found = metrics.estimates(many[0])
    for name, estimate in found.items():
        assert estimate.low <= estimate.mean <= estimate.high, name
    assert found["forgetting_first"].mean == pytest.approx(-found["backward_transfer"].mean)
    assert np.isnan(metrics.estimates(many[:, 0, :2, :1])["forgetting"].low)


@pytest.mark.parametrize("shape", [(3, 3), (3,), (1, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(SettingError, match="T \\+ 1, T"):
        metrics.accuracy(np.zeros(shape))
