from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlmeta.errors import SettingError
from rlmeta.functional.statistics import (
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap_interval,
)

RNG = np.random.default_rng(0)
STATISTICS = {
    "mean": mean,
    "median": median,
    "iqm": iqm,
    "optimality_gap": optimality_gap,
    "performance_profile": lambda scores: performance_profile(scores, [-0.5, 0.0, 0.5]),
    "probability_of_improvement": lambda scores: probability_of_improvement(scores, np.zeros((2, 5))),
}


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**31))
def test_iqm_is_scipys_trimmed_mean_of_all_runs_and_tasks(runs: int, tasks: int, seed: int) -> None:
    scores = np.random.default_rng(seed).standard_normal((runs, tasks))
    assert iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=None))


def test_literals() -> None:
    scores = [[1.0, 20], [2, 30], [3, 100], [6, 40]]
    assert mean(scores) == 202 / 8
    assert median(scores) == (3 + 47.5) / 2
    assert iqm(scores) == (3 + 6 + 20 + 30) / 4
    assert optimality_gap(scores, target=10.0) == 10 - (1 + 2 + 3 + 6 + 40) / 8
    assert optimality_gap([[0.5], [2.0]]) == 0.25
    assert performance_profile(scores, [0, 3, 20, 100]).tolist() == [1, 5 / 8, 3 / 8, 0]
    ours, theirs = [[1.0, 5], [2, 5]], [[1.0, 6], [0, 4], [3, 4]]
    assert probability_of_improvement(ours, theirs) == pytest.approx((3.5 / 6 + 4 / 6) / 2)


def test_the_median_is_over_tasks_of_means_over_runs() -> None:
    scores = RNG.standard_normal((5, 4)) ** 3
    assert median(scores) == pytest.approx(np.median([np.mean(task) for task in scores.T]))
    assert median(scores[:, 0]) == pytest.approx(np.mean(scores[:, 0]))


def test_iqm_resists_one_outstanding_run_and_fewer_than_four_trim_nothing() -> None:
    assert iqm([1.0, 2, 3, 4, 1e9]) == 3
    assert iqm([1.0, 2, 9]) == 4


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_probability_of_improvement_is_mann_and_whitneys_u(ours: int, theirs: int, tasks: int, seed: int) -> None:
    """Few distinct values, so that there are ties."""
    x, y = (np.random.default_rng((seed, n)).integers(4, size=(n, tasks)).astype(float) for n in (ours, theirs))
    u = [scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic / (ours * theirs) for a, b in zip(x.T, y.T)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    assert probability_of_improvement(x, x) == 0.5


@pytest.mark.parametrize("name", STATISTICS)
def test_further_axes_in_front_equal_a_loop(name: str) -> None:
    scores = RNG.standard_normal((5, 5, 5, 5))
    result = STATISTICS[name](scores)
    for i, j in itertools.product(range(5), range(5)):
        assert result[i, j] == pytest.approx(STATISTICS[name](scores[i, j]))


def test_both_sides_of_a_comparison_may_have_axes_in_front() -> None:
    ours, theirs = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 5, 4))
    expected = [probability_of_improvement(x, y) for x, y in zip(ours, theirs)]
    assert probability_of_improvement(ours, theirs).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_failed_run_is_not_left_out(name: str) -> None:
    scores = RNG.standard_normal((8, 5))
    scores[2, 3] = math.nan
    assert np.isnan(STATISTICS[name](scores)).all()


def test_one_task_may_be_a_vector_and_tensors_are_taken() -> None:
    scores = torch.arange(8.0)
    assert iqm(scores) == iqm(scores.unsqueeze(-1)) == 3.5
    assert probability_of_improvement([2.0, 3.0], [1.0]) == 1
    assert performance_profile([1.0, 2.0], [1.5]).tolist() == [0.5]
    assert stratified_bootstrap_interval(scores) == stratified_bootstrap_interval(scores.numpy()[:, None])
    assert stratified_bootstrap_interval(scores) == stratified_bootstrap_interval(scores, iqm, 2000, 0.95, 0)
    assert isinstance(iqm(scores), float)
    assert all(isinstance(end, float) for end in stratified_bootstrap_interval(scores))


# --- the bootstrap ---


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("statistic", [mean, iqm])
def test_interval_is_scipys_percentile_bootstrap_for_one_task(statistic, confidence: float) -> None:
    scores = RNG.gamma(2.0, size=12)
    ours = stratified_bootstrap_interval(scores, statistic, reps=20_000, confidence=confidence)
    theirs = scipy.stats.bootstrap(
        (scores,),
        (lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis)) if statistic is iqm else np.mean,
        n_resamples=20_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours[0] == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours[1] == pytest.approx(theirs.high, abs=0.03 * width)


def test_tasks_are_strata() -> None:
    """Tasks with different scores but equal runs: the interval is a point, and would be wide across tasks."""
    scores = np.tile([0.0, 10.0, 200.0], (6, 1))
    assert stratified_bootstrap_interval(scores, mean) == (70, 70)
    # Runs are drawn for each task on its own; drawn as whole rows, these would cancel and the interval be a point.
    paired = RNG.standard_normal((40, 1)) * np.array([[1.0, -1.0]])
    low, high = stratified_bootstrap_interval(paired, mean, reps=5000)
    assert high - low == pytest.approx(2 * 1.96 * np.std(paired[:, 0]) / math.sqrt(2 * 40), rel=0.05)


def test_coverage() -> None:
    """About 95 % of the intervals of 400 experiments of 30 runs contain the true value."""
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(400):
        low, high = stratified_bootstrap_interval(rng.standard_normal(30), mean, reps=400, seed=seed)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_interval_is_a_function_of_its_seed() -> None:
    scores = RNG.standard_normal((10, 3))
    first = stratified_bootstrap_interval(scores)
    assert first == stratified_bootstrap_interval(scores, seed=0)
    assert first != stratified_bootstrap_interval(scores, seed=1)


def test_interval_of_a_profile_has_an_end_for_every_threshold() -> None:
    scores = RNG.standard_normal((10, 3))
    low, high = stratified_bootstrap_interval(scores, lambda s: performance_profile(s, [-9.0, 0.0, 9.0]))
    assert low.shape == high.shape == (3,)
    assert (low[0], high[0], low[2], high[2]) == (1, 1, 0, 0)
    assert low[1] < performance_profile(scores, [0.0])[0] < high[1]


def test_wrong_arguments_are_refused() -> None:
    for scores in (np.zeros((2, 3, 4)), np.zeros((0, 3)), 1.0):
        with pytest.raises(SettingError, match="runs, tasks"):
            stratified_bootstrap_interval(scores)
    with pytest.raises(SettingError, match="2 tasks, baseline 1"):
        probability_of_improvement(np.zeros((3, 2)), np.zeros((3, 1)))
