"""Metric logs in JSON Lines (`metrics.jsonl`, `timing.jsonl`): appended to, and truncated by a resume.

Numbers are written as Python's shortest text that reads back as the same float64. JSON has no NaN and no infinities:
every number that is not finite is written `null`, and every `null` is read back as NaN.

A checkpoint keeps the length and sha256 of each file, so that a resume continues from the same lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from rlmeta.errors import CheckpointError, SettingError
from rlmeta.runs.files import FULL, is_at, open_at_once, open_in_place

NAMES = ("metrics", "timing")
"""Names of a run's metric logs."""
BLOCK = 1 << 20


class Mark(NamedTuple):
    """Position of a metric log at a checkpoint: its length in bytes, and their sha256."""

    length: int
    sha256: str

    @staticmethod
    def of(saved: Any) -> Mark:
        """Parse the mark that a checkpoint has saved as JSON.

        Raises:
            ValueError: it is malformed.
        """
        if isinstance(saved, list) and len(saved) == 2 and type(saved[0]) is int and isinstance(saved[1], str):
            return Mark(*saved)
        raise ValueError(f"{saved!r} is not the mark of a metric log")


class MetricLog:
    """Metric log: append-only JSON Lines file; every entry has reached the operating system when `write` returns.

    A partial last line, left by a killed process, is removed on opening.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open_in_place(self.path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise CheckpointError(f"cannot open {self.path}: {error.strerror}; check the folder") from error
        try:
            self._size = end_of_last_line(self._file)
            os.ftruncate(self._file, self._size)
            self._digest = digest_of_start(self._file, self._size)
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry: a dictionary of numbers, text, booleans, lists (one entry a learner), tensors or arrays.

        Raises:
            SettingError: a value is none of these.
            CheckpointError: the disk is full or failing (the entry is not in the file then), or another file is at
                the path now.
        """
        line = _encode(entry)
        rest = memoryview(line)
        if not is_at(self._file, self.path):
            raise CheckpointError(
                f"{self.path} is not this run's file any more, the folder was moved, deleted or created again: "
                "the run ends here and leaves what is there alone"
            )
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise self._failed(error) from error
        self._size += len(line)
        self._digest.update(line)

    def mark(self) -> Mark:
        """Fsync the file and return its current length and sha256, to be saved in a checkpoint.

        Raises:
            CheckpointError: the disk is failing.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        return Mark(self._size, self._digest.hexdigest())

    def truncate(self, mark: Mark) -> None:
        """Remove every entry written after `mark()` returned `mark`.

        Raises:
            CheckpointError: the file is shorter, was changed before the mark, or the disk is failing; it stays as it
                is.
        """
        try:
            digest = _checked_start(self._file, self.path, mark)
            os.ftruncate(self._file, mark.length)
        except OSError as error:
            raise self._failed(error) from error
        self._size, self._digest = mark.length, digest

    def _failed(self, error: OSError) -> CheckpointError:
        """Error for a disk that is full or failing, with what to do."""
        advice = "free some space" if error.errno in FULL else "check the disk"
        problem = f"cannot write {self.path}: {error.strerror}; the checkpoints so far are intact"
        return CheckpointError(f"{problem}, {advice} and resume the run")

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_start(path: Path, mark: Mark) -> None:
    """Check that a metric log still begins with the bytes it had at a checkpoint; it is only read.

    Raises:
        CheckpointError: it is missing, not a regular file, shorter, or was changed before the mark.
    """
    try:
        with _opened(path) as file:
            _checked_start(file.fileno(), path, mark)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; restore it from a copy") from error


def _opened(path: Path) -> BinaryIO:
    """Open a metric log for reading.

    Raises:
        CheckpointError: it is a folder, a pipe or the like.
        OSError: it cannot be opened, or is a link.
    """
    file = open(path, "rb", opener=open_at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is not a regular file: restore it from a copy")
    return file


def _checked_start(file: int, path: Path, mark: Mark) -> Any:
    """Hash the start of an open file up to a mark, after a check that it equals the mark's; returns the hash object."""
    size = os.fstat(file).st_size
    if not 0 <= mark.length <= size:
        raise CheckpointError(
            f"{path} has {size} bytes, the checkpoint was taken at {mark.length}: restore it from a copy"
        )
    digest = digest_of_start(file, mark.length)
    if digest.hexdigest() != mark.sha256:
        raise CheckpointError(
            f"the first {mark.length} bytes of {path} are not those it had at the checkpoint: restore it from a copy"
        )
    return digest


def read_metric_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the entries of a metric log, with `null` as NaN; a partial last line is ignored.

    Raises:
        CheckpointError: the file is missing or unreadable, or a complete line is not a JSON object.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give the file of a run") from error
    entries = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} line {number} is not JSON ({error}): remove the line") from error
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path} line {number} is not a JSON object: remove the line")
        entries.append(_null_to_nan(entry))
    return entries


def _encode(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(_plain(entry, "metrics"), allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except (ValueError, RecursionError) as error:
        raise SettingError(f"an entry cannot be written as JSON: {error}") from error


def _plain(value: Any, where: str) -> Any:
    """Convert a value to JSON's types; numbers that are not finite become None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise SettingError(f"{where} has names {list(value)!r}: every name must be text")
        return {name: _plain(child, f"{where}/{name}") for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child, where) for child in value]
    if callable(getattr(value, "tolist", None)):
        return _plain(value.tolist(), where)
    raise SettingError(f"{where} is of type {type(value).__name__}: give numbers, text, lists or tensors")


def _null_to_nan(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {name: _null_to_nan(child) for name, child in value.items()}
    return [_null_to_nan(child) for child in value] if isinstance(value, list) else value


def digest_of_start(file: int, length: int) -> Any:
    """Hash object (sha256) of the first `length` bytes of an open file, which may be updated further."""
    digest, done = hashlib.sha256(), 0
    while done < length and (block := os.pread(file, min(BLOCK, length - done), done)):
        digest.update(block)
        done += len(block)
    return digest


def end_of_last_line(file: int, block: int = 1 << 16) -> int:
    """Offset after the last newline of an open file; 0 without one."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
