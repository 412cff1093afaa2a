"""The command `rlmeta adapt RUN`: adaptation curve of a meta-learner on held-out tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmeta.cli.arguments import one_folder
from rlmeta.cli.results import console
from rlmeta.cli.terminal import say
from rlmeta.cli.user_code import UserCode

if TYPE_CHECKING:
    from rlmeta.report.adaptation import AdaptFlags


def adapt(arguments: list[str]) -> int:
    """Run `rlmeta adapt RUN`; returns the exit status."""
    from rlmeta.cli import flags
    from rlmeta.report import adaptation
    from rlmeta.runs import grammar

    folder, rest = one_folder(arguments, "adapt")
    groups: dict[str, Any] = {"adaptation": (adaptation.AdaptFlags, {}), "user_code": (UserCode, {})}
    about = "Adapt a meta-learner to held-out tasks: the score against inner steps, as a table and a picture."
    texts = flags.read(f"rlmeta adapt {folder}", about, groups, rest)
    chosen, own = grammar.build(adaptation.AdaptFlags, texts["adaptation"]), grammar.build(UserCode, texts["user_code"])
    with own.allowed():
        return _adapt(folder, chosen, own)


def _adapt(folder: Path, chosen: AdaptFlags, own: UserCode) -> int:
    from rlmeta.cli.plan_folder import members
    from rlmeta.report import adaptation
    from rlmeta.runs.run import load

    for label, member in members(folder).items():
        run = load(member, **own.arguments(member))
        try:
            curve = adaptation.adapt(run, chosen.tasks, chosen.steps, chosen.seed)
            title = f"{run.experiment.agent_name} on {run.experiment.problem.name}" + (f", {label}" if label else "")
            seeds, tasks = len(run.experiment.learners), chosen.tasks
            learners = f"{seeds} learner{'s' if seeds > 1 else ''}"
            title = f"{title}: {learners}, {tasks} held-out task{'s' if tasks > 1 else ''} each"
            console().print(adaptation.table(curve, title))
            say("saved " + " and ".join(map(str, adaptation.write(run, curve, member, chosen.seed))))
        finally:
            run.close()
    return 0
