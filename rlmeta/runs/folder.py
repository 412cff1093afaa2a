"""The folder of a run: made once, described by `config.toml`, written by one process at a time.

Every run has an id, in its `config.toml`, its `run.lock`, its checkpoints and its summary: files of different runs are
never taken for those of one, and a process whose folder was deleted and made anew writes nothing into the new one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from rlmeta.errors import CheckpointError, RunExistsError, SettingError
from rlmeta.runs import checkpoint
from rlmeta.runs.files import Damaged, is_at, open_in_place, put, read_bytes, sealed, unsealed
from rlmeta.runs.records import NAMES

CONFIG, LOCK, STATE = "config.toml", "run.lock", "state"
SUMMARY = "summary.json"
"""The final evaluation, there once the run has ended."""
PLAN = "plan.toml"
"""What a command trains in groups, in the folder above theirs."""
RECORDS = tuple(f"{name}.jsonl" for name in NAMES)
ID = re.compile(r"[0-9a-f]{16}")
"""What every run is told apart by, `run` in its config.toml."""
UNFINISHED = (f"{CONFIG}.tmp", f"{PLAN}.tmp")
"""What a process leaves that dies while it writes them."""
SUBFOLDERS = (STATE, "tensorboard", "wandb")
"""What is written into below a run's folder."""
OWN_LINKS = "wandb"
"""The folder in which W&B makes links of its own, which stay in it."""
CONFIG_LIMIT, SUMMARY_LIMIT = 64 << 20, 1 << 30

_held: dict[str, int] = {}
"""Folders locked by this process, which a POSIX lock does not keep from locking them twice; a fork holds none."""


def create(path: str | os.PathLike[str]) -> Path:
    """Make the folder of a new run, with its parents.

    Raises:
        RunExistsError: there is a file, or a folder with something in it.
        SettingError: the folder cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _in_the_way(folder) from error
    except OSError as error:
        raise SettingError(f"cannot make the run folder {folder}: {error.strerror}; use another --out") from error
    check_free(folder)
    return folder


def check_free(path: str | os.PathLike[str]) -> None:
    """Refuse a place for a new run where something is already.

    What a start has left that ended before its first checkpoint is nothing.

    Raises:
        RunExistsError: there is a file, or a folder with something in it.
        SettingError: the folder cannot be read.
    """
    folder = Path(path)
    try:
        content = sorted(set(os.listdir(folder)) - {LOCK})
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise _in_the_way(folder) from error
    except OSError as error:
        raise SettingError(f"cannot read the run folder {folder}: {error.strerror}; use another --out") from error
    if content and not _is_failed_start(folder, content):
        raise RunExistsError(
            f"{folder} exists and holds {content[0]!r}: use another --out, or `rlmeta resume {folder}` to go on with it"
        )


def _is_failed_start(folder: Path, content: list[str]) -> bool:
    """Whether a folder holds only what a start makes before the first checkpoint: nothing of it is worth keeping."""
    for name in content:
        path = folder / name
        if name == STATE:
            ours = checkpoint.is_unfinished(path)
        elif path.is_symlink() or not path.is_file():
            ours = False
        elif name == CONFIG:
            ours = _has_id(folder)
        else:
            ours = name in UNFINISHED or (name in RECORDS and not path.stat().st_size)
        if not ours:
            return False
    return True


def _has_id(folder: Path) -> bool:
    try:
        run_id(read_config(folder), folder)
    except CheckpointError:
        return False
    return True


def clear(path: str | os.PathLike[str]) -> None:
    """Remove what a failed start has left in a folder that `check_free` accepts and this process has locked.

    Raises:
        SettingError: it cannot be removed.
    """
    folder = Path(path)
    check_free(folder)
    try:
        for name in set(os.listdir(folder)) - {LOCK}:
            if name == STATE:
                shutil.rmtree(folder / name)
            else:
                os.unlink(folder / name)
    except OSError as error:
        raise SettingError(f"cannot empty the run folder {folder}: {error.strerror}; use another --out") from error


def check_plain(path: str | os.PathLike[str]) -> None:
    """Refuse a run's folder from which something would lead out of it, or that holds what is no file.

    Raises:
        CheckpointError: a link, a pipe or the like is in it or in a folder that a run writes into.
    """
    folder = Path(path)
    for where in (folder, *(folder / name for name in SUBFOLDERS)):
        for inside in _all_below(where) if where != folder else _entries(where):
            entry = Path(inside)
            regular = inside.is_file(follow_symlinks=False) or inside.is_dir(follow_symlinks=False)
            if not regular and not _is_own_link(folder, entry):
                what = "a link" if inside.is_symlink() else "no regular file"
                raise CheckpointError(
                    f"{entry} is {what}: a run's folder is only read and written where it holds plain files, remove it "
                    "or put a copy there"
                )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _all_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder and in those below it; no link is gone through."""
    for entry in [] if folder.is_symlink() else _entries(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _all_below(Path(entry))


def _is_own_link(folder: Path, path: Path) -> bool:
    """Whether it is a link of W&B's, which points to something in its own folder."""
    inside = folder / OWN_LINKS in path.parents
    return inside and path.is_symlink() and path.resolve().is_relative_to(folder.resolve() / OWN_LINKS)


def _in_the_way(folder: Path) -> RunExistsError:
    return RunExistsError(f"{folder} cannot be a run folder, a file is in its place: use another --out")


@dataclass(frozen=True)
class Hold:
    """A run's folder that this process has locked, and the file that shows it."""

    folder: Path
    file: int

    def check(self) -> None:
        """Make sure that the folder is still the one that was locked.

        Raises:
            CheckpointError: it was moved, deleted or made anew.
        """
        if not is_at(self.file, self.folder / LOCK):
            raise CheckpointError(
                f"{self.folder} is not the folder that this run began in any more, it was moved, deleted or made anew: "
                "the run ends here and leaves what is there alone"
            )

    def sign(self, run: str) -> None:
        """Leave the id of the run in the file.

        Raises:
            CheckpointError: the disk is full or failing.
        """
        self._write(f"run {run}\n")

    def announce(self) -> None:
        """Leave this process's id in the file, with the id of the run that it had."""
        lines = _text_of(self.file).splitlines()
        self._write("".join(f"{line}\n" for line in lines if ID.fullmatch(line.removeprefix("run "))))

    def _write(self, rest: str) -> None:
        data = f"pid {os.getpid()} on {socket.gethostname()}\n{rest}".encode()
        try:
            os.pwrite(self.file, data, 0)
            os.ftruncate(self.file, len(data))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.folder / LOCK}: {error.strerror}; check the disk and its permissions"
            ) from error


def _text_of(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace")


@contextlib.contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[Hold]:
    """Be the only process that writes the run at `path`; the lock goes with the process, however that ends.

    Raises:
        RunExistsError: another process writes the run (the message says which), or this one does already.
        CheckpointError: there is no such folder, it cannot be written, or something else is in the lock's place.
    """
    folder = Path(path)
    key = os.path.realpath(folder)
    if _held.get(key) == os.getpid():
        raise RunExistsError(f"{folder} is being written by this very process (pid {os.getpid()}): use another --out")
    try:
        file = open_in_place(folder / LOCK, os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"cannot lock {folder}: {error.strerror}; give a run folder you can write") from error
    try:
        _take(file, folder)
        _held[key] = os.getpid()
        try:
            yield Hold(folder, file)
        finally:
            if _held.get(key) == os.getpid():
                del _held[key]
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> None:
    """Lock the open file and leave this process's id in it, or say whose id is there."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(f"cannot lock {folder}: {error.strerror}; use a file system with locks") from error
        holder = _text_of(file).split("\n")[0].strip() or "unknown"
        raise RunExistsError(
            f"{folder} is being written by another process ({holder}): wait for it or stop it, or use another --out"
        ) from error
    Hold(folder, file).announce()


def write_config(path: str | os.PathLike[str], config: dict[str, Any]) -> str:
    """Write `config.toml` into the run folder `path`, at once; names whose value is None are left out.

    Returns:
        Its sha256, for the checkpoints that rely on it.

    Raises:
        SettingError: a value that TOML has no form for.
        CheckpointError: the file cannot be written; an older one is as it was.
    """
    content = encoded(config)
    put(Path(path) / CONFIG, content)
    return hashlib.sha256(content).hexdigest()


def encoded(config: dict[str, Any]) -> bytes:
    """A configuration as TOML.

    Raises:
        SettingError: a value that TOML has no form for.
    """
    text = tomli_w.dumps(_without_none(config, ""))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"config has text that is not unicode ({error.object[error.start]!r}): rename it") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of `config.toml` in the run folder `path`.

    Raises:
        CheckpointError: it is missing or not TOML.
    """
    source = Path(path) / CONFIG
    try:
        return tomllib.loads(_config_bytes(source).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not TOML ({error}): restore it from a copy") from error


def config_digest(path: str | os.PathLike[str]) -> str:
    """The sha256 of `config.toml` in the run folder `path`.

    Raises:
        CheckpointError: it is missing.
    """
    return hashlib.sha256(_config_bytes(Path(path) / CONFIG)).hexdigest()


def _config_bytes(source: Path) -> bytes:
    try:
        return read_bytes(source, CONFIG_LIMIT)
    except Damaged as error:
        raise CheckpointError(f"cannot read the settings of a run: {error}; give the folder of one") from error


def run_id(config: dict[str, Any], path: str | os.PathLike[str]) -> str:
    """The id of the run that `config.toml` in the folder `path` describes.

    Raises:
        CheckpointError: it has none.
    """
    found = config.get("run")
    if not isinstance(found, str) or not ID.fullmatch(found):
        raise CheckpointError(
            f"{Path(path) / CONFIG}: run is {found!r}, expected the id of the run: restore it from a copy"
        )
    return found


def write_summary(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `summary.json` into the run folder `path`, at once.

    Raises:
        CheckpointError: the file cannot be written; an older one is as it was.
    """
    put(Path(path) / SUMMARY, sealed(content))


def read_summary(path: str | os.PathLike[str], run: str) -> dict[str, Any] | None:
    """The content of `summary.json` in the run folder `path`; None where the run has not ended.

    Raises:
        CheckpointError: it is damaged, was changed, or is not of this run.
    """
    folder = Path(path)
    if not os.path.lexists(folder / SUMMARY):
        return None
    try:
        content = unsealed(read_bytes(folder / SUMMARY, SUMMARY_LIMIT))
        if content.get("run") != run:
            raise ValueError(f"it is of run {content.get('run')}, {CONFIG} of {run}")
        return content
    except ValueError as error:
        raise damaged_summary(folder, error) from error


def damaged_summary(folder: Path, error: Exception) -> CheckpointError:
    """That the summary says something it cannot, and what to do."""
    return CheckpointError(
        f"{folder / SUMMARY} is damaged ({error}): remove it, `rlmeta resume {folder}` evaluates the run again"
    )


def _without_none(value: Any, where: str) -> Any:
    """`value` in TOML's types, with None dropped from dictionaries and refused in lists."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise SettingError(f"config '{where}' has names {list(value)!r}: every name must be text")
        children = {name: child for name, child in value.items() if child is not None}
        return {name: _without_none(child, f"{where}.{name}".lstrip(".")) for name, child in children.items()}
    if isinstance(value, np.generic):
        return _without_none(value.item(), where)
    if isinstance(value, list | tuple):
        return [_without_none(child, f"{where}[{index}]") for index, child in enumerate(value)]
    if isinstance(value, str | bool | int | float | datetime.date | datetime.time):
        return value
    raise SettingError(f"config '{where}' is a {type(value).__name__}, which TOML has no form for: give a plain value")
