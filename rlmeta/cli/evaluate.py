"""The command `rlmeta eval RUN`: evaluate a run's learners on new episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmeta.cli.arguments import one_folder
from rlmeta.cli.results import print_results
from rlmeta.cli.user_code import UserCode
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class EvaluateFlags:
    """Options of the evaluation."""

    episodes: int = 256
    """Episodes of each learner."""
    best: bool = False
    """Use the parameters of each learner's best periodic evaluation instead of the final ones."""
    sampled: bool = False
    """Sample actions instead of taking the policy's mode."""
    seed: int = 1
    """Seed of the episodes."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise SettingError(f"--episodes is {self.episodes}, expected at least 1")


def evaluate(arguments: list[str]) -> int:
    """Run `rlmeta eval RUN`; returns the exit status."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = one_folder(arguments, "eval")
    groups: dict[str, Any] = {"evaluation": (EvaluateFlags, {}), "user_code": (UserCode, {})}
    texts = flags.read(f"rlmeta eval {folder}", "Play fresh episodes with a run's learners.", groups, rest)
    chosen, own = grammar.build(EvaluateFlags, texts["evaluation"]), grammar.build(UserCode, texts["user_code"])
    with own.allowed():
        return _evaluate(folder, chosen, own)


def _evaluate(folder: Path, chosen: EvaluateFlags, own: UserCode) -> int:
    from rlmeta.cli.plan_folder import members
    from rlmeta.runs.run import load

    rows: list[dict[str, Any]] = []
    for label, member in members(folder).items():
        run = load(member, **own.arguments(member))
        try:
            run.evaluation = run.evaluate(
                chosen.episodes, deterministic=not chosen.sampled, best=chosen.best, seed=chosen.seed
            )
        finally:
            run.close()
        rows += [{**row, "setting": ", ".join(filter(None, (label, row["setting"])))} for row in run.summary()]
    print_results(rows)
    return 0
