"""Atomic file writes and size-limited reads within a run's folder.

Symbolic links are never followed, so nothing in a folder leads a reader or a writer out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from rlmeta.errors import CheckpointError

Buffer: TypeAlias = bytes | memoryview

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or an exceeded quota."""


class Damaged(CheckpointError):
    """A damaged checkpoint; the previous one may still be intact."""


def write_file(path: Path, buffers: Iterable[Buffer]) -> None:
    """Write a file atomically: to a temporary file, then fsync and rename. On an error the old file stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        file = _open_new(temporary)
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


def _open_new(path: Path) -> int:
    """Create and open a new file for writing; an existing file or link at `path` is removed, not written to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def open_in_place(path: Path, flags: int) -> int:
    """Open a file that is written in place, created if missing; returns its file descriptor.

    Raises:
        CheckpointError: it is a link, not a regular file, or a hard link to a file elsewhere.
        OSError: it cannot be opened.
    """
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CheckpointError(f"{path} is a link, expected a file of its own: put the file itself there") from error
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return file
    os.close(file)
    what = "a second name of a file elsewhere" if stat.S_ISREG(status.st_mode) else "no regular file"
    raise CheckpointError(f"{path} is {what}, expected a file of its own: put a copy there")


def is_at(file: int, path: Path) -> bool:
    """Whether a file descriptor still refers to the file at `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(file), there)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that renames in it survive a power failure."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def put(path: Path, content: bytes | str) -> None:
    """Write a file atomically and fsync its folder.

    Raises:
        CheckpointError: it cannot be written; the old file stays.
    """
    try:
        write_file(path, [content.encode() if isinstance(content, str) else content])
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; check the disk and its permissions") from error


def sealed(body: dict[str, Any], indent: int | None = None) -> bytes:
    """Encode `body` as JSON with its sha256, so that a later change is detected.

    Raises:
        ValueError, RecursionError: it cannot be written as JSON.
    """
    return json.dumps({**body, "sha256": _json_digest(body)}, indent=indent).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Decode JSON that `sealed` wrote, after a check of its sha256.

    Raises:
        ValueError: it is not such JSON, or was changed.
    """
    try:
        content = json.loads(data)
        if content.pop("sha256") != _json_digest(content):
            raise ValueError("the checksum does not match")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no JSON with a checksum ({error!r})") from error
    body: dict[str, Any] = content
    return body


def _json_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()


def sealed_lines(content: bytes) -> bytes:
    """Prepend a line with the sha256 to lines of TOML, so that a later change is detected."""
    return _seal_of(content) + content


def unsealed_lines(data: bytes) -> bytes:
    """The TOML that `sealed_lines` was given, after a check of its sha256.

    Raises:
        ValueError: it has no checksum, or was changed.
    """
    first, newline, content = data.partition(b"\n")
    if first + newline != _seal_of(content):
        raise ValueError("the checksum does not match")
    return content


def _seal_of(content: bytes) -> bytes:
    return f'sha256 = "{hashlib.sha256(content).hexdigest()}"\n'.encode()


def open_at_once(path: str, flags: int) -> int:
    """Opener for `open(..., opener=)`: follows no link, and does not block on a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        Damaged: it is missing, not a regular file, or larger than `limit`.
    """
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{path} is not a regular file: the checkpoint is foreign")
            if status.st_size > limit:
                raise Damaged(f"{path} has {status.st_size} bytes, at most {limit} expected: the file is foreign")
            return file.read(limit + 1)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(f"{path} is not a regular file but a link: put the file itself there") from error
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from error


def file_signature(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size and times, which change when a file is replaced or written to; None if there is no file."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_exists(path: Path) -> bool:
    """Whether there is a file, folder or link at `path`."""
    return file_signature(path) is not None
