"""Files that are there whole or not at all, whatever moment a process dies at, and are read with a limit."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from rlmeta.errors import CheckpointError

Buffer: TypeAlias = bytes | memoryview


class Damaged(CheckpointError):
    """A checkpoint that is not whole, so that the one before it is worth a try."""


def write_file(path: Path, buffers: Iterable[Buffer]) -> None:
    """Put a file at `path` at once: temporary file beside it, fsync, rename. An error leaves an older one as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for buffer in buffers:
                rest = memoryview(buffer)
                while rest:
                    rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def put(path: Path, content: bytes | str) -> None:
    """Write a file of a run's folder at once, and for good.

    Raises:
        CheckpointError: it cannot be written; an older one is as it was.
    """
    try:
        write_file(path, [content.encode() if isinstance(content, str) else content])
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; check the disk and its permissions") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in place of a file must not block


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file; more than `limit` bytes are refused unread.

    Raises:
        Damaged: there is no such file, or it is none that a checkpoint would have.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{path} is not a regular file: the checkpoint is foreign")
            if status.st_size > limit:
                raise Damaged(f"{path} has {status.st_size} bytes, at most {limit} expected: the file is foreign")
            return file.read(limit + 1)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error


def file_signature(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_exists(path: Path) -> bool:
    """Whether anything is there that can be looked at."""
    return file_signature(path) is not None
