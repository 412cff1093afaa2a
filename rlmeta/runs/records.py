"""Records: files of one JSON object a line (`metrics.jsonl`, `timing.jsonl`), appended to and cut back by a resume.

Numbers are written as Python's shortest text that reads back as the same float64. JSON has no NaN and no infinities:
every number that is not finite is written `null`, and every `null` is read back as NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rlmeta.errors import CheckpointError, SettingError


class Records:
    """A growing file of records. Every record has reached the operating system when `write` returns.

    A last line that a killed process left unfinished is removed on opening.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot open {self.path}: {error.strerror}; check the folder") from error
        self._size = end_of_last_line(self._file)
        os.ftruncate(self._file, self._size)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record: names to numbers, text, booleans, lists (one entry a learner), tensors or arrays.

        Raises:
            SettingError: a value is none of these.
            CheckpointError: the disk is full or failing; the file ends with the record before.
        """
        rest = memoryview(_encode(record))
        added = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}; the last checkpoint is intact, resume from it"
            ) from error
        self._size += added

    def offset(self) -> int:
        """The length in bytes, after making sure that the disk has them: keep it in the checkpoint.

        Raises:
            CheckpointError: the disk is failing.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}; check the disk") from error
        return self._size

    def truncate(self, offset: int) -> None:
        """Drop every record written after `offset()` returned `offset`.

        Raises:
            CheckpointError: the file is shorter, or `offset` is not the end of a line in it; it is left as it is.
        """
        if not 0 <= offset <= self._size:
            raise CheckpointError(
                f"{self.path} has {self._size} bytes, the checkpoint was taken at {offset}: restore it from a copy"
            )
        if offset and os.pread(self._file, 1, offset - 1) != b"\n":
            raise CheckpointError(
                f"no line of {self.path} ends at byte {offset}, where the checkpoint was taken: restore it from a copy"
            )
        os.ftruncate(self._file, offset)
        self._size = offset

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a file, `null` as NaN; an unfinished last line is left out.

    Raises:
        CheckpointError: the file is missing or unreadable, or a finished line is not a JSON object.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give the file of a run") from error
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} line {number} is not JSON ({error}): remove the line") from error
        if not isinstance(record, dict):
            raise CheckpointError(f"{path} line {number} is not a JSON object: remove the line")
        records.append(_null_to_nan(record))
    return records


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(_plain(record, "record"), allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except (ValueError, RecursionError) as error:
        raise SettingError(f"a record cannot be written as JSON: {error}") from error


def _plain(value: Any, where: str) -> Any:
    """The JSON value for a value; numbers that are not finite become None."""
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
    raise SettingError(f"{where} is a {type(value).__name__}: give numbers, text, lists or tensors")


def _null_to_nan(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {name: _null_to_nan(child) for name, child in value.items()}
    return [_null_to_nan(child) for child in value] if isinstance(value, list) else value


def end_of_last_line(file: int, block: int = 1 << 16) -> int:
    """The offset after the last newline."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - block)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
