"""Train or resume the groups of a plan, one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rlmeta import api
from rlmeta.agents.agent import NetworkFactory
from rlmeta.cli.plan import Plan
from rlmeta.cli.plan_folder import check_settings, group_folder, is_run
from rlmeta.cli.results import print_ends, print_results
from rlmeta.cli.terminal import say
from rlmeta.envs.native import NativeEnv
from rlmeta.errors import CheckpointError
from rlmeta.learning.method import Method
from rlmeta.report.films import films
from rlmeta.report.trackers import logged_to_wandb, trackers_of
from rlmeta.runs import checkpoint, user_code
from rlmeta.runs import folder as run_folder
from rlmeta.runs import train as training
from rlmeta.runs.run import Run, load


def run_groups(plan: Plan, folder: Path, resume_flags: str, inexact: bool = False, header: str = "") -> int:
    """Train or resume every group of a plan and print the results; returns the exit status.

    Args:
        plan: the plan.
        folder: the folder of the whole plan.
        resume_flags: flags that a resume needs for user code, for the hint after an interruption.
        inexact: as for `rlmeta resume`.
        header: printed before the first group; '' for none.
    """
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    try:
        with told_on_sigterm(folder, resume_flags):
            for label in plan.groups:
                runs.append(run := train(plan, label, folder, inexact, "" if runs else header))
                if run.stopped == "interrupted":
                    raise KeyboardInterrupt
                rows += [{**row, "setting": ", ".join(filter(None, (label, row["setting"])))} for row in run.summary()]
    except KeyboardInterrupt:
        return interrupted(folder, resume_flags)
    print_results(rows)
    for run in runs:
        print_ends(run)
    say(f"saved in {folder}")
    return 0


def train(plan: Plan, label: str, folder: Path, inexact: bool = False, header: str = "") -> Run:
    """Train one group of a plan; resume it if it has a checkpoint, load it if it has ended.

    Args:
        plan: the plan.
        label: the group's label.
        folder: the folder of the whole plan.
        inexact: as for `rlmeta resume`.
        header: printed once the run is validated.

    Raises:
        CheckpointError: a group's folder is a link, or its files cannot be read.
    """
    settings, where, quiet = plan.groups[label], group_folder(folder, label), plan.options.quiet
    if label:
        run_folder.check_plain(folder)
    if label and checkpoint.is_saved(where / "state"):
        check_settings(where, settings)
        return _go_on(plan, settings, where, inexact)
    trackers = plan.trackers()
    if plan.file and plan.options.wandb and not plan.wandb:
        say_wandb(plan.file, plan.options.wandb_project)
    run = training.prepare(
        settings,
        plan.problem(),
        plan.budget,
        seeds=plan.seeds,
        lifelong=plan.methods(),
        population=plan.population(),
        out=where,
        device=plan.options.device,
        threads=plan.options.threads,
        init=plan.options.init or None,
    )
    for line in filter(None, (header, label if not quiet else "")):
        say(line)
    filming = films(run, plan.options.video_every)
    return training.go(run, listeners=[*api.listeners(trackers, progress=not quiet), *filming])


def _go_on(plan: Plan, settings: Any, where: Path, inexact: bool) -> Run:
    """Resume a group that was begun, or load one that has ended."""
    env = None if isinstance(plan.source, str) else plan.source
    if isinstance(env, NativeEnv):
        env = dataclasses.replace(env, **plan.env)  # type: ignore[type-var]
    code: dict[str, Any] = {
        "agent": user_code.own_class(settings),
        "network": getattr(settings, "network", None),
        "env": env,
        "lifelong": plan.methods(),
        "own": {"rewards": settings.rewards} if getattr(settings, "rewards", ()) else {},
    }
    if (where / run_folder.SUMMARY).is_file():
        return load(where, **code)
    return go_on(where, **code, wandb=plan.wandb, progress=not plan.options.quiet, inexact=inexact)


def go_on(
    folder: Path,
    *,
    agent: type | None,
    network: NetworkFactory | None,
    env: Any,
    lifelong: Sequence[Method],
    own: Mapping[str, Any],
    wandb: str,
    progress: bool,
    inexact: bool,
    steps: int = 0,
) -> Run:
    """Resume a single run, with TensorBoard if the run used it, and with W&B if the command asks for it.

    Args are those of `rlmeta.api.resume`; `wandb` is the W&B project or ''.

    Raises:
        CheckpointError: there is no run to resume, or the folder contains links.
    """
    if not is_run(folder):
        raise CheckpointError(f"{folder} is not the folder of a run: it has no {run_folder.CONFIG}")
    run_folder.check_plain(folder)
    trackers = trackers_of(folder, wandb)
    if not wandb and (had := logged_to_wandb(folder)):
        say_wandb(str(folder), had)
    return api.resume(
        folder,
        agent=agent,
        network=network,
        env=env,
        lifelong=lifelong,
        own=own,
        trackers=trackers,
        progress=progress,
        inexact=inexact,
        steps=steps or None,
    )


def say_wandb(where: str, had: str) -> None:
    """Print that a run was logged to W&B, that this resume is not, and which flag would do so."""
    text = shlex.quote(had)
    say(f"note: {where} says it is logged to W&B as {text}; not now: resume with --wandb {text}", error=True)


def interrupted(folder: Path, resume_flags: str) -> int:
    """Print the command that resumes an interrupted run; returns the exit status."""
    say(_how_to_resume("interrupted", folder, resume_flags), error=True)
    return 130


def _how_to_resume(what: str, folder: Path, resume_flags: str) -> str:
    command = " ".join(filter(None, (f"rlmeta resume {folder}", resume_flags)))
    return f"{what}; resume with: {command}" if is_run(folder) else what


@contextlib.contextmanager
def told_on_sigterm(folder: Path, resume_flags: str) -> Iterator[None]:
    """Print the command that resumes the run before SIGTERM ends the process, which it does once the run is saved."""
    process = os.getpid()

    def tell(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # and not in a worker of an environment
            os.write(2, f"{_how_to_resume('terminated', folder, resume_flags)}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
