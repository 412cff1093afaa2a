"""Checkpoints: save and load a state of named tensors, atomically, with checksums and without pickle.

A checkpoint is a JSON manifest and the files it names. Tensors are stored in safetensors files named by the sha256 of
their bytes, so a file that exists already is never written again. The long tensors of a replay buffer are cut along
their capacity into segments of `SEGMENT_BYTES`, and only the segments that changed are written. A segment of zeros, as
in a buffer that is not full, takes no file, and no RAM until something is written there. So a manifest cannot make a
reader use more RAM than the files take on the disk.

    state/manifest.json            the newest checkpoint: schema, leaves (dtype, shape, files), file sizes, `about`
    state/manifest.previous.json   the checkpoint before it, loaded with a warning if the newest is damaged
    state/<sha256>.safetensors     tensors of either

Saving writes the tensors first (temporary file in the same folder, fsync, rename), then fsyncs the folder, then
replaces the manifest and fsyncs again, and only then removes files that neither manifest names. So `manifest.json`
names a complete checkpoint whenever the process is killed. One process writes a folder (`run_folder.lock`); any number
may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional.tree import Tree
from rlmeta.runs.files import FULL, Buffer, Damaged, file_exists, file_signature, read_bytes, sync_folder, write_file
from rlmeta.runs.manifest import (
    BLOB,
    CODES,
    DTYPES,
    MANIFEST,
    MANIFEST_LIMIT,
    PREVIOUS,
    Leaf,
    Manifest,
    encode_manifest,
    read_manifest,
)

SEGMENT_BYTES = 4 << 20
"""Size of a replay buffer's segment over all learners; a smaller leaf is stored whole, in the common file."""

HEADER_LIMIT = 32 << 20
READ_ATTEMPTS = 10

Pair: TypeAlias = tuple[dict[str, Tree], dict[str, Any]]

_TEMPORARY = re.compile(r"([0-9a-f]{64}\.safetensors|manifest(\.previous)?\.json)\.tmp")
_ALIGNMENT = 64
"""Alignment of torch's tensors in bytes."""


class Saved(NamedTuple):
    """Result of `save`: names of the files written, reused and removed, and the number of bytes written."""

    written: tuple[str, ...]
    reused: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_written: int


class Loaded(tuple[dict[str, Tree], dict[str, Any]]):
    """Result of `load`: the pair `(state, about)`.

    `damage` is None, or the reason why the previous checkpoint was loaded instead of the newest.
    """

    damage: str | None = None


# ------------------------------------------------------------------------------------------------------------- saving


def save(
    folder: str | os.PathLike[str],
    state: dict[str, Tree],
    about: dict[str, Any],
    segmented: Sequence[str] = ("replay",),
    *,
    learner_axes: int,
) -> Saved:
    """Save a checkpoint atomically: it becomes the newest one in `folder`, or the folder stays as it was.

    Args:
        folder: the `state/` folder of a run, created if missing.
        state: nested dictionary of tensors `[*L, ...]` on any device; names are non-empty and contain no '/'.
        about: metadata for the resume, as plain JSON values (NaN and infinities allowed; tuples come back as lists).
        segmented: leaves with one of these names in their path are `[*L, C, ...]` with a capacity C, saved in segments.
        learner_axes: number of axes in `*L`.

    Returns:
        The names of the files written, reused and removed.

    Raises:
        SettingError: something in `state` or `about` cannot be saved; nothing was written.
        CheckpointError: the disk is full or failing (the previous checkpoint is intact), or the folder holds a
            checkpoint of a newer schema.
    """
    folder = Path(folder)
    leaves = _named_leaves(state)
    if not isinstance(about, dict):
        raise SettingError(f"`about` is of type {type(about).__name__}, expected a dictionary: wrap it in one")
    _check_json(about, "about")
    try:
        return _commit(folder, leaves, about, frozenset(segmented), learner_axes)
    except OSError as error:
        raise _save_error(folder, error) from error


def _commit(
    folder: Path, leaves: dict[str, Tensor | None], about: dict[str, Any], segmented: frozenset[str], learner_axes: int
) -> Saved:
    """Write tensors, then the previous manifest, then the new one, so that the checkpoint appears atomically."""
    _make_folder(folder)
    newest = _rotatable(folder)
    _collect(folder)
    writer = _Writer(folder)
    try:
        stored = _write_leaves(writer, leaves, segmented, learner_axes)
        manifest = encode_manifest(Manifest(stored, writer.files, about))
        sync_folder(folder)
        if newest is not None:
            write_file(folder / PREVIOUS, [newest])
        write_file(folder / MANIFEST, [manifest])
        sync_folder(folder)
    except BaseException:
        _collect(folder)
        raise
    return Saved(tuple(writer.written), tuple(writer.reused), _collect(folder), writer.bytes_written)


class _Writer:
    """Content-addressed writer of tensor files: names are hashes, existing files are reused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        self.written: list[str] = []
        self.reused: list[str] = []
        self.bytes_written = 0

    def store(self, tensors: dict[str, Tensor]) -> str:
        """Store tensors in a file and return its name; an intact file with the same content is reused."""
        buffers = _encode_tensors(tensors)
        digest = hashlib.sha256()
        for buffer in buffers:
            digest.update(buffer)
        name, size = f"{digest.hexdigest()}.safetensors", sum(map(len, buffers))
        if name in self.files:
            return name
        self.files[name] = size
        path = self.folder / name
        if _intact(path, size):
            self.reused.append(name)
            return name
        write_file(path, buffers)
        _remember(path)
        self.written.append(name)
        self.bytes_written += size
        return name


def _write_leaves(
    writer: _Writer, leaves: dict[str, Tensor | None], segmented: frozenset[str], axis: int
) -> dict[str, Leaf | None]:
    """Store every leaf and return its manifest entry by path, in the order of `leaves`."""
    stored: dict[str, Leaf | None] = dict.fromkeys(leaves)
    common: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        if leaf is None:
            continue
        if leaf.dim() > axis and leaf.nbytes > SEGMENT_BYTES and not segmented.isdisjoint(path.split("/")):
            rows = max(1, SEGMENT_BYTES // (leaf.nbytes // leaf.shape[axis]))
            segments = enumerate(torch.split(leaf, rows, axis))
            files = tuple(_store_segment(writer, path, number, segment) for number, segment in segments)
            stored[path] = Leaf(_dtype_name(leaf), tuple(leaf.shape), files, axis, rows)
        else:
            common[path] = leaf
    if common:
        name = writer.store(common)
        stored.update({path: Leaf(_dtype_name(leaf), tuple(leaf.shape), (name,)) for path, leaf in common.items()})
    return stored


def _store_segment(writer: _Writer, path: str, number: int, segment: Tensor) -> str | None:
    """Store a segment and return its file's name; None if all its bytes are zero."""
    segment = segment.detach().contiguous().cpu()
    if not np.frombuffer(_bytes_of(segment), np.uint8).any():
        return None
    return writer.store({_segment_name(path, number): segment})


def _segment_name(path: str, number: int) -> str:
    """Name of a segment within its file; unique, so that no segment can be taken for another."""
    return f"{path}/{number}"


def _encode_tensors(tensors: dict[str, Tensor]) -> list[Buffer]:
    """Encode tensors in the safetensors format, without copying those that are contiguous on the CPU.

    The library's own writer refuses tensors that share storage, as a target network's do at the start.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {}
    data: list[Buffer] = []
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
        data.append(_bytes_of(tensor))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise SettingError(f"the names of {len(tensors)} tensors take {len(text)} bytes, above {HEADER_LIMIT}")
    return [len(text).to_bytes(8, "little") + text, *data]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Bytes of a tensor in row-major order."""
    plain = tensor.detach().contiguous().resolve_conj().resolve_neg().cpu()
    row = plain.as_strided((plain.numel(),), (1,))  # `reshape` keeps the odd stride of an axis of size 1
    return row.view(torch.uint8).numpy().data


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _named_leaves(state: dict[str, Tree]) -> dict[str, Tensor | None]:
    """Flatten a state into leaves by path 'a/b', with None for an empty dictionary; refuses what cannot be saved."""
    if not isinstance(state, dict):
        raise SettingError(f"a state is a dictionary of tensors, not {type(state).__name__}: wrap it in one")
    named: dict[str, Tensor | None] = {}

    def visit(tree: Tree, path: str) -> None:
        if not isinstance(tree, dict):
            _check_leaf(tree, path)
            named[path] = tree
            return
        if not tree and path:
            named[path] = None
        for name, value in tree.items():
            _check_name(name, path)
            visit(value, f"{path}/{name}" if path else name)

    visit(state, "")
    return named


def _check_name(name: Any, parent: str) -> None:
    good = isinstance(name, str) and name not in ("", "__metadata__") and "/" not in name
    if good:
        with contextlib.suppress(UnicodeEncodeError):
            name.encode()
            return
    raise SettingError(f"the state has a name {name!r} in '{parent}': names are text, not empty, without '/'")


def _check_leaf(leaf: Any, path: str) -> None:
    if not isinstance(leaf, Tensor):
        raise SettingError(f"state '{path}' is of type {type(leaf).__name__}, expected a tensor: put it into `about`")
    if leaf.dtype not in CODES or leaf.layout != torch.strided or leaf.device.type == "meta":
        raise SettingError(
            f"state '{path}' is a {leaf.layout} tensor of {leaf.dtype} on {leaf.device}, which cannot be saved: "
            f"use a dense tensor of {', '.join(DTYPES)}"
        )


def _check_json(value: Any, where: str) -> None:
    """Refuse a value that does not survive a JSON round trip (tuples aside, which become lists)."""
    if isinstance(value, dict):
        for name, child in value.items():
            if not isinstance(name, str):
                raise SettingError(f"{where} has the name {name!r} ({type(name).__name__}): JSON needs text, use str()")
            _check_json(child, f"{where}/{name}")
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _check_json(child, f"{where}/{index}")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise SettingError(
            f"{where} is of type {type(value).__name__}: give plain numbers, text, lists and dictionaries"
        )


def _save_error(folder: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or str(error)
    advice = "free some space" if error.errno in FULL else "check the disk and its permissions"
    kept = "the previous checkpoint is intact" if file_exists(folder / MANIFEST) else "no checkpoint was there before"
    return CheckpointError(f"cannot save a checkpoint in {folder}: {reason}; {kept}; {advice} and resume the run")


# ------------------------------------------------------------------------------------------------------------ loading


def load(folder: str | os.PathLike[str]) -> Loaded:
    """Load the newest checkpoint of `folder`; every file is checked by size and sha256 before it is used.

    If the newest is damaged, the previous one is loaded with a `RuntimeWarning`, and `damage` of the result holds the
    reason.

    Args:
        folder: the `state/` folder of a run; it is only read.

    Returns:
        `(state, about)`, tensors on the CPU with the dtypes, shapes and order they were saved with.

    Raises:
        CheckpointError: no checkpoint, none that is complete, or an unknown schema.
    """
    pair, damage = _first_good(Path(folder), _read_state)
    loaded = Loaded(pair)
    loaded.damage = damage
    return loaded


def about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of the newest checkpoint; reads the manifest and no tensors (see `load` for errors)."""
    checkpoint, _ = _first_good(Path(folder), lambda _, manifest: ({}, manifest.about))
    return checkpoint[1]


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was ever completed in `folder`, damaged or not."""
    return any(file_exists(Path(folder) / manifest) for manifest in (MANIFEST, PREVIOUS))


def is_unfinished(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds only the leftovers of a save that was killed before the first checkpoint was complete."""
    path = Path(folder)
    if path.is_symlink() or not path.is_dir() or is_saved(path):
        return False
    return all(BLOB.fullmatch(name) or _TEMPORARY.fullmatch(name) for name in os.listdir(path))


def _first_good(folder: Path, read: Callable[[Path, Manifest], Pair]) -> tuple[Pair, str | None]:
    """Read the newest checkpoint that is intact, and say why if that is the previous one.

    Returns:
        The result of `read(folder, manifest)`, and None or what is damaged in the newest checkpoint.
    """
    if not is_saved(folder):
        raise CheckpointError(f"no checkpoint in {folder} (no {MANIFEST}): give the folder of a run that has saved one")
    damage = ""
    for _ in range(READ_ATTEMPTS):  # a run that goes on saving may remove files between two reads
        before = file_signature(folder / MANIFEST)
        try:
            return read(folder, read_manifest(folder / MANIFEST)), None
        except Damaged as error:
            damage = str(error)
        if file_signature(folder / MANIFEST) == before:
            break
    try:
        checkpoint = read(folder, read_manifest(folder / PREVIOUS))
    except Damaged as error:
        raise CheckpointError(
            f"{damage}; the checkpoint before it does not help ({error}): restore {folder} from a copy"
        ) from error
    warnings.warn(f"{damage}; using the checkpoint before it", RuntimeWarning, stacklevel=3)
    return checkpoint, damage


def _read_state(folder: Path, manifest: Manifest) -> Pair:
    state: dict[str, Tree] = {}
    opened: dict[str, dict[str, Tensor]] = {}
    for path, leaf in manifest.leaves.items():
        *parents, name = path.split("/")
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = {} if leaf is None else _read_leaf(folder, manifest, path, leaf, opened)
    return state, manifest.about


def _read_leaf(folder: Path, manifest: Manifest, path: str, leaf: Leaf, opened: dict[str, dict[str, Tensor]]) -> Tensor:
    """Read one tensor; `opened` caches the files that hold whole leaves."""
    if leaf.axis is None or leaf.rows is None:
        (common,) = filter(None, leaf.files)
        if common not in opened:
            opened[common] = _read_tensors(folder / common, manifest.files[common])
        return _expect(opened[common], path, leaf.dtype, leaf.shape, folder / common)
    whole = _zeros(folder, path, leaf)
    for number, (name, part) in enumerate(zip(leaf.files, torch.split(whole, leaf.rows, leaf.axis), strict=True)):
        if name is not None:
            tensors = _read_tensors(folder / name, manifest.files[name])
            part.copy_(_expect(tensors, _segment_name(path, number), leaf.dtype, tuple(part.shape), folder / name))
    return whole


def _zeros(folder: Path, path: str, leaf: Leaf) -> Tensor:
    """Allocate a tensor of zeros whose pages take RAM only once they are written to."""
    try:
        size = math.prod(leaf.shape) * DTYPES[leaf.dtype].itemsize
        raw = np.zeros(size + _ALIGNMENT, np.uint8)
    except (MemoryError, ValueError, OverflowError) as error:
        raise CheckpointError(f"no memory for '{path}' of {leaf.shape} in {folder}: use a larger machine") from error
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(DTYPES[leaf.dtype]).view(leaf.shape)


def _expect(tensors: dict[str, Tensor], name: str, dtype: str, shape: tuple[int, ...], path: Path) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
        content = "nothing" if tensor is None else f"{_dtype_name(tensor)} {tuple(tensor.shape)}"
        raise Damaged(f"{path} holds {content} for '{name}', the manifest says {dtype} {shape}")
    return tensor


def _read_tensors(path: Path, size: int) -> dict[str, Tensor]:
    """Read a safetensors file, after a check of its size, sha256 and header size."""
    data = read_bytes(path, size)
    if len(data) != size:
        raise Damaged(f"{path} has {len(data)} bytes of {size}: the file is truncated or foreign")
    if f"{hashlib.sha256(data).hexdigest()}.safetensors" != path.name:
        raise Damaged(f"{path} does not match its sha256: the file is corrupted")
    if int.from_bytes(data[:8], "little") > HEADER_LIMIT:
        raise Damaged(f"{path} declares a header above {HEADER_LIMIT} bytes: the file is foreign")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the library raises errors of several kinds on malformed input
        raise Damaged(f"{path} is not a safetensors file ({error})") from error
    _remember(path)
    # copied to aligned memory: the bits of a matrix product depend on the alignment of its factors
    return {name: tensor.clone() for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------------------------- files

_verified: dict[Path, tuple[int, ...]] = {}
"""Files whose content this process has written or checked, with their signature at that time.

A name alone does not prove the content: after falling back to the previous checkpoint, the run computes the hash of the
damaged file again, and must not reuse that file.
"""


def _intact(path: Path, size: int) -> bool:
    """Whether a file's content matches the hash in its name; read only if this process has not checked it yet."""
    signature = file_signature(path)
    if signature is None:
        return False
    if _verified.get(path.absolute()) == signature:
        return True
    try:
        data = read_bytes(path, size)
    except Damaged:
        return False
    if f"{hashlib.sha256(data).hexdigest()}.safetensors" != path.name:
        return False
    _remember(path)
    return True


def _remember(path: Path) -> None:
    signature = file_signature(path)
    if signature is not None:
        _verified[path.absolute()] = signature


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def _rotatable(folder: Path) -> bytes | None:
    """Bytes of the newest manifest, to be kept as the previous one; None if damaged. A newer schema is refused."""
    path = folder / MANIFEST
    try:
        read_manifest(path)
        return read_bytes(path, MANIFEST_LIMIT)
    except Damaged:
        return None


def _collect(folder: Path) -> tuple[str, ...]:
    """Remove temporary files and unreferenced tensor files; those that cannot be removed are left for later."""
    named: set[str] | None = set()
    for manifest in (MANIFEST, PREVIOUS):
        if named is not None and os.path.lexists(folder / manifest):
            try:
                named |= read_manifest(folder / manifest).files.keys()
            except CheckpointError:
                named = None  # keep all files: a damaged manifest may still be repaired by hand
    removed: list[str] = []
    try:
        present = sorted(os.listdir(folder))
    except OSError:
        return ()
    for name in present:
        unused = BLOB.fullmatch(name) and named is not None and name not in named
        if unused or _TEMPORARY.fullmatch(name):
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
                removed.append(name)
                _verified.pop((folder / name).absolute(), None)
    return tuple(removed)
