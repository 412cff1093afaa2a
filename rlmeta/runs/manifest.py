"""Manifest of a checkpoint: its tensors, the files that hold them, and metadata, as JSON with a checksum.

Everything read from it is validated before it is used; file names can be nothing but hashes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlmeta.errors import CheckpointError, SettingError
from rlmeta.runs.files import Damaged, read_bytes, sealed, unsealed

MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
FORMAT, SCHEMA = "rlmeta state", 1
MANIFEST_LIMIT = 64 << 20

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Dtypes that can be saved, with their names in safetensors."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
"""The same dtypes by torch's names."""
BLOB = re.compile(r"[0-9a-f]{64}\.safetensors")
"""File name of a tensor file: the sha256 of its content."""


@dataclass(frozen=True)
class Leaf:
    """Location of a tensor: whole in one file, or in consecutive segments of `rows` along `axis`.

    Every segment has a file of its own, or None if all its bytes are zero.
    """

    dtype: str
    shape: tuple[int, ...]
    files: tuple[str | None, ...]
    axis: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's leaves by path (None: an empty dictionary), the size of each file in bytes, and metadata."""

    leaves: dict[str, Leaf | None]
    files: dict[str, int]
    about: dict[str, Any]


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as JSON with its sha256, so that a flipped bit is detected.

    Raises:
        SettingError: `about` cannot be written as JSON, or is too long.
    """
    leaves: dict[str, Any] = dict.fromkeys(manifest.leaves)
    for path, leaf in manifest.leaves.items():
        if leaf is None:
            continue
        leaves[path] = {"dtype": leaf.dtype, "shape": list(leaf.shape), "files": list(leaf.files)}
        if leaf.axis is not None:
            leaves[path] |= {"axis": leaf.axis, "rows": leaf.rows}
    body = {"format": FORMAT, "schema": SCHEMA, "leaves": leaves, "files": manifest.files, "about": manifest.about}
    try:
        data = sealed(body, indent=1)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"`about` cannot be written as JSON: {error}") from error
    if len(data) > MANIFEST_LIMIT:
        raise SettingError(f"{MANIFEST} would take {len(data)} bytes, above {MANIFEST_LIMIT}: shorten `about`")
    return data


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        Damaged: it is missing, corrupted, foreign or malformed.
        CheckpointError: it is intact, but of a schema that this version does not know.
    """
    data = read_bytes(path, MANIFEST_LIMIT)
    try:
        content = unsealed(data)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        schema = content["schema"]
    except (ValueError, KeyError) as error:
        raise Damaged(f"{path} is corrupted or not a checkpoint of rlmeta ({error})") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema!r}, this rlmeta reads {SCHEMA}: use the rlmeta that wrote it")
    try:
        return _parse_manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is malformed ({error!r})") from error


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    """Parse the manifest of a checkpoint, and validate every field that is used later.

    File names must be hashes, so that none leads out of the folder.
    """
    files = dict(content["files"])
    for name, size in files.items():
        if not BLOB.fullmatch(name) or not _is_count(size):
            raise ValueError(f"file {name!r} of {size!r} bytes")
    described = content["leaves"].items()
    leaves = {path: None if leaf is None else _parse_leaf(path, leaf, files) for path, leaf in described}
    _check_paths(leaves)
    _check_segments(leaves)
    if not isinstance(content["about"], dict):
        raise ValueError("about is not a dictionary")
    return Manifest(leaves, files, content["about"])


def _parse_leaf(path: str, leaf: dict[str, Any], files: dict[str, int]) -> Leaf:
    """Parse the entry of one tensor, and check that its files are as long as its shape and dtype need."""
    parsed = Leaf(leaf["dtype"], tuple(leaf["shape"]), tuple(leaf["files"]), leaf.get("axis"), leaf.get("rows"))
    if not all(map(_is_count, parsed.shape)):
        raise ValueError(f"shape of '{path}'")
    rows = [1] if parsed.axis is None else _segment_rows(path, parsed)
    if len(parsed.files) != len(rows) or (parsed.axis is None and None in parsed.files):
        raise ValueError(f"files of '{path}'")
    row = math.prod(parsed.shape) // max(1, sum(rows)) * DTYPES[parsed.dtype].itemsize
    if any(name is not None and count * row > files[name] for name, count in zip(parsed.files, rows)):
        raise ValueError(f"files of '{path}', which are shorter")
    return parsed


def _segment_rows(path: str, leaf: Leaf) -> list[int]:
    """Number of rows of every segment of a leaf."""
    axis, rows = leaf.axis, leaf.rows
    if axis is None or rows is None or not _is_count(axis) or not _is_count(rows) or axis >= len(leaf.shape):
        raise ValueError(f"segments of '{path}'")
    length = leaf.shape[axis]
    if not math.prod(leaf.shape) or not 1 <= rows <= length or -(-length // rows) != len(leaf.files):
        raise ValueError(f"segments of '{path}'")
    return [min(rows, length - start) for start in range(0, length, rows)]


def _check_segments(leaves: dict[str, Leaf | None]) -> None:
    """Refuse a file that several segments refer to: it would be read into RAM several times."""
    known: set[str] = set()
    for path, leaf in leaves.items():
        for name in () if leaf is None or leaf.axis is None else leaf.files:
            if name in known:
                raise ValueError(f"'{path}' names the file {name} of another segment")
            known |= set() if name is None else {name}


def _check_paths(paths: Iterable[str]) -> None:
    """Refuse paths with empty names, and paths that lead through another leaf."""
    known = set(paths)
    for path in known:
        parts = path.split("/")
        if not all(parts) or any("/".join(parts[:length]) in known for length in range(1, len(parts))):
            raise ValueError(f"leaf name '{path}'")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
