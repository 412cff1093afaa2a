"""Adaptation curve of a meta-learner on held-out tasks (`rlmeta adapt RUN`), as a table and a plot.

The mean score before adaptation and after each inner step, with a 95 % interval of 1.96 standard errors over all tasks
of all seeds, as is usual in few-shot learning. For regression of one variable the plot also shows one task's
predictions before and after adaptation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from rlmeta.errors import SettingError, missing_extra
from rlmeta.functional import random, tree
from rlmeta.learning.predictive import Stepwise
from rlmeta.runs.run import Run
from rlmeta.runs.surroundings import undisturbed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class AdaptFlags:
    """Options of the adaptation."""

    tasks: int = 600
    """Number of held-out tasks for each learner."""
    steps: int = 10
    """Number of inner steps (a learned optimizer's horizon needs more)."""
    seed: int = 1
    """Seed of the tasks."""

    def __post_init__(self) -> None:
        for name, least in (("tasks", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"--{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Adaptation:
    """Adaptation curves: every learner's scores on its tasks, before adaptation and after each inner step."""

    scores: NDArray[np.float64]
    """`[S, E, steps + 1]` over learners, tasks and inner steps."""
    name: str
    """Name of the score."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean score over learners and tasks, `[steps + 1]`."""
        return self.scores.mean((0, 1))

    @property
    def not_finite(self) -> int:
        """Number of tasks, over all learners, whose last score is not finite."""
        return int((~np.isfinite(self.scores[..., -1])).sum())

    @property
    def half_width(self) -> NDArray[np.float64]:
        """Half-width of the mean's 95 % confidence interval, `[steps + 1]`."""
        flat = self.scores.reshape(-1, self.scores.shape[-1])
        return 1.96 * flat.std(0, ddof=min(1, len(flat) - 1)) / np.sqrt(len(flat))


@undisturbed()
def adapt(run: Run, tasks: int, steps: int, seed: int = 1) -> Adaptation:
    """Adapt every learner of a run to held-out tasks and score each inner step.

    Args:
        run: the run of a meta-learner with inner steps.
        tasks: number of tasks for each learner.
        steps: number of inner steps.
        seed: seed of the tasks.

    Raises:
        SettingError: the run's learner takes no inner steps.
    """
    if not isinstance(run.agent, Stepwise):
        raise SettingError(f"a run of {run.experiment.agent_name} does not adapt step by step: give a run of MAML")
    agent: Any = run.agent
    world = run.experiment.world()
    key = random.fold(random.fold(run.state["key"], "adaptation"), seed)
    scores = agent.adaptation(agent.effective_params(run.state), world, key, tasks, steps)
    return Adaptation(scores.cpu().numpy(), agent.score.name)


def table(adaptation: Adaptation, title: str) -> Table:
    """Table of the mean score over the inner steps; of many steps about ten are shown."""
    rendered = Table(title=title, title_justify="left")
    for column in ("inner steps", f"mean {adaptation.name}", "± 95 %"):
        rendered.add_column(column, justify="right")
    last = adaptation.scores.shape[-1] - 1
    for step in sorted({round(last * i / 10) for i in range(11)}):
        rendered.add_row(str(step), f"{adaptation.mean[step]:.4g}", f"{adaptation.half_width[step]:.2g}")
    if adaptation.not_finite:
        total = adaptation.scores[..., 0].size
        rendered.caption = f"{adaptation.not_finite} of {total} tasks end without a finite score"
    return rendered


def write(run: Run, adaptation: Adaptation, folder: Path, seed: int = 1) -> list[Path]:
    """Write the curve to `adaptation.json` and, if matplotlib is installed, plot it in `adaptation.png`.

    Returns:
        The files written.
    """
    content = {
        "score": adaptation.name,
        "tasks": adaptation.scores.shape[1],
        "not_finite": adaptation.not_finite,
        "mean": adaptation.mean.tolist(),
        "interval": adaptation.half_width.tolist(),
        "learners": adaptation.scores.mean(1).tolist(),
    }
    (folder / "adaptation.json").write_text(json.dumps(content, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture: {missing_extra('matplotlib', 'plot', 'a picture')}")
        return [folder / "adaptation.json"]
    line = _predictions(run, seed)
    figure = Figure(figsize=(10 if line else 5, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2 if line else 1, squeeze=False)[0]
    _draw_curve(axes[0], adaptation)
    if line:
        _draw_predictions(axes[1], line)
    figure.savefig(folder / "adaptation.png", dpi=120)
    return [folder / "adaptation.json", folder / "adaptation.png"]


def _draw_curve(axes: Axes, adaptation: Adaptation) -> None:
    steps = np.arange(adaptation.scores.shape[-1])
    for learner in adaptation.scores.mean(1):
        axes.plot(steps, learner, color="#0072B2", linewidth=0.6, alpha=0.4)
    axes.plot(steps, adaptation.mean, color="#0072B2", linewidth=2)
    low, high = adaptation.mean - adaptation.half_width, adaptation.mean + adaptation.half_width
    axes.fill_between(steps, low, high, color="#0072B2", alpha=0.25)
    axes.set(xlabel="inner steps", ylabel=f"mean {adaptation.name}", title="held-out tasks")
    axes.grid(alpha=0.3)


@undisturbed()
@torch.no_grad()
def _predictions(run: Run, seed: int) -> dict[str, NDArray[np.float64]]:
    """A task of the first learner for the plot: its samples, and predictions before and after adaptation.

    Empty unless inputs and targets are scalars.
    """
    agent: Any = run.agent
    spaces = (run.world.observation_space.shape, run.world.action_space.shape)
    if spaces != ((1,), (1,)) or not agent.answers:
        return {}
    world = run.experiment.world()
    tasks = world.tasks(random.fold(run.state["key"], seed), 0, 1, "test")
    low, high = float(run.world.observation_space.low[0]), float(run.world.observation_space.high[0])
    device = run.state["key"].device
    x = (
        torch.linspace(low, high, 200, dtype=torch.float32, device=device)
        .reshape(1, 1, -1, 1)
        .expand(len(run.experiment.learners), 1, -1, 1)
    )
    p, inputs = agent.effective_params(run.state), {"observation": x}
    values = {
        "x": x,
        "before": agent.answer(p, tasks["support"], inputs, 0),
        "after": agent.answer(p, tasks["support"], inputs),
        "support_x": tasks["support"]["observation"],
        "support_y": tasks["support"]["target"],
        "query_x": tasks["query"]["observation"],
        "query_y": tasks["query"]["target"],
    }
    flat: dict[str, NDArray[np.float64]] = tree.map(lambda value: value[0].flatten().double().cpu().numpy(), values)
    return flat


def _draw_predictions(axes: Axes, line: dict[str, NDArray[np.float64]]) -> None:
    axes.plot(line["x"], line["before"], color="#555555", linestyle="--", label="before")
    axes.plot(line["x"], line["after"], color="#D55E00", linewidth=2, label="after")
    axes.plot(line["support_x"], line["support_y"], "o", color="#0072B2", label="support")
    axes.plot(line["query_x"], line["query_y"], ".", color="#009E73", label="query")
    axes.set(xlabel="x", ylabel="y", title="one held-out task")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
