"""Experiment trackers: TensorBoard and Weights & Biases.

Each learner is a run of its own there, with CleanRL's metric names, so that dashboards made for those work. A tracker
logs every step at most once, even if the process is killed: the step is written to the run folder before anything is
sent, and a resumed run drops the lines up to that step, which it computes again. So a kill may lose the last lines of a
tracker (W&B writes its own about every 15 seconds) but never repeats a line; `metrics.jsonl` has all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rlmeta.errors import CheckpointError, SettingError, missing_extra, require_extra
from rlmeta.runs.files import put

if TYPE_CHECKING:
    from rlmeta.runs.experiment import Experiment
    from rlmeta.runs.run import Run

LONGEST_NAME = 100
"""Characters of a learner's name: a folder's may have 255, and W&B's 128 with those of the task and the agent."""

TENSORBOARD, WANDB = "tensorboard.json", "wandb.json"
"""Files in the run's folder with each tracker's state, which survives a kill."""


class Tracker(Protocol):
    """Protocol of an experiment tracker, to which metrics are logged."""

    def log(self, step: int, metrics: dict[str, list[float]]) -> None:
        """Log one line of metrics.

        Args:
            step: environment steps of each learner; a step that is not above the last one is dropped.
            metrics: a number for every learner, `{name: [S]}`; numbers that are not finite are left out.
        """

    def close(self) -> None:
        """Flush and close; nothing is logged afterwards."""


TrackerFactory: TypeAlias = "Callable[[Run], Tracker]"
"""Function that opens a tracker for a run whose folder exists."""


def to_tensorboard() -> TrackerFactory:
    """Log to TensorBoard: `rl.train(..., out="runs/first", trackers=[to_tensorboard()])`."""
    require_extra("tensorboard", "tensorboard", "logging to TensorBoard")
    return lambda run: TensorBoardTracker(_folder(run, "TensorBoard"), run.experiment, lambda: run.seconds)


def to_wandb(project: str, *, group: str | None = None, entity: str | None = None) -> TrackerFactory:
    """Log to Weights & Biases; the arguments are those of `WandbTracker`."""
    require_extra("wandb", "wandb", "logging to Weights & Biases")
    return lambda run: WandbTracker(
        run.experiment, project, group, folder=_folder(run, "W&B"), entity=entity, seconds=lambda: run.seconds
    )


def trackers_of(folder: str | os.PathLike[str], wandb: str = "") -> list[TrackerFactory]:
    """Trackers of a resumed run: TensorBoard if its folder has such files, W&B only if the user asks for it.

    A folder may come from somebody else, so its content alone never sends anything to W&B.

    Args:
        folder: the run's folder.
        wandb: the W&B project, or `ENTITY/PROJECT`, as the user gives it; '' for none.
    """
    chosen = [to_tensorboard()] if (Path(folder) / TENSORBOARD).is_file() else []
    return [*chosen, *wandb_of(wandb)]


def wandb_of(named: str) -> list[TrackerFactory]:
    """Tracker factories for a W&B project, `PROJECT` or `ENTITY/PROJECT`; [] for ''.

    Raises:
        SettingError: the text is neither.
    """
    entity, slash, project = named.rpartition("/")
    if named and (not project or "/" in entity or (slash and not entity)):
        raise SettingError(f"W&B project {named!r}: expected PROJECT, or ENTITY/PROJECT")
    return [to_wandb(project, entity=entity or None)] if named else []


def logged_to_wandb(folder: str | os.PathLike[str]) -> str:
    """W&B project, `PROJECT` or `ENTITY/PROJECT`, that the run in a folder was logged to; '' for none.

    Raises:
        CheckpointError: the tracker's file in the folder cannot be read.
    """
    journal = _Journal(Path(folder) / WANDB)
    if not journal.path.is_file():
        return ""
    journal.open({"project": "", "entity": None})
    entity, project = journal.content["entity"], journal.content["project"]
    return f"{entity}/{project}" if entity else str(project)


class TensorBoardTracker:
    """Logs to TensorBoard, one TensorBoard run per learner in `<folder>/tensorboard/<setting and seed>`.

    Args:
        folder: the run's folder.
        experiment: the experiment that is trained.
        seconds: returns the run's training time so far, for `charts/SPS`.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], experiment: Experiment, seconds: Callable[[], float] | None = None
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "tensorboard", "logging to TensorBoard") from error
        self._seconds = seconds
        self._journal = _Journal(Path(folder) / TENSORBOARD)
        new = self._journal.open({})
        self._writers = [SummaryWriter(Path(folder) / "tensorboard" / name) for name in learner_names(experiment)]
        if new:
            for index, writer in enumerate(self._writers):
                writer.add_text("hyperparameters", _markdown(_hyperparameters(experiment, index)))

    def log(self, step: int, metrics: dict[str, list[float]]) -> None:
        """Write one line of metrics; it has reached the operating system on return."""
        if not self._journal.claim(step):
            return
        metrics = _with_speed(metrics, step, len(self._writers), self._seconds)
        for writer, line in zip(self._writers, _lines(metrics, len(self._writers)), strict=True):
            for name, value in line.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers:
            writer.close()


class WandbTracker:
    """Logs to Weights & Biases, one W&B run per learner, all in one group and from this process.

    The key comes from `wandb login` or WANDB_API_KEY; `WANDB_MODE=offline` writes to `<folder>/wandb` for a later
    `wandb sync`. A resumed run continues the W&B runs whose ids are in `<folder>/wandb.json`. If W&B fails during
    training, a warning is shown and training goes on without it.

    Args:
        experiment: the experiment that is trained.
        project: W&B project.
        group: W&B group of all learners; by default named after the task, the agent and the folder.
        folder: the run's folder.
        entity: W&B user or team; by default the key's own.
        seconds: returns the run's training time so far, for `charts/SPS`.

    Raises:
        MissingExtraError: wandb is not installed.
        SettingError: W&B refuses or can't be reached, or the run was logged to another project.
    """

    def __init__(
        self,
        experiment: Experiment,
        project: str,
        group: str | None = None,
        *,
        folder: str | os.PathLike[str],
        entity: str | None = None,
        seconds: Callable[[], float] | None = None,
    ) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise missing_extra("wandb", "wandb", "logging to Weights & Biases") from error
        folder = Path(folder)
        config = experiment.config()
        about = f"{config['env_id']}__{config['exp_name']}"
        where = {"project": project, "entity": entity}
        ids = [secrets.token_hex(8) for _ in experiment.learners]
        self._journal = _Journal(folder / WANDB)
        self._journal.open({**where, "group": (group or f"{about}__{folder.resolve().name}")[:128], "ids": ids})
        saved = self._journal.content
        if {name: saved[name] for name in where} != where or group not in (None, saved["group"]):
            raise SettingError(
                f"{folder} was logged to W&B project {saved['project']!r}, entity {saved['entity']!r}, group "
                f"{saved['group']!r}: give the same, or remove {self._journal.path} to log to new W&B runs"
            )
        self._seconds = seconds
        self._failed = False
        self._handled = sys.exc_info()[1]
        self._runs: list[Any] = []
        for index, name in enumerate(learner_names(experiment)):
            self._runs.append(self._start(index, f"{about}__{name}", _hyperparameters(experiment, index)))
        if urls := self.urls:
            others = f" and {len(urls) - 1} more in group {saved['group']}" if len(urls) > 1 else ""
            print(f"W&B: {urls[0]}{others}", file=sys.stderr)

    def _start(self, index: int, name: str, config: dict[str, Any]) -> Any:
        """Start or continue the W&B run of one learner."""
        import wandb

        saved, folder = self._journal.content, self._journal.path.parent
        try:
            run = wandb.init(
                project=saved["project"],
                entity=saved["entity"],
                group=saved["group"],
                id=saved["ids"][index],
                name=name[:128],
                config={key: value if _storable(value) else str(value) for key, value in config.items()},
                dir=str(folder),
                resume="allow",
                reinit="create_new",
                # console output and system statistics are logged once per process, not for each learner
                settings=wandb.Settings(console="off", save_code=False, silent=True, x_disable_stats=index > 0),
            )
        except (wandb.Error, OSError) as error:
            self.close()
            reason = str(error).splitlines()[0].rstrip(". ")
            raise SettingError(
                f"W&B run {index + 1} of {len(saved['ids'])} can't start ({reason}): `wandb login` or set "
                "WANDB_API_KEY, or WANDB_MODE=offline to log into the run folder"
            ) from error
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        return run

    @property
    def urls(self) -> list[str]:
        """URL of each learner's W&B run; [] offline."""
        return [run.url for run in self._runs if not (run.offline or run.disabled) and run.url]

    def log(self, step: int, metrics: dict[str, list[float]]) -> None:
        """Log one line of metrics."""
        if self._failed or not self._journal.claim(step):
            return
        metrics = _with_speed(metrics, step, len(self._runs), self._seconds)
        with self._survive("logging"):
            for run, line in zip(self._runs, _lines(metrics, len(self._runs)), strict=True):
                if line:
                    run.log({"global_step": step, **line}, step=step, commit=True)

    def close(self) -> None:
        """Finish the W&B runs, marked as failed if an exception is propagating."""
        failing = sys.exc_info()[1] not in (None, self._handled)
        for run in self._runs:
            with self._survive("finishing"):
                run.finish(exit_code=1 if failing else 0)
        self._runs = []

    @contextlib.contextmanager
    def _survive(self, doing: str) -> Iterator[None]:
        """Turn an error of W&B into a warning, as training does not depend on it."""
        try:
            yield
        except Exception as error:  # wandb raises errors of sockets and of its mailbox, besides its own
            if not self._failed:
                warnings.warn(
                    f"W&B failed while {doing} ({type(error).__name__}: {error}); the run goes on without it, "
                    "metrics.jsonl has everything",
                    stacklevel=4,
                )
            self._failed = True


def learner_names(experiment: Experiment) -> list[str]:
    """Unique name for every learner, from its label and seed, that is valid as a folder name."""
    names = []
    for label, (_, seed) in zip(experiment.learner_labels, experiment.learners, strict=True):
        name = re.sub(r"[^\w.,=+-]+", "_", label.replace(", ", ","))
        names.append(f"{name}__seed={seed}" if name else f"seed={seed}")
    if len(set(names)) == len(names) and max(map(len, names)) <= LONGEST_NAME:
        return names
    names = [f"learner={i}__{name}" for i, name in enumerate(names)]
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 22]}..{name[-20:]}" for name in names]


class _Journal:
    """A tracker's state in a small file of the run folder, which survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}

    def open(self, first: dict[str, Any]) -> bool:
        """Read the file, or create it with the content `first`; returns whether it is new."""
        try:
            self.content = json.loads(self.path.read_bytes())
            if not {"last_step", *first} <= self.content.keys():
                raise ValueError("entries are missing")
            return False
        except FileNotFoundError:
            self._write({"last_step": -1, **first})
            return True
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} can't be read ({error}): restore it from a copy, or remove it to log from here on as new"
            ) from error

    def claim(self, step: int) -> bool:
        """Claim a step for logging: false if it was claimed before, also by a process that was killed since."""
        if step <= self.content["last_step"]:
            return False
        self._write({**self.content, "last_step": step})
        return True

    def _write(self, content: dict[str, Any]) -> None:
        put(self.path, json.dumps(content))
        self.content = content


def _folder(run: Run, what: str) -> Path:
    """The run's folder, which a tracker needs so that a resumed run logs nothing twice; `what` names the tracker."""
    if run.folder is None:
        raise SettingError(f"logging to {what} needs a run folder, the run is kept in memory: give out=")
    return run.folder


def _with_speed(
    metrics: dict[str, list[float]], step: int, learners: int, seconds: Callable[[], float] | None
) -> dict[str, list[float]]:
    """Add `charts/SPS`, environment steps per second of all learners together, to the metrics."""
    passed = seconds() if seconds else 0.0
    return {**metrics, "charts/SPS": [step * learners / passed] * learners} if passed > 0 else metrics


def _lines(metrics: dict[str, list[float]], learners: int) -> list[dict[str, float]]:
    """Split metrics by learner, and drop those that are not finite."""
    for name, values in metrics.items():
        if len(values) != learners:
            raise SettingError(f"metric {name!r} has {len(values)} values, expected one for each of {learners}")
    return [{name: values[i] for name, values in metrics.items() if math.isfinite(values[i])} for i in range(learners)]


def _hyperparameters(experiment: Experiment, index: int) -> dict[str, Any]:
    """Hyperparameters of one learner under CleanRL's names, with its settings and those of its task."""
    config = experiment.config()
    return {
        "env_id": config["env_id"],
        "exp_name": config["exp_name"],
        "seed": experiment.learners[index][1],
        "setting": experiment.learner_labels[index],
        "total_timesteps": config["budget"]["steps"],
        "methods": config["methods"],
        **{f"env.{name}": value for name, value in config["task"].get("settings", {}).items()},
        **config["variants"][index // experiment.repeats],
    }


def _storable(value: Any) -> bool:
    """Whether a value can be stored in W&B's configuration, whose JSON has no infinities."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _markdown(table: dict[str, Any]) -> str:
    rows = [f"|{name}|{str(value).replace('|', chr(92) + '|')}|" for name, value in table.items()]
    return "\n".join(["|setting|value|", "|-|-|", *rows])
