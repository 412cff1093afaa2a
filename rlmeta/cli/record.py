"""The command `rlmeta record RUN`: record demonstrations of one of a run's learners."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmeta.cli.arguments import one_folder
from rlmeta.cli.terminal import say
from rlmeta.cli.user_code import UserCode
from rlmeta.errors import RunExistsError, SettingError


@dataclass(frozen=True)
class RecordFlags:
    """Options of the recording."""

    out: str = ""
    """The file to write; required."""
    episodes: int = 60
    """Number of episodes."""
    learner: int = -1
    """Index of the learner; -1 for the best in the final evaluation."""
    best: bool = False
    """Use the parameters of its best periodic evaluation instead of the final ones."""
    sampled: bool = False
    """Sample actions instead of taking the policy's mode."""
    seed: int = 0
    """Seed of the episodes."""

    def __post_init__(self) -> None:
        if not self.out:
            raise SettingError("rlmeta record needs a file to write: --out FILE")
        if os.path.lexists(self.out):
            raise RunExistsError(f"{self.out} exists: record into another file, or delete it first")
        from rlmeta.data.demonstrations import check_writable

        check_writable(self.out)
        if self.learner < -1:
            raise SettingError(f"--learner is {self.learner}, expected 0 or more, or -1 for the best")


def record(arguments: list[str]) -> int:
    """Run `rlmeta record RUN --out FILE`; returns the exit status."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar

    folder, rest = one_folder(arguments, "record")
    groups: dict[str, Any] = {"episodes": (RecordFlags, {}), "user_code": (UserCode, {})}
    about = "Write demonstrations: whole episodes of one of a run's learners."
    texts = flags.read(f"rlmeta record {folder}", about, groups, rest)
    chosen, own = grammar.build(RecordFlags, texts["episodes"]), grammar.build(UserCode, texts["user_code"])
    with own.allowed():
        return _record(folder, chosen, own)


def _record(folder: Path, chosen: RecordFlags, own: UserCode) -> int:
    from rlmeta.cli.plan_folder import is_plan, members
    from rlmeta.runs.record_demonstrations import record as play
    from rlmeta.runs.run import load

    if is_plan(folder):
        raise SettingError(
            f"{folder} holds several runs: record one of {', '.join(map(str, members(folder).values()))}"
        )
    run = load(folder, **own.arguments(folder))
    try:
        demonstrations = play(
            run,
            chosen.episodes,
            learner=None if chosen.learner < 0 else chosen.learner,
            best=chosen.best,
            deterministic=not chosen.sampled,
            seed=chosen.seed,
        )
    finally:
        run.close()
    demonstrations.save(chosen.out)
    returns = demonstrations.returns
    say(
        f"{len(demonstrations)} episodes of learner {demonstrations.about['learner']}, {demonstrations.steps:,} steps, "
        f"returns {returns.mean():g} ({returns.min():g} to {returns.max():g}), saved in {chosen.out}"
    )
    return 0
