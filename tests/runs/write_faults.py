"""Faults of every call that writes into a run's folder while the run is resumed: kills, and errors of the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta import api
from rlmeta.functional import tree
from tests.runs.forked import ENDED, HUNG, RAISED, Outcome, forked

CALLS = ("open", "write", "pwrite", "fsync", "ftruncate", "replace", "unlink")
"""Those of `os` that change a file; `open` only where it is for writing."""
NEED_ROOM = ("open", "write", "pwrite", "replace")
FULL = "full from then on"
MODES = ("killed", "killed in the middle", "killed after", "EIO", "ENOSPC", FULL)
"""What happens at the call: the process dies before it, once half is written, or after it; or the call fails, or it and
all that follow and need room on the disk."""
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, FULL: errno.ENOSPC}
DEAD = 9
"""The status of a process that was killed."""

# where a GPU is in use by the process that forks, torch differentiates in none of its forks
needs_forks = pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a GPU cannot be forked")


@dataclass
class Writes:
    """The calls of this process that write below a folder, one of which goes wrong."""

    folder: Path
    at: int = 0
    """Which one, from 1; 0 for none."""
    mode: str = ""
    seen: list[str] = field(default_factory=list)
    """The name of every call, and that of its file."""
    files: dict[int, str] = field(default_factory=dict)
    """The names of the files that are open."""

    def watch(self) -> None:
        """Begin; for the rest of this process."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **named: Any) -> Any:
            path = self._path(name, target)
            reads = name == "open" and not rest[0] & (os.O_WRONLY | os.O_RDWR)
            if path and not reads:
                self.seen.append(f"{name} {_kind(Path(path))}")
                later = self.mode == FULL and 0 < self.at < len(self.seen) and name in NEED_ROOM
                if len(self.seen) == self.at or later:
                    self._go_wrong(name, real, target, *rest, **named)
            found = real(target, *rest, **named)
            if name == "open" and path:
                self.files[found] = path
            return found

        return call

    def _path(self, name: str, target: Any) -> str:
        """The file that a call is about; '' where it lies elsewhere."""
        if name in ("write", "pwrite", "fsync", "ftruncate"):
            return self.files.get(target, "")
        path = os.fspath(target)
        return path if path.startswith(str(self.folder)) else ""

    def _go_wrong(self, name: str, real: Callable[..., Any], target: Any, *rest: Any, **named: Any) -> None:
        if self.mode in ERRORS:
            raise OSError(ERRORS[self.mode], os.strerror(ERRORS[self.mode]))
        if self.mode == "killed in the middle" and name in ("write", "pwrite"):
            real(target, bytes(rest[0])[: len(rest[0]) // 2], *rest[1:], **named)
        if self.mode == "killed after":
            real(target, *rest, **named)
        os._exit(DEAD)


def _kind(path: Path) -> str:
    """The name of a file, without the hash that some have in theirs."""
    return "tensors" + "".join(path.suffixes[1:]) if ".safetensors" in path.name else path.name


# ------------------------------------------------------------------------------------------------------- the runs


def train(folder: Path, last: int = 0) -> None:
    """A little run, whose process dies after the line of metrics of an iteration.

    Args:
        folder: of the run.
        last: the iteration; 0 for none.
    """

    def stop(run: rl.Run, line: dict[str, Any]) -> None:
        if line["iteration"] == last:
            os._exit(DEAD)

    budget = rl.Budget(steps=128, eval_every=1_000, checkpoint_seconds=0.0, final_episodes=2, log_points=8)
    settings = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(4,))
    api.train(settings, "CartPole-v1", seeds=2, budget=budget, out=folder, threads=1, callbacks=[stop])


def unfinished(folder: Path) -> Path:
    """The folder of a run that died before its last iteration."""
    assert forked(lambda: train(folder, last=7)).kind == "died"
    return folder


def fingerprint(state: Any) -> str:
    """A digest of every bit of a state."""
    digest = hashlib.sha256()
    for name, leaf in sorted(tree.flatten(state).items()):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def resumed(folder: Path) -> dict[str, Any]:
    """What a run is, once it was gone on with: state, records, final scores, and what lies in its folder."""
    run = api.resume(folder)
    return {
        "state": fingerprint(run.state),
        "metrics": (folder / "metrics.jsonl").read_text(),
        "returns": repr(run.evaluation.returns.tolist() if run.evaluation else None),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


# ------------------------------------------------------------------------------------------------------- the faults


def calls_of(whole: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What an undisturbed resume of a copy of a run gives, and its writing calls."""

    def undisturbed() -> dict[str, Any]:
        writes = Writes(folder)
        writes.watch()
        return {"run": resumed(folder), "calls": writes.seen}

    shutil.copytree(whole, folder)
    outcome = forked(undisturbed)
    assert outcome.kind == ENDED, outcome
    shutil.rmtree(folder)
    return outcome.said["run"], outcome.said["calls"]


def disturbed(folder: Path, at: int, mode: str) -> dict[str, Any]:
    """A resume in which a call goes wrong."""
    Writes(folder, at, mode).watch()
    return resumed(folder)


def failures(whole: Path, folder: Path, points: Iterable[tuple[int, str]]) -> tuple[Counter[str], list[str]]:
    """Let resumes of a run go wrong, and resume it again.

    Args:
        whole: the folder of an unfinished run, which is only copied.
        folder: where the copies go.
        points: which call goes wrong, from 1, and how.

    Returns:
        How many first resumes came to what, and a sentence for every point at which the run did not end as the one that
        was never disturbed.
    """
    expected, calls = calls_of(whole, folder)
    counts, failed = Counter[str](), list[str]()
    for at, mode in points:
        shutil.copytree(whole, folder)
        first = forked(lambda at=at, mode=mode: disturbed(folder, at, mode))
        second = forked(lambda: resumed(folder))
        counts[f"{mode}: {first.kind}"] += 1
        wrong = _wrong(first, second, expected)
        if wrong:
            failed.append(f"{mode} at call {at} of {len(calls)}, {calls[at - 1]}: {wrong}")
        shutil.rmtree(folder)
    return counts, failed


def _wrong(first: Outcome, second: Outcome, expected: dict[str, Any]) -> str:
    """What is wrong with a disturbed resume and the one after it; '' for nothing."""
    if first.kind in (RAISED, HUNG):
        return f"{first.kind} {first.said}"
    for name, outcome in (("the disturbed resume", first), ("the resume after it", second)):
        if outcome.kind == ENDED:
            differing = [key for key in expected if outcome.said[key] != expected[key]]
            if differing and (outcome is second or differing != ["files"]):  # what can't be removed stays for later
                return f"{name} gave other {', '.join(differing)}"
    return "" if second.kind == ENDED else f"the resume after it {second.kind}: {second.said}"
