"""Files of a run's folder: there whole or not at all, whatever moment a process dies at, read with a limit.

No link is followed, so that nothing which lies in a folder leads a reader or a writer out of it.
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
"""The errors of a disk that has no room, for all or for this user."""


class Damaged(CheckpointError):
    """A checkpoint that is not whole, so that the one before it is worth a try."""


def write_file(path: Path, buffers: Iterable[Buffer]) -> None:
    """Put a file at `path` at once: temporary file beside it, fsync, rename. An error leaves an older one as it was."""
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
    """Open a file that nobody else has: what a killed process left there, or a link, is removed and not written to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def open_in_place(path: Path, flags: int) -> int:
    """Open a file that is written where it lies, made if it is missing.

    Raises:
        CheckpointError: it is a link, no regular file, or a second name of a file elsewhere.
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
    """Whether an open file is still the one at `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(file), there)


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


def sealed(body: dict[str, Any], indent: int | None = None) -> bytes:
    """JSON of `body` with a sha256 of it, so that a changed number shows.

    Raises:
        ValueError, RecursionError: JSON has no form for it.
    """
    return json.dumps({**body, "sha256": _json_digest(body)}, indent=indent).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        ValueError: it is no such JSON, or was changed.
    """
    try:
        content = json.loads(data)
        if content.pop("sha256") != _json_digest(content):
            raise ValueError("the checksum does not match")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no JSON with a checksum ({error!r})") from error
    found: dict[str, Any] = content
    return found


def _json_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()


def sealed_lines(content: bytes) -> bytes:
    """Lines of TOML behind one with a sha256 of them, so that a changed one shows."""
    return _seal_of(content) + content


def unsealed_lines(data: bytes) -> bytes:
    """What `sealed_lines` was given.

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
    """Open a file to read it, as `opener` of `open`: no link is followed, and a pipe in its place does not block."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file; more than `limit` bytes are refused unread.

    Raises:
        Damaged: there is no such file, or it is none that a checkpoint would have.
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
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_exists(path: Path) -> bool:
    """Whether anything is there that can be looked at."""
    return file_signature(path) is not None
