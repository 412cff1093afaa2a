"""Files that are there whole or not at all, whatever moment a process dies at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from rlmeta.errors import CheckpointError

Buffer: TypeAlias = bytes | memoryview


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
