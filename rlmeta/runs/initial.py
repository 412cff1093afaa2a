"""Initial weights from another run: fine-tuning, transfer, or new settings for what was learned already."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.state import Params

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


def take_weights(run: Run, source: Run) -> None:
    """Put a run's weights, buffers and running statistics in the place of another's initial ones.

    What both have under one name and shape is taken; the rest, such as the critics of an agent that begins with a
    cloned policy, stays fresh, and a warning names it. Moments of optimizers, counts and random numbers begin anew.

    Args:
        run: at its start.
        source: its learners are taken one for each where there are as many, else its best for all.

    Raises:
        SettingError: the network that acts has another form, or only one of them normalises its observations.
    """
    taken = source.agent.seen(source.state)
    rows = _rows(run, source)
    p = run.state["params"]
    _check_normalisers(p, taken, source)
    weights, fresh_weights = _replaced(p["weights"], taken, rows)
    buffers, fresh_buffers = _replaced(p["buffers"], taken, rows)
    names = {name.split(".")[0] for name in p["weights"]}
    whole = names - {name.split(".")[0] for name in fresh_weights}
    if not whole:
        raise SettingError(
            f"init: no network of {run.experiment.agent_name} has the names and shapes of one of {_named(source)} "
            f"({', '.join(sorted({name.split('.')[0] for name in taken['weights']}))}): use the same network and spaces"
        )
    fresh = sorted({name.split(".")[0] for name in (*fresh_weights, *fresh_buffers)})
    if fresh:
        warnings.warn(
            f"init: {', '.join(fresh)} of {run.experiment.agent_name} begin anew, {_named(source)} has none of their "
            "form",
            RuntimeWarning,
            stacklevel=2,
        )
    normalisers = dict(p["normalisers"])
    if "observation" in normalisers:
        normalisers["observation"] = tree.map(lambda value: value[rows].clone(), taken["normalisers"]["observation"])
    run.begun_from = str(source.folder or "a run in memory")
    packed = Packed.of(weights, run.state["key"].dim())
    run.state["params"] = {**p, "weights": packed, "buffers": buffers, "normalisers": normalisers}


def _rows(run: Run, source: Run) -> Tensor:
    """Which of the source's learners each learner begins as, `[S]`."""
    learners, others = len(run.experiment.learners), len(source.experiment.learners)
    if learners == others:
        return torch.arange(learners)
    return torch.full((learners,), source.chosen_learner(None))


def _replaced(own: dict[str, Tensor], taken: Params, rows: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with those of the same names and shapes taken, and the names of the others."""
    theirs = {**taken["buffers"], **taken["weights"]}
    fits = {name for name, value in own.items() if name in theirs and theirs[name].shape[1:] == value.shape[1:]}
    replaced = {
        name: theirs[name][rows].to(value.device, value.dtype) if name in fits else value for name, value in own.items()
    }
    return replaced, [name for name in own if name not in fits]


def _check_normalisers(p: Params, taken: Params, source: Run) -> None:
    """Refuse weights that were trained on observations of another scale than they will see."""
    ours, theirs = "observation" in p["normalisers"], "observation" in taken["normalisers"]
    if ours != theirs:
        what, instead = ("with", "true") if theirs else ("without", "false")
        raise SettingError(
            f"init: {_named(source)} was trained {what} normalise_observation: set normalise_observation to {instead}"
        )


def _named(source: Run) -> str:
    where = f" in {Path(source.folder)}" if source.folder else ""
    return f"the {source.experiment.agent_name}{where}"
