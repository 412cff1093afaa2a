"""The folder of a run: made once, described by `config.toml`, written by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from rlmeta.errors import CheckpointError, RunExistsError, SettingError
from rlmeta.runs.files import put

CONFIG, LOCK = "config.toml", "run.lock"
SUMMARY = "summary.json"
"""The final evaluation, there once the run has ended."""

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
    if content:
        raise RunExistsError(
            f"{folder} exists and holds {content[0]!r}: use another --out, or `rlmeta resume {folder}` to go on with it"
        )


def _in_the_way(folder: Path) -> RunExistsError:
    return RunExistsError(f"{folder} cannot be a run folder, a file is in its place: use another --out")


@contextlib.contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that writes the run at `path`; the lock goes with the process, however that ends.

    Raises:
        RunExistsError: another process writes the run (the message says which), or this one does already.
        CheckpointError: there is no such folder, or it cannot be written.
    """
    folder = Path(path)
    key = os.path.realpath(folder)
    if _held.get(key) == os.getpid():
        raise RunExistsError(f"{folder} is being written by this very process (pid {os.getpid()}): use another --out")
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot lock {folder}: {error.strerror}; give a run folder you can write") from error
    try:
        _take(file, folder)
        _held[key] = os.getpid()
        try:
            yield
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
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "unknown"
        raise RunExistsError(
            f"{folder} is being written by another process ({holder}): wait for it or stop it, or use another --out"
        ) from error
    os.ftruncate(file, 0)
    os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def write_config(path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write `config.toml` into the run folder `path`, at once; names whose value is None are left out.

    Raises:
        SettingError: a value that TOML has no form for.
        CheckpointError: the file cannot be written; an older one is as it was.
    """
    put(Path(path) / CONFIG, encoded(config))


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
        return tomllib.loads(source.read_bytes().decode())
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}; give the folder of a run") from error
    except ValueError as error:
        raise CheckpointError(f"{source} is not TOML ({error}): restore it from a copy") from error


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
