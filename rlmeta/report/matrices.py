"""Accuracy (or return) matrix of a run on a stream of tasks (`matrix.png`): a heat map, and scores during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlmeta.report.curves import band, centre, picture
from rlmeta.report.tables import FEW_SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlmeta.runs.run import Run

WRITTEN_UP_TO = 10
"""Largest number of tasks for which the scores are written into the heat map."""
NAMES_IN_A_LINE = 56
"""Number of characters of task names that fit below a panel."""


def write_matrix(run: Run) -> Path | None:
    """Plot the score matrix of a run on a stream to `matrix.png` in its folder, a row of panels for each setting.

    Left: the mean over learners of R[i, j], the score on task j after training on i tasks, with one colour scale for
    all settings. Right: a curve for each task, the interquartile mean over learners with its 95 % interval, or the mean
    alone for up to 3 learners. Without matplotlib nothing is drawn, and a message says what to install.

    Returns:
        The file, or None if nothing was drawn.
    """
    assert run.folder is not None
    return picture(run.folder / "matrix.png", lambda: _figure(run), dpi=120)


def _figure(run: Run) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    experiment = run.experiment
    labels, each = experiment.labels, experiment.repeats
    figure = Figure(figsize=(12, 4.4 * len(labels)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: NDArray[Any] = np.asarray(figure.subplots(len(labels), 2)).reshape(len(labels), 2)
    matrices = run.matrix.cpu().numpy().reshape(len(labels), each, *run.matrix.shape[1:])
    names, means = _names(run), matrices.mean(1)
    finite = means[np.isfinite(means)]
    ends = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    for (left, right), matrix, label in zip(panels, matrices, labels):
        _heat_map(left, matrix.mean(0), names, run.agent.score.name, ends)
        _curves(right, matrix, names, run.agent.score.name)
        if label:
            left.set_title(label, fontsize=10)
    orders = len({tuple(order) for order in experiment.orders.tolist()})
    over = f"{each} learners" if orders == 1 else f"{each} learners in {orders} orders of the tasks"
    methods = ", ".join(method.name for method in experiment.methods) or "fine-tuning"
    figure.suptitle(f"{experiment.agent_name} on {experiment.problem.name}, {methods}: {over}", fontsize=12)
    return figure


def _names(run: Run) -> list[str]:
    """Names of the tasks in training order; numbers if they have no names of their own or there are several orders."""
    stream = run.stream
    assert stream is not None
    order = stream.orders()[0]
    names = [stream.tasks[j].name for j in order]
    if len(stream.orders()) > 1 or names == [f"{stream.name}/{j}" for j in order]:
        return [f"task {j + 1}" for j in range(len(stream))]
    return names


def _turned(names: Sequence[str]) -> dict[str, Any]:
    """Text options of tick labels: rotated if they would overlap."""
    turned = sum(map(len, names)) + 2 * len(names) > NAMES_IN_A_LINE
    return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}


def _digits(ends: tuple[float, float]) -> str:
    """Number format for scores within a range: about three digits, the same number of decimals, no exponent."""
    largest = max(map(abs, ends))
    return ".3f" if largest < 10 else ".1f" if largest < 100 else ",.0f"


def _heat_map(axes: Axes, matrix: NDArray[np.float64], names: list[str], score: str, ends: tuple[float, float]) -> None:
    image = axes.imshow(matrix, cmap="viridis", aspect="auto", vmin=ends[0], vmax=ends[1])
    axes.set_xticks(range(len(names)), names, fontsize=8, **_turned(names))
    axes.set_yticks(range(len(matrix)), ["untrained", *names], fontsize=8)
    axes.set_xlabel("evaluated on")
    axes.set_ylabel("trained up to")
    axes.figure.colorbar(image, ax=axes, label=f"{score}, mean")
    if len(names) > WRITTEN_UP_TO:
        return
    middle, digits = sum(ends) / 2, _digits(ends)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if value < middle else "black"
            text = "" if np.isnan(value) else f"{value:{digits}}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)


def _curves(axes: Axes, matrix: NDArray[np.float64], names: list[str], score: str) -> None:
    from matplotlib import colormaps

    x = np.arange(matrix.shape[1])
    for j, name in enumerate(names):
        colour = colormaps["viridis"](0.9 * j / max(1, len(names) - 1))
        values = matrix[:, :, j].T
        if len(matrix) > FEW_SEEDS:
            axes.fill_between(x, *band(values), color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, centre(values), color=colour, marker="o", markersize=3.5, label=name)
        axes.plot(j + 1, centre(values)[j + 1], color=colour, marker="*", markersize=12)
    axes.set_xticks(x, ["untrained", *names], fontsize=8, **_turned(["untrained", *names]))
    axes.set_xlabel("trained up to (star: the task itself)")
    spread = len(matrix) > FEW_SEEDS
    axes.set_ylabel(f"{score}, interquartile mean and 95 % interval" if spread else f"{score}, mean")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) <= WRITTEN_UP_TO:
        axes.legend(fontsize=8, frameon=False, title="task", loc="center left", bbox_to_anchor=(1, 0.5))
