"""The command `rlmeta resume RUN`: continue a run from its newest checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmeta.cli.arguments import one_folder
from rlmeta.cli.results import print_ends, print_results
from rlmeta.cli.user_code import UserCode
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class ResumeFlags:
    """Options of the resumed run."""

    steps: int = 0
    """Extend the budget to this many steps of each learner; 0 keeps the old budget."""
    inexact: bool = False
    """Resume with new episodes if the environments' state cannot be restored."""
    quiet: bool = False
    """No live progress."""
    wandb: str = ""
    """Log to this project of Weights & Biases, or ENTITY/PROJECT: a run folder alone never sends anything there."""


def resume(arguments: list[str]) -> int:
    """Run `rlmeta resume RUN`; returns the exit status."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = one_folder(arguments, "resume")
    groups: dict[str, Any] = {"run": (ResumeFlags, {}), "user_code": (UserCode, {})}
    texts = flags.read(f"rlmeta resume {folder}", "Go on with a run; it ends as if never stopped.", groups, rest)
    chosen, own = grammar.build(ResumeFlags, texts["run"]), grammar.build(UserCode, texts["user_code"])
    with own.allowed():
        return _resume(folder, chosen, own)


def _resume(folder: Path, chosen: ResumeFlags, own: UserCode) -> int:
    from rlmeta.cli.groups import go_on, interrupted, run_groups, told_on_sigterm
    from rlmeta.cli.plan_folder import from_folder, is_plan

    if is_plan(folder):
        if chosen.steps:
            raise SettingError(f"{folder} holds several groups: resume them one by one with --steps, {folder}/GROUP")
        plan = dataclasses.replace(from_folder(folder), wandb=chosen.wandb)
        return run_groups(plan, folder, own.words(), chosen.inexact)
    user_code, live = own.arguments(folder), not chosen.quiet
    with told_on_sigterm(folder, own.words()):
        run = go_on(folder, **user_code, wandb=chosen.wandb, progress=live, inexact=chosen.inexact, steps=chosen.steps)
    if run.stopped == "interrupted":
        return interrupted(folder, own.words())
    print_results(run.summary())
    print_ends(run)
    return 0
