"""Run folder: creation, lock, `config.toml` and `summary.json`; one process writes it at a time.

Every run has an id, kept in its `config.toml`, `run.lock`, checkpoints and summary. So files of different runs are not
mixed up, and a process whose folder was deleted and created again writes nothing into the new one.
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
from rlmeta.runs.metric_log import NAMES

CONFIG, LOCK, STATE = "config.toml", "run.lock", "state"
SUMMARY = "summary.json"
"""The final evaluation, written when the run has ended."""
PLAN = "plan.toml"
"""The plan of a command that trains several groups, in the folder above the groups' folders."""
RECORDS = tuple(f"{name}.jsonl" for name in NAMES)
ID = re.compile(r"[0-9a-f]{16}")
"""Format of a run's id, `run` in its config.toml."""
UNFINISHED = (f"{CONFIG}.tmp", f"{PLAN}.tmp")
"""Temporary files that a killed process may leave."""
SUBFOLDERS = (STATE, "tensorboard", "wandb", "videos")
"""Subfolders that a run writes into."""
OWN_LINKS = "wandb"
"""The folder in which W&B creates links of its own, which point into it."""
CONFIG_LIMIT, SUMMARY_LIMIT = 64 << 20, 1 << 30

_held: dict[str, int] = {}
"""Pid by locked folder: a POSIX lock does not stop one process from locking twice, and is not inherited by a fork."""


def create(path: str | os.PathLike[str]) -> Path:
    """Create the folder of a new run, with its parents.

    Raises:
        RunExistsError: a file is in its place, or the folder is not empty.
        SettingError: the folder cannot be created.
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
    """Refuse to start a run in a folder that is not empty.

    Leftovers of a start that was killed before its first checkpoint do not count.

    Raises:
        RunExistsError: a file is in its place, or the folder is not empty.
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
            f"{folder} exists and holds {content[0]!r}: use another --out, or `rlmeta resume {folder}` to resume it"
        )


def _is_failed_start(folder: Path, content: list[str]) -> bool:
    """Whether a folder holds only leftovers of a start that was killed before its first checkpoint."""
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
    """Remove the leftovers of a failed start from a folder that `check_free` accepts and this process has locked.

    Raises:
        SettingError: a file cannot be removed.
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
    """Refuse a run's folder with symbolic links, which lead out of it, or with pipes and the like.

    Raises:
        CheckpointError: one of these is in the folder or in a subfolder that a run writes into.
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
    """Entries of a folder; [] if there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _all_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder and its subfolders, without following links."""
    for entry in [] if folder.is_symlink() else _entries(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _all_below(Path(entry))


def _is_own_link(folder: Path, path: Path) -> bool:
    """Whether `path` is a link that W&B created, which points into W&B's own folder."""
    inside = folder / OWN_LINKS in path.parents
    return inside and path.is_symlink() and path.resolve().is_relative_to(folder.resolve() / OWN_LINKS)


def _in_the_way(folder: Path) -> RunExistsError:
    return RunExistsError(f"{folder} cannot be a run folder, a file is in its place: use another --out")


@dataclass(frozen=True)
class Hold:
    """Lock that this process holds on a run's folder, and the descriptor of the lock file."""

    folder: Path
    file: int

    def check(self) -> None:
        """Check that the folder is still the one that was locked.

        Raises:
            CheckpointError: it was moved, deleted or created again.
        """
        if not is_at(self.file, self.folder / LOCK):
            raise CheckpointError(
                f"{self.folder} is not this run's folder any more, it was moved, deleted or created again: "
                "the run ends here and leaves what is there alone"
            )

    def sign(self, run: str) -> None:
        """Write the run's id into the lock file.

        Raises:
            CheckpointError: the disk is full or failing.
        """
        self._write(f"run {run}\n")

    def announce(self) -> None:
        """Write this process's id into the lock file, and keep the run's id that is there."""
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
    """Lock a run's folder, so that one process writes it; the lock is released when the process ends, even if killed.

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
    """Lock the open file and write this process's id into it, or raise an error that names the process holding it."""
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
    """Write `config.toml` into the run folder `path`, atomically; names whose value is None are left out.

    Returns:
        Its sha256, which checkpoints keep.

    Raises:
        SettingError: a value cannot be written as TOML.
        CheckpointError: the file cannot be written; the old file stays.
    """
    content = encoded(config)
    put(Path(path) / CONFIG, content)
    return hashlib.sha256(content).hexdigest()


def encoded(config: dict[str, Any]) -> bytes:
    """Encode a configuration as TOML.

    Raises:
        SettingError: a value cannot be written as TOML.
    """
    text = tomli_w.dumps(_without_none(config, ""))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"config has text that is not unicode ({error.object[error.start]!r}): rename it") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `config.toml` in the run folder `path`.

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
    """Run id in a configuration; `path` is its folder, for the error message.

    Raises:
        CheckpointError: there is no valid id.
    """
    run = config.get("run")
    if not isinstance(run, str) or not ID.fullmatch(run):
        raise CheckpointError(
            f"{Path(path) / CONFIG}: run is {run!r}, expected the id of the run: restore it from a copy"
        )
    return run


def write_summary(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `summary.json` into the run folder `path`, atomically.

    Raises:
        CheckpointError: the file cannot be written; the old file stays.
    """
    put(Path(path) / SUMMARY, sealed(content))


def read_summary(path: str | os.PathLike[str], run: str) -> dict[str, Any] | None:
    """Read `summary.json` in the run folder `path`; None if the run has not ended.

    Raises:
        CheckpointError: it is damaged, was changed, or belongs to another run.
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
    """Error for a damaged summary, with what to do."""
    return CheckpointError(
        f"{folder / SUMMARY} is damaged ({error}): remove it, `rlmeta resume {folder}` evaluates the run again"
    )


def _without_none(value: Any, where: str) -> Any:
    """Convert a value to TOML's types; None is dropped from dictionaries and refused in lists."""
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
    raise SettingError(
        f"config '{where}' is of type {type(value).__name__}, which TOML has no form for: give a plain value"
    )
