"""Folder of a plan with several groups: the saved plan with a checksum, and a run folder for every group."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from rlmeta.cli.options import Options
from rlmeta.cli.plan import Plan
from rlmeta.envs import trusted
from rlmeta.errors import CheckpointError
from rlmeta.learning.settings import check_names, per_learner_names
from rlmeta.runs import folder as run_folder
from rlmeta.runs import grammar
from rlmeta.runs.experiment import Budget
from rlmeta.runs.files import put, read_bytes, sealed_lines, unsealed_lines
from rlmeta.runs.shipped import agent_class

PLAN, PLAN_LIMIT = run_folder.PLAN, 64 << 20


def begin(plan: Plan, folder: Path) -> None:
    """Create the folder of a plan with several groups and save the plan in it; does nothing for a single group.

    Raises:
        RunExistsError: the folder is not empty, or another command is creating it.
        SettingError: the folder cannot be created, or the plan cannot be written as TOML.
        CheckpointError: the plan cannot be written.
    """
    if len(plan.groups) > 1:
        content = run_folder.encoded(
            {
                "agent": plan.agent,
                "task": plan.task,
                "env": plan.env,
                "lifelong": plan.lifelong,
                "population_settings": plan.population_settings,
                "reward_settings": plan.reward_settings,
                "flags": plan.texts,
            }
        )
        run_folder.create(folder)
        with run_folder.lock(folder):
            run_folder.clear(folder)
            put(folder / PLAN, sealed_lines(content))


def is_plan(folder: Path) -> bool:
    """Whether the folder holds the groups of a plan."""
    return os.path.lexists(folder / PLAN)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, or the groups of a plan."""
    return is_plan(folder) or (folder / run_folder.CONFIG).is_file()


def from_folder(folder: Path) -> Plan:
    """Load the plan that is saved in a folder.

    Raises:
        CheckpointError: the file is not a plan, or was changed, or the folder contains links.
    """
    path = folder / PLAN
    run_folder.check_plain(folder)
    try:
        content = tomllib.loads(unsealed_lines(read_bytes(path, PLAN_LIMIT)).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged, or not as the command wrote it ({error}): restore it from a copy, or train anew with "
            "the change"
        ) from error
    kinds = {"agent": str, "task": str, "env": dict, "lifelong": dict, "population_settings": dict}
    kinds |= {"reward_settings": dict, "flags": dict}
    groups: dict[str, Any] = {"run": Options, "budget": Budget, "settings": None}
    fits = set(content) == set(kinds) and all(isinstance(content[name], kind) for name, kind in kinds.items())
    nested = ("lifelong", "reward_settings")
    fits = fits and all(isinstance(table, dict) for name in nested for table in content[name].values())
    fits = fits and set(content["flags"]) == set(groups)
    if not fits or not all(_are_texts(table) for table in content["flags"].values()):
        raise CheckpointError(f"{path} is not the plan of a run: restore it from a copy")
    with trusted.reading(str(path)):
        groups["settings"] = agent_class(content["agent"])
    for name, cls in groups.items():
        _check_flags(cls, content["flags"][name], f"{path} [flags.{name}]")
    texts = content.pop("flags")
    return Plan(**content, texts=texts, file=str(path))


def _are_texts(table: Any) -> bool:
    return isinstance(table, dict) and all(isinstance(text, str) for text in table.values())


def _check_flags(cls: Any, texts: dict[str, str], where: str) -> None:
    """Check that texts are the flags of a group: no unknown, no missing ones."""
    check_names(cls, texts, where)
    lacking = [f.name for f in dataclasses.fields(cls) if f.name not in texts and f.default is not None]
    if lacking:
        raise CheckpointError(f"{where} lacks {lacking[0]!r}: restore it from a copy")


def group_folder(folder: Path, label: str) -> Path:
    """Folder of a group; the plan's own folder for a single group."""
    return folder / re.sub(r"[^\w=.,-]+", "-", label)


def members(folder: Path) -> dict[str, Path]:
    """Folders of the runs in a folder, by group label: the folder itself, or the plan's groups that have begun."""
    if not is_plan(folder):
        return {"": folder}
    groups = from_folder(folder).groups
    folders = {label: group_folder(folder, label) for label in groups}
    begun = {label: where for label, where in folders.items() if (where / run_folder.CONFIG).is_file()}
    for label, where in begun.items():
        check_settings(where, groups[label])
    return begun


def check_settings(folder: Path, settings: Any) -> None:
    """Refuse a group's folder whose run has other settings than the plan, as after two folders were swapped.

    Per-learner settings, and settings that are code or data, are not compared.

    Raises:
        CheckpointError: a setting differs.
    """
    tables = run_folder.read_config(folder).get("variants")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return  # loading the run reports the error
    left_out = {*per_learner_names(type(settings)), "demonstrations"}
    for name in (f.name for f in dataclasses.fields(settings) if f.name not in left_out):
        planned = getattr(settings, name)
        values = planned if isinstance(planned, tuple) else (planned,)
        saved = [tuple(value) if isinstance(value, list) else value for value in (table.get(name) for table in tables)]
        others = [value for value in saved if value != planned]
        if others and all(isinstance(value, bool | int | float | str) for value in values):
            raise CheckpointError(
                f"{folder} holds a run with {name}={grammar.text_of(others[0])}, the plan above it says "
                f"{grammar.text_of(planned)}: put the folder of the group back"
            )
