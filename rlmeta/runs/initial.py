"""Warm start: initial weights from another run, for fine-tuning, transfer or training on with other settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.comparisons import object_name
from rlmeta.learning.state import Params
from rlmeta.learning.targets import Copy, with_copy

if TYPE_CHECKING:
    from rlmeta.runs.run import Run


SAME = (
    *("activation", "action_bounds", "share_network", "state_dependent_exploration", "task_heads", "memory", "sees"),
    *("network", "output_scale", "preprocess", "attention_heads", "distribution", "v_min", "v_max"),
)
"""Settings that change a network's output but not its parameters' names and shapes; both runs need the same."""


def take_weights(run: Run, source: Run) -> None:
    """Copy another run's weights, buffers and normalisation statistics into a run that has not started training.

    A network is copied if the source has one with the same parameter names and shapes. Any other network, such as the
    critic of an agent whose policy was cloned, keeps its initial weights, and a warning names it. A target network that
    the source lacks becomes a copy of its network. Optimizer moments, counters and random keys are not copied.

    Args:
        run: the run whose initial parameters are replaced.
        source: the run to copy from: learner i to learner i if both have equally many, else its best learner to all.

    Raises:
        SettingError: the acting network has other shapes or settings, or only one of the runs normalises observations.
    """
    taken, rows, p = source.agent.effective_params(source.state), _rows(run, source), run.state["params"]
    own = {**p["weights"], **p["buffers"]}
    theirs = {**taken["buffers"], **taken["weights"]}
    networks = list(dict.fromkeys(name.split(".")[0] for name in own))
    whole = [name for name in networks if _fits(name, own, theirs)]
    learner: Any = _inner(run)
    copies: dict[str, Copy] = {copy.name: copy for copy in getattr(learner, "copies", ())}
    _check_acting(run, source, whole, copies)
    _check_same(run, source)
    _check_normalisers(p, taken, source)
    _warn_of_fresh(run, source, [name for name in networks if name not in whole and name not in copies])

    def replaced(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: theirs[name][rows].to(value.device, value.dtype) if name.split(".")[0] in whole else value
            for name, value in tensors.items()
        }

    weights, buffers = Packed.of(replaced(p["weights"]), run.state["key"].dim()), replaced(p["buffers"])
    new = {**p, "weights": weights, "buffers": buffers, "normalisers": dict(p["normalisers"])}
    for copy in copies.values():
        new = new if copy.name in whole else with_copy(new, copy)
    if "observation" in new["normalisers"]:
        statistics = taken["normalisers"]["observation"]
        new["normalisers"]["observation"] = tree.map(lambda value: value[rows].clone(), statistics)
    run.begun_from = str(source.folder or "a run in memory")
    run.state["params"] = new


def _inner(run: Run) -> Any:
    """The learner that owns the weights: a meta-learner's inner learner."""
    return getattr(run.agent, "inner", run.agent)


def _fits(network: str, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether all tensors of a network are also in `theirs`, with the same names and shapes."""
    names = [name for name in own if name.split(".")[0] == network]
    return all(name in theirs and theirs[name].shape[1:] == own[name].shape[1:] for name in names)


def _check_acting(run: Run, source: Run, whole: list[str], copies: dict[str, Copy]) -> None:
    """Refuse a source that lacks the network that acts or predicts."""
    acting = getattr(_inner(run), "acting_network", None) or next(iter(run.state["params"]["weights"])).split(".")[0]
    acting = copies[acting].source if acting in copies else acting
    if acting not in whole:
        raise SettingError(
            f"init: {_named(source)} has no network {acting!r} of the names and shapes that "
            f"{run.experiment.agent_name}'s has: use the same network, and spaces of the same sizes"
        )


def _check_same(run: Run, source: Run) -> None:
    """Refuse weights that were trained under settings with which they compute something else."""
    ours, theirs = (_settings(each) for each in (run, source))
    for name in SAME:
        before, now = (getattr(settings, name, None) for settings in (theirs, ours))
        before, now = (object_name(value) if callable(value) else value for value in (before, now))
        before, now = (tuple(sorted(value)) if isinstance(value, tuple) else value for value in (before, now))
        if before is not None and now is not None and before != now:
            raise SettingError(
                f"init: {_named(source)} was trained with {name} = {before!r}: it is {now!r} here, set the same"
            )
    heads = [type(getattr(_inner(each), "head", None)) for each in (source, run)]
    if type(None) not in heads and heads[0] is not heads[1]:
        raise SettingError(
            f"init: the policy of {_named(source)} ends in {heads[0].__name__}, that of "
            f"{run.experiment.agent_name} in {heads[1].__name__}: its weights would mean something else"
        )


def _settings(run: Run) -> Any:
    settings = run.experiment.variants[0]
    return getattr(settings, "learner", None) or settings


def _warn_of_fresh(run: Run, source: Run, fresh: list[str]) -> None:
    """Warn of the networks that keep their initial weights."""
    if fresh:
        warnings.warn(
            f"init: {', '.join(fresh)} of {run.experiment.agent_name} keep their initial weights, {_named(source)} has "
            "no networks of these names and shapes",
            RuntimeWarning,
            stacklevel=2,
        )


def _rows(run: Run, source: Run) -> Tensor:
    """Index `[S]` of the source's learner that each learner copies."""
    learners, others = len(run.experiment.learners), len(source.experiment.learners)
    if learners == others:
        return torch.arange(learners)
    return torch.full((learners,), source.chosen_learner(None))


def _check_normalisers(p: Params, taken: Params, source: Run) -> None:
    """Check that a run and the run of its initial weights agree on the normalisation of observations."""
    ours, theirs = "observation" in p["normalisers"], "observation" in taken["normalisers"]
    if ours != theirs:
        what, instead = ("with", "true") if theirs else ("without", "false")
        raise SettingError(
            f"init: {_named(source)} was trained {what} normalise_observation: set normalise_observation to {instead}"
        )
    if ours:
        sizes = [tree.leaves(params["normalisers"]["observation"]) for params in (p, taken)]
        if any(a.shape[1:] != b.shape[1:] for a, b in zip(*sizes, strict=True)):
            raise SettingError(f"init: {_named(source)} has observations of another shape: use the same spaces")


def _named(source: Run) -> str:
    where = f" in {Path(source.folder)}" if source.folder else ""
    return f"the {source.experiment.agent_name}{where}"
