"""Learning curves of a run (`curve.png`), over environment steps and over wall time."""

from __future__ import annotations

import dataclasses
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlmeta.errors import SettingError, missing_extra
from rlmeta.functional import statistics
from rlmeta.report.tables import FEW_SEEDS
from rlmeta.runs.files import put
from rlmeta.runs.metric_log import read_metric_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlmeta.runs.run import Run

TRAINING = "charts/episodic_return"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers."""
GREY = "#555555"
THICK: dict[str, Any] = {"linewidth": 1.9, "marker": "o", "markersize": 4.5, "zorder": 4}
THIN: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.6, "zorder": 1}
EACH: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.5, "marker": ".", "markersize": 4, "zorder": 3}


@dataclass(frozen=True)
class Curve:
    """Learning curve: a metric of every learner at P points of a run."""

    steps: NDArray[np.float64]
    """Environment steps of each learner, `[P]`."""
    seconds: NDArray[np.float64]
    """Wall time of all learners together, `[P]`."""
    values: NDArray[np.float64]
    """`[P, S]`; NaN where a learner has none."""

    def carried(self) -> Curve:
        """Fill NaN with each learner's last value (forward fill), as when it finished no episode since."""
        values = self.values.copy()
        for before, after in itertools.pairwise(values):
            after[:] = np.where(np.isnan(after), before, after)
        return dataclasses.replace(self, values=values)


def write_curve(run: Run) -> Path | None:
    """Plot evaluation and training returns of a run to `curve.png` in its folder.

    The interquartile mean (IQM) over seeds for each setting, with the 95 % interval of a stratified bootstrap for the
    evaluations; up to 3 seeds are drawn one by one instead. Without matplotlib nothing is drawn, and a message says
    what to install.

    Returns:
        The file, or None if nothing was drawn.

    Raises:
        SettingError: the run has no folder.
        CheckpointError: the run's metric log is missing or damaged.
    """
    if run.folder is None:
        raise SettingError("a run that is kept in memory has no curve.png: give out=")
    evaluation, training = curves(run)
    return picture(run.folder / "curve.png", lambda: _figure(run, evaluation, training), dpi=150)


def picture(path: Path, draw: Callable[[], Figure], dpi: int) -> Path | None:
    """Save the figure that `draw` returns as a PNG file; without matplotlib say what to install and return None."""
    try:
        figure = draw()
    except ImportError:
        print(missing_extra("matplotlib", "plot", f"drawing {path.name}"), file=sys.stderr)
        return None
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    put(path, content.getvalue())
    return path


def curves(run: Run) -> tuple[Curve, Curve]:
    """Read a run's curves from its folder: evaluation returns (with the final evaluation), and training returns."""
    assert run.folder is not None
    lines = read_metric_log(run.folder / "metrics.jsonl")
    seconds = {entry["iteration"]: entry["seconds"] for entry in read_metric_log(run.folder / "timing.jsonl")}
    learners = len(run.experiment.learners)
    evaluation, training = (_curve(lines, seconds, name, learners) for name in (run.agent.score.metric, TRAINING))
    training = training.carried()
    if run.evaluation is not None:
        evaluation = Curve(
            np.append(evaluation.steps, run.env_steps),
            np.append(evaluation.seconds, run.seconds),
            np.concatenate([evaluation.values, run.scores.cpu().numpy()[None]]),
        )
    return evaluation, training


def _curve(lines: Sequence[dict[str, Any]], seconds: dict[int, float], name: str, learners: int) -> Curve:
    lines = [line for line in lines if name in line]
    values = np.array([line[name] for line in lines], dtype=np.float64).reshape(-1, learners)
    return Curve(
        np.array([line["env_steps"] for line in lines], dtype=np.float64),
        np.array([seconds.get(line["iteration"], np.nan) for line in lines], dtype=np.float64),
        values,
    )


def centre(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile mean over seeds at each point, `[P, S]` -> `[P]`; NaN until every seed has a value.

    A seed that never has a value, as of a learner that never finished an episode, is left out.
    """
    ever = ~np.isnan(values).all(0)
    return statistics.iqm(values[:, ever, None]) if ever.any() else np.full(len(values), np.nan)


def band(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of the 95 % bootstrap interval of `centre` at each point, `[P, S]` -> low `[P]`, high `[P]`."""
    values = values[:, ~np.isnan(values).all(0)]
    ends = [
        (np.nan, np.nan) if np.isnan(point).any() or not point.size else statistics.stratified_bootstrap_interval(point)
        for point in values
    ]
    low, high = np.array(ends, dtype=np.float64).reshape(-1, 2).T
    return low, high


# ---------------------------------------------------------------------- drawing


def _figure(run: Run, evaluation: Curve, training: Curve) -> Figure:
    """Plot learning curves: a matplotlib figure of the score against steps and against time.

    It is made without pyplot, so that the user's figures and style are not touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    experiment = run.experiment
    learners, seeds = len(experiment.learners), experiment.repeats
    figure = Figure(figsize=(12, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    unit, scale = _time_unit(max([run.seconds, *training.seconds, *evaluation.seconds]))
    alone = not len(evaluation.steps)
    for index, colour in enumerate(_colours(len(experiment.variants))):
        of = slice(index * seeds, (index + 1) * seeds)
        thin, thick = {"color": colour, **THIN}, {"color": colour, **THICK}
        for curve, style, spread in ((training, thin, alone), (evaluation, thick, True)):
            if len(curve.steps):
                places = ((left, curve.steps), (right, curve.seconds / scale))
                _draw(places, curve.values[:, of], style, spread)
    for axes in (left, right):
        _dress(axes)
    score = "undiscounted return per episode" if run.agent.score.name == "return" else run.agent.score.name
    left.set_ylabel(score if run.stream is None else f"{score}, mean of the tasks so far")
    left.set_xlabel(run.agent.counts + (" of each learner" if learners > 1 else ""))
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    together = f" of all {learners} learners together" if learners > 1 else ""
    right.set_xlabel(f"wall time{together} [{unit}]")
    over = f"interquartile mean of {seeds} seeds" if seeds > FEW_SEEDS else f"mean of {seeds} seeds"
    title = f"{experiment.agent_name} on {experiment.problem.name}" + (f": {over}" if seeds > 1 else "")
    if broken := int((~np.isfinite(evaluation.values[-1:])).sum()):
        title += f"; {broken} of {learners} final scores are not finite"
    figure.suptitle(title, fontsize=12)
    figure.legend(handles=list(_legend(run, not alone)), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _draw(
    places: Sequence[tuple[Axes, NDArray[np.float64]]], values: NDArray[np.float64], style: dict[str, Any], spread: bool
) -> None:
    """Draw one setting's curve in every panel: its centre, and with `spread` the interval or each seed."""
    seeds, middle = values.shape[1], centre(values)
    ends = band(values) if spread and seeds > FEW_SEEDS else None
    for axes, x in places:
        if ends is not None:
            axes.fill_between(x, *ends, color=style["color"], alpha=0.18, linewidth=0, zorder=2)
        elif spread and seeds > 1:
            axes.plot(x, values, color=style["color"], **EACH)
        axes.plot(x, middle, **style)


def _dress(axes: Axes) -> None:
    """Style axes: a light grid, no frame."""
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=GREY, labelsize=9)
    axes.margins(x=0.02)


def _legend(run: Run, evaluated: bool) -> Iterator[Any]:
    """Legend entries: a line for each setting, then the line styles."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels, seeds = run.experiment.labels, run.experiment.repeats
    if len(labels) > 1:
        for label, colour in zip(labels, _colours(len(labels))):
            yield Line2D([], [], color=colour, linewidth=3, label=label.replace(", ", "\n") or "(equal)")
        yield Line2D([], [], linestyle="none", label="")
    if evaluated:
        yield Line2D([], [], color=GREY, label="evaluation", **THICK)
    if seeds > FEW_SEEDS:
        yield Patch(color=GREY, alpha=0.3, linewidth=0, label="95 % interval")
    elif seeds > 1:
        yield Line2D([], [], color=GREY, label="each seed", **EACH)
    yield Line2D([], [], color=GREY, label="training", **THIN)


def _colours(count: int) -> Sequence[Any]:
    """Distinct colours; from a continuous colour map if there are many."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (count - 1) * 0.92) for i in range(count)]


def _time_unit(longest: float) -> tuple[str, float]:
    """Unit of the time axis, and its length in seconds."""
    if longest > 3 * 3600:
        return "h", 3600.0
    return ("min", 60.0) if longest > 300 else ("s", 1.0)
