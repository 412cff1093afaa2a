"""The command `rlmeta check TASK`: check an environment before training on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlmeta.cli.arguments import names_before_flags
from rlmeta.cli.terminal import say
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class CheckFlags:
    """Options of the check."""

    steps: int = 1000
    """Steps of each kind of random play."""
    seed: int = 0
    """Seed of the play."""
    max_episode_steps: int | None = None
    """Time limit of an episode in steps."""
    native: bool = True
    """Use rlmeta's own batched environment if there is one."""


def check(arguments: list[str]) -> int:
    """Run `rlmeta check TASK`; returns the exit status, 1 if something is wrong."""
    from rlmeta.cli import flags
    from rlmeta.cli.plan import dotted_settings
    from rlmeta.envs.kinds import is_problem
    from rlmeta.envs.task import Task, task
    from rlmeta.runs import grammar, user_code

    names, rest = names_before_flags(arguments)
    if len(names) != 1 and not {"-h", "--help"} & set(rest):
        raise SettingError(f"rlmeta check takes one task, got {' '.join(names) or 'none'}: rlmeta check TASK")
    name = names[0] if names else "TASK"
    dotted, rest = dotted_settings(rest)
    about = "Check an environment by random play: spaces, contract, seeding, autoreset, time limit, action bounds, NaN."
    texts = flags.read(f"rlmeta check {name}", about, {"check": (CheckFlags, {})}, rest)
    chosen: CheckFlags = grammar.build(CheckFlags, texts["check"])
    settings: dict[str, Any] = dotted.pop("env", {})
    if dotted:
        raise SettingError(f"--{next(iter(dotted))}: rlmeta check takes settings of the environment alone, --env.KEY")
    with user_code.allowed_here([], user_code.user_names(name)):
        source = user_code.source_of(name, settings)
        limit = chosen.max_episode_steps
        if not is_problem(source):
            source = task(source, name=name, settings=settings, native=chosen.native, max_episode_steps=limit)
        if not isinstance(source, Task):
            raise SettingError(f"{name!r} is {type(source).__name__}, expected the task of an environment")
        return _report(source, chosen)


def _report(task: Any, chosen: CheckFlags) -> int:
    """Print the findings, a line each, and a last line; returns the exit status."""
    from rlmeta.envs.check import check as findings_of

    findings = findings_of(task, chosen.steps, chosen.seed)
    for finding in findings:
        say(str(finding))
    wrong = sum(finding.wrong for finding in findings)
    notes = len(findings) - wrong
    say(f"{task.name}: {wrong or 'nothing'} wrong" + (f", {notes} note{'s' if notes > 1 else ''}" if notes else ""))
    return int(wrong > 0)
