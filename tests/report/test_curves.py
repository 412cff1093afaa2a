"""Learning curves: the numbers that are drawn, and the picture that is written."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from rlmeta.agents.ppo import PPO
from rlmeta.envs.task import task
from rlmeta.errors import SettingError
from rlmeta.functional import statistics
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.learner import Score
from rlmeta.learning.settings import variants
from rlmeta.report import curves
from rlmeta.runs.experiment import Budget, Experiment
from rlmeta.runs.metric_log import MetricLog

pytestmark = pytest.mark.usefixtures("pictures")

NAN = np.nan


def ended_run(folder: Path, seeds: int, rates: list[float], lines: int = 12, evaluated: bool = True) -> Any:
    """A run as it has ended: training returns in all lines, evaluations in every third but the last."""
    experiment = Experiment(
        tuple(variants(PPO(learning_rate=rates))), tuple(range(seeds)), task("CartPole-v1"), Budget(steps=lines * 1000)
    )
    learners = seeds * len(rates)
    draws = np.random.default_rng(0)
    with MetricLog(folder / "metrics.jsonl") as metrics, MetricLog(folder / "timing.jsonl") as timing:
        for i in range(1, lines + 1):
            level = 500 * (1 - np.exp(-i / 4)) * np.repeat(np.linspace(1, 0.5, len(rates)), seeds)
            line = {"iteration": i, "env_steps": i * 1000}
            line["charts/episodic_return"] = level * 0.8 + draws.normal(0, 30, learners)
            if evaluated and i % 3 == 0 and i < lines:
                line["eval/return"] = level + draws.normal(0, 30, learners)
            metrics.write(line)
            timing.write({"iteration": i, "seconds": i * 2.5})
    returns = torch.from_numpy(level[:, None] + draws.normal(0, 30, (learners, 8)))
    evaluation = Evaluation(returns, returns.long()) if evaluated else None
    return SimpleNamespace(
        agent=SimpleNamespace(score=Score("return"), counts="environment steps"),
        stream=None,
        folder=folder,
        experiment=experiment,
        evaluation=evaluation,
        scores=returns.mean(-1),
        env_steps=lines * 1000,
        seconds=lines * 2.5 + 1,
    )


def drawn(run: Any) -> list[Any]:
    """The two panels."""
    return list(curves._figure(run, *curves.curves(run)).axes)


def ys(axes: Any) -> list[list[float]]:
    return [line.get_ydata().tolist() for line in axes.lines]


# ---------------------------------------------------------------------- numbers


def test_curves_are_the_metric_log_and_the_final_evaluation(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=2, rates=[1e-3, 1e-4])
    evaluation, training = curves.curves(run)
    assert evaluation.steps.tolist() == [3000, 6000, 9000, 12000]
    assert evaluation.seconds.tolist() == [7.5, 15, 22.5, 31]
    assert evaluation.values.shape == (4, 4)
    assert evaluation.values[-1].tolist() == run.scores.tolist()
    assert training.steps.tolist() == [1000 * i for i in range(1, 13)]
    assert training.values.shape == (12, 4)


def test_a_learner_without_an_episode_keeps_its_last_value(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=3, rates=[1e-3], evaluated=False)
    (tmp_path / "metrics.jsonl").unlink()
    with MetricLog(tmp_path / "metrics.jsonl") as log:
        for i, values in enumerate([[NAN, 1, NAN], [2, NAN, NAN], [NAN, 3, NAN]], start=1):
            log.write({"iteration": i, "env_steps": i, "charts/episodic_return": values})
            log.write({"iteration": i, "env_steps": i, "eval/length": [1, 1, 1]})
    _, training = curves.curves(run)
    np.testing.assert_equal(training.values, [[NAN, 1, NAN], [2, 1, NAN], [2, 3, NAN]])
    np.testing.assert_equal(curves.centre(training.values), [NAN, 1.5, 2.5])
    np.testing.assert_equal(curves.centre(np.full((2, 3), NAN)), [NAN, NAN])


def test_centre_and_band_are_the_statistics_of_every_point() -> None:
    values = np.random.default_rng(1).normal(size=(5, 5))  # as many points as seeds
    values[2] += 100
    np.testing.assert_allclose(curves.centre(values), [trim_mean(point, 0.25) for point in values])
    low, high = curves.band(values)
    for i, point in enumerate(values):
        assert (low[i], high[i]) == statistics.stratified_bootstrap_interval(point)
    assert ((low <= curves.centre(values)) & (curves.centre(values) <= high)).all()
    with_gap = values.copy()
    with_gap[0, 1] = NAN
    low, high = curves.band(with_gap)
    assert np.isnan([low[0], high[0]]).all() and np.isfinite([low[1:], high[1:]]).all()


# ---------------------------------------------------------------------- the picture


def test_many_seeds_are_drawn_as_their_iqm_with_an_interval(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=8, rates=[1e-3, 1e-4])
    evaluation, training = curves.curves(run)
    left, right = drawn(run)
    assert len(left.lines) == 4 and len(left.collections) == 2
    expected = [
        curves.centre(curve.values[:, of]).tolist()
        for of in (slice(0, 8), slice(8, 16))
        for curve in (training, evaluation)
    ]
    assert ys(left) == ys(right) == expected
    low, high = curves.band(evaluation.values[:, 8:])
    edges = left.collections[1].get_paths()[0].vertices[:, 1]
    assert {*low, *high} <= set(edges)
    assert [left.lines[i].get_marker() for i in range(4)] == ["None", "o", "None", "o"]
    assert left.lines[0].get_linewidth() < left.lines[1].get_linewidth()
    assert left.lines[1].get_color() == left.lines[0].get_color() != left.lines[3].get_color()


def test_up_to_three_seeds_are_drawn_one_by_one(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=3, rates=[1e-3])
    evaluation, training = curves.curves(run)
    left, _ = drawn(run)
    assert len(left.collections) == 0
    each = evaluation.values.T.tolist()
    means = [pytest.approx(curve.values.mean(1).tolist()) for curve in (training, evaluation)]
    assert ys(left) == [means[0], *each, means[1]]


def test_one_seed_is_one_line(tmp_path: Path) -> None:
    left, _ = drawn(ended_run(tmp_path, seeds=1, rates=[1e-3]))
    assert len(left.lines) == 2 and len(left.collections) == 0
    assert left.get_xlabel() == "environment steps"


def test_without_evaluations_the_interval_is_of_the_training(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=4, rates=[1e-3], evaluated=False)
    figure = curves._figure(run, *curves.curves(run))
    assert [len(axes.collections) for axes in figure.axes] == [1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["95 % interval", "training"]
    (tmp_path / "two").mkdir()
    run = ended_run(tmp_path / "two", seeds=2, rates=[1e-3], evaluated=False)
    assert len(drawn(run)[0].lines) == 3  # both seeds and their mean


def test_axes_legend_and_title_say_what_is_shown(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=8, rates=[1e-3, 1e-4])
    figure = curves._figure(run, *curves.curves(run))
    left, right = figure.axes
    assert left.get_xlabel() == "environment steps of each learner"
    assert right.get_xlabel() == "wall time of all 16 learners together [s]"
    assert left.get_ylabel() == "undiscounted return per episode"
    assert figure.get_suptitle() == "ppo on CartPole-v1: interquartile mean of 8 seeds"
    texts = [text.get_text() for text in figure.legends[0].get_texts() if text.get_text()]
    assert texts == ["learning_rate=0.001", "learning_rate=0.0001", "evaluation", "95 % interval", "training"]
    figure.draw_without_rendering()
    ticks = [text.get_text() for text in left.get_xticklabels()]
    assert "10k" in ticks
    legend, panel = figure.legends[0].get_window_extent(), right.get_window_extent()
    assert legend.x0 >= panel.x1  # outside the curves


@pytest.mark.parametrize(("seconds", "unit", "scale"), [(200, "s", 1), (1000, "min", 60), (20_000, "h", 3600)])
def test_long_runs_are_shown_in_longer_units(tmp_path: Path, seconds: float, unit: str, scale: float) -> None:
    run = ended_run(tmp_path, seeds=1, rates=[1e-3])
    run.seconds = seconds
    _, right = drawn(run)
    assert right.get_xlabel() == f"wall time [{unit}]"
    assert right.lines[1].get_xdata()[-1] == pytest.approx(seconds / scale)


def test_many_settings_have_different_colours(tmp_path: Path) -> None:
    left, _ = drawn(ended_run(tmp_path, seeds=1, rates=[i / 1000 for i in range(1, 13)]))
    assert len({str(line.get_color()) for line in left.lines}) == 12


def test_the_picture_is_written_whole_and_replaces_the_last(tmp_path: Path) -> None:
    run = ended_run(tmp_path, seeds=4, rates=[1e-3])
    (tmp_path / "curve.png").write_text("old")
    assert curves.write_curve(run) == tmp_path / "curve.png"
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1800, 660)
    assert (tmp_path / "curve.png.tmp").exists() is False
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]


def test_a_run_in_memory_has_no_picture() -> None:
    run: Any = SimpleNamespace(folder=None)
    with pytest.raises(SettingError, match=r"no curve\.png: give out="):
        curves.write_curve(run)


def test_without_matplotlib_one_sentence_is_printed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ended_run(tmp_path, seeds=1, rates=[1e-3])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    assert curves.write_curve(run) is None
    said = capsys.readouterr()
    assert said.err == "drawing curve.png needs matplotlib, which is not installed: pip install 'rlmeta[plot]'\n"
    assert said.out == "" and not (tmp_path / "curve.png").exists()


def test_the_users_pyplot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error
    before = list(dict.items(matplotlib.rcParams))  # as they are: reading the backend's resolves it
    assert curves.write_curve(ended_run(tmp_path, seeds=4, rates=[1e-3, 1e-4])) is not None
    assert list(dict.items(matplotlib.rcParams)) == before
