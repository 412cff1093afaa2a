"""`rlmeta adapt RUN`: how a meta-learner adapts to held-out tasks, as a table and a picture.

The score of every task before adaptation and after each inner step, its mean over tasks and seeds with a 95 % interval:
1.96 standard errors over all tasks (of all seeds), as few-shot learning reports it. For regression of one variable the
picture shows a task before and after as well.
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
    """The adaptation."""

    tasks: int = 600
    """Held-out tasks of each learner."""
    steps: int = 10
    """Inner steps to follow (a learned optimizer's horizon asks for more)."""
    seed: int = 1
    """Another seed draws other tasks."""

    def __post_init__(self) -> None:
        for name, least in (("tasks", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"--{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Adaptation:
    """Scores of every learner on its tasks over the inner steps."""

    scores: NDArray[np.float64]
    """`[S, E, steps + 1]`"""
    name: str
    """Of the score."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over learners and tasks, `[steps + 1]`."""
        return self.scores.mean((0, 1))

    @property
    def not_finite(self) -> int:
        """Tasks, of all learners, whose last score is not finite."""
        return int((~np.isfinite(self.scores[..., -1])).sum())

    @property
    def interval(self) -> NDArray[np.float64]:
        """Half of the 95 % interval of the mean, `[steps + 1]`."""
        flat = self.scores.reshape(-1, self.scores.shape[-1])
        return 1.96 * flat.std(0, ddof=min(1, len(flat) - 1)) / np.sqrt(len(flat))


@undisturbed()
def adapt(run: Run, tasks: int, steps: int, seed: int = 1) -> Adaptation:
    """Adapt every learner of a run to held-out tasks.

    Args:
        run: of a meta-learner.
        tasks: of each learner.
        steps: inner steps.
        seed: another one draws other tasks.

    Raises:
        SettingError: the run's learner takes no inner steps.
    """
    if not isinstance(run.agent, Stepwise):
        raise SettingError(f"a run of {run.experiment.agent_name} does not adapt step by step: give one of MAML")
    agent: Any = run.agent
    world = run.experiment.world()
    key = random.fold(random.fold(run.state["key"], "adaptation"), seed)
    found = agent.adaptation(agent.seen(run.state), world, key, tasks, steps)
    return Adaptation(found.cpu().numpy(), agent.score.name)


def table(found: Adaptation, title: str) -> Table:
    """The mean score against the inner steps; of many steps about ten."""
    made = Table(title=title, title_justify="left")
    for column in ("inner steps", f"mean {found.name}", "± 95 %"):
        made.add_column(column, justify="right")
    last = found.scores.shape[-1] - 1
    for step in sorted({round(last * i / 10) for i in range(11)}):
        made.add_row(str(step), f"{found.mean[step]:.4g}", f"{found.interval[step]:.2g}")
    if found.not_finite:
        made.caption = f"{found.not_finite} of {found.scores[..., 0].size} tasks end without a finite score"
    return made


def write(run: Run, found: Adaptation, folder: Path, seed: int = 1) -> list[Path]:
    """Put the figures into `adaptation.json` and, with matplotlib, a picture into `adaptation.png`."""
    record = {
        "score": found.name,
        "tasks": found.scores.shape[1],
        "not_finite": found.not_finite,
        "mean": found.mean.tolist(),
        "interval": found.interval.tolist(),
        "learners": found.scores.mean(1).tolist(),
    }
    (folder / "adaptation.json").write_text(json.dumps(record, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture: {missing_extra('matplotlib', 'plot', 'a picture')}")
        return [folder / "adaptation.json"]
    line = _line(run, seed)
    figure = Figure(figsize=(10 if line else 5, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2 if line else 1, squeeze=False)[0]
    _draw_curve(axes[0], found)
    if line:
        _draw_line(axes[1], line)
    figure.savefig(folder / "adaptation.png", dpi=120)
    return [folder / "adaptation.json", folder / "adaptation.png"]


def _draw_curve(axes: Axes, found: Adaptation) -> None:
    steps = np.arange(found.scores.shape[-1])
    for learner in found.scores.mean(1):
        axes.plot(steps, learner, color="#0072B2", linewidth=0.6, alpha=0.4)
    axes.plot(steps, found.mean, color="#0072B2", linewidth=2)
    low, high = found.mean - found.interval, found.mean + found.interval
    axes.fill_between(steps, low, high, color="#0072B2", alpha=0.25)
    axes.set(xlabel="inner steps", ylabel=f"mean {found.name}", title="held-out tasks")
    axes.grid(alpha=0.3)


@undisturbed()
@torch.no_grad()
def _line(run: Run, seed: int) -> dict[str, NDArray[np.float64]]:
    """One task of the first learner, its points, and the predictions before and after; {} unless it is one line."""
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
    p, inputs = agent.seen(run.state), {"observation": x}
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


def _draw_line(axes: Axes, line: dict[str, NDArray[np.float64]]) -> None:
    axes.plot(line["x"], line["before"], color="#555555", linestyle="--", label="before")
    axes.plot(line["x"], line["after"], color="#D55E00", linewidth=2, label="after")
    axes.plot(line["support_x"], line["support_y"], "o", color="#0072B2", label="support")
    axes.plot(line["query_x"], line["query_y"], ".", color="#009E73", label="query")
    axes.set(xlabel="x", ylabel="y", title="one held-out task")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
