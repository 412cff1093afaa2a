"""The command `rlmeta watch RUN`: film one of a run's learners as it plays, or show it in a window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmeta.cli.arguments import one_folder
from rlmeta.cli.terminal import say
from rlmeta.cli.user_code import UserCode
from rlmeta.errors import SettingError


@dataclass(frozen=True)
class WatchFlags:
    """Options of the film."""

    out: str = ""
    """The film, .mp4 or .gif; videos/watch.mp4 in the run's folder, unless given."""
    task: str = ""
    """Another task to play, with the same spaces; the run's own unless given."""
    episodes: int = 1
    """Number of episodes, on a stream of each task."""
    learner: int = -1
    """Index of the learner; -1 for the best in the final evaluation."""
    best: bool = False
    """Use the parameters of its best periodic evaluation instead of the final ones."""
    sampled: bool = False
    """Sample actions instead of taking the policy's mode."""
    seed: int = 1
    """Seed of the episodes; they are those of `rlmeta eval` with equally many."""
    fps: int = 0
    """Pictures a second; 0 for the environment's own speed."""
    live: bool = False
    """Show the episodes in a window instead of writing a film."""

    def __post_init__(self) -> None:
        if self.learner < -1:
            raise SettingError(f"--learner is {self.learner}, expected 0 or more, or -1 for the best")
        if self.fps < 0:
            raise SettingError(f"--fps is {self.fps}, expected pictures a second, or 0 for the environment's own speed")


def watch(arguments: list[str]) -> int:
    """Run `rlmeta watch RUN`; returns the exit status."""
    from rlmeta.cli import flags
    from rlmeta.runs import grammar, user_code

    folder, rest = one_folder(arguments, "watch")
    groups: dict[str, Any] = {"film": (WatchFlags, {}), "user_code": (UserCode, {})}
    about = "Film one of a run's learners as it plays, or show it in a window."
    texts = flags.read(f"rlmeta watch {folder}", about, groups, rest)
    chosen, own = grammar.build(WatchFlags, texts["film"]), grammar.build(UserCode, texts["user_code"])
    with own.allowed(), user_code.allowed_here([], user_code.user_names(chosen.task)):
        return _watch(folder, chosen, own)


def _watch(folder: Path, chosen: WatchFlags, own: UserCode) -> int:
    from rlmeta.cli.plan_folder import is_plan, members
    from rlmeta.report.watch import watch as play
    from rlmeta.runs import user_code
    from rlmeta.runs.run import load

    if is_plan(folder):
        raise SettingError(f"{folder} holds several runs: watch one of {', '.join(map(str, members(folder).values()))}")
    run = load(folder, **own.arguments(folder))
    try:
        watched = play(
            run,
            chosen.out or None,
            task=user_code.source_of(chosen.task, {}) if chosen.task else None,
            episodes=chosen.episodes,
            learner=None if chosen.learner < 0 else chosen.learner,
            best=chosen.best,
            deterministic=not chosen.sampled,
            seed=chosen.seed,
            fps=chosen.fps or None,
            live=chosen.live,
        )
    finally:
        run.close()
    for number, (score, length) in enumerate(zip(watched.returns.tolist(), watched.lengths.tolist())):
        say(f"episode {number}: return {score:g}, {length:,} steps")
    shown = "shown" if watched.out is None else f"saved in {watched.out}"
    say(f"learner {watched.learner}, {watched.frames:,} pictures, {shown}")
    return 0
