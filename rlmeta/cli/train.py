"""`rlmeta train AGENT TASK`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmeta.cli.arguments import USAGE, names_before_flags
from rlmeta.cli.results import print_ends, print_results
from rlmeta.cli.terminal import say
from rlmeta.errors import SettingError

if TYPE_CHECKING:
    from rlmeta.cli.plan import Plan
    from rlmeta.runs.run import Run


def train(arguments: list[str]) -> int:
    """`rlmeta train AGENT TASK`."""
    from rlmeta.cli import plan as plans

    names, rest = names_before_flags(arguments)
    if len(names) != 2 and not {"-h", "--help"} & set(rest):
        raise SettingError(
            f"rlmeta train takes an agent and a task first, got {' '.join(names) or 'none'}: rlmeta train AGENT TASK"
        )
    if not names:
        print(USAGE.split("\n\n")[0], "", plans.AGENT_AND_TASK, sep="\n")
        return 0
    from rlmeta.runs.own_code import allowed_here

    code = plans.code_of(rest)
    with allowed_here(code):
        plan = plans.from_flags(names[0], names[1] if len(names) > 1 else "TASK", rest)
        folder = plan.folder()
        plan.begin(folder)
        return run_groups(plan, folder, plan.again(code), header="" if plan.options.quiet else plan.header(folder))


def run_groups(plan: Plan, folder: Path, again: str, inexact: bool = False, header: str = "") -> int:
    """Train, or go on with, every group of the plan; the header stands before the first.

    Args:
        plan: what to train.
        folder: of the whole plan.
        again: the flags that a resume needs for the user's own code.
        inexact: as for `rlmeta resume`.
        header: '' for none.
    """
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    try:
        for label in plan.groups:
            runs.append(run := plan.train(label, folder, inexact, "" if runs else header))
            if run.stopped == "interrupted":
                raise KeyboardInterrupt
            rows += [{**row, "setting": ", ".join(filter(None, (label, row["setting"])))} for row in run.summary()]
    except KeyboardInterrupt:
        return interrupted(folder, again)
    print_results(rows)
    for run in runs:
        print_ends(run)
    say(f"saved in {folder}")
    return 0


def interrupted(folder: Path, again: str) -> int:
    """Say how to go on with a run that was interrupted; the exit status."""
    from rlmeta.cli.plan import is_run

    command = " ".join(filter(None, (f"rlmeta resume {folder}", again)))
    say(f"interrupted; resume with: {command}" if is_run(folder) else "interrupted", error=True)
    return 130
