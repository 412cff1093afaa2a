from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional import tree
from rlmeta.runs import checkpoint, manifest

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
SEGMENT = 256


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(checkpoint, "_verified", {})


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(plain.view(torch.uint8).tolist())


def same(a: Any, b: Any) -> bool:
    """Equal in structure, order, dtypes, shapes and every bit."""
    if isinstance(a, dict) or isinstance(b, dict):
        both = isinstance(a, dict) and isinstance(b, dict)
        return both and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def of_step(step: int) -> dict[str, Any]:
    """The state of a little agent at a step: everything changes, and a few entries of the replay memory."""
    entries = torch.arange(48).unsqueeze(1)
    age = torch.clamp((step * 2 - entries - 1) // 48, min=-1) * 48 + entries
    return {
        "params": {"w": torch.full((2, 3), float(step)), "b": torch.full((2,), step, dtype=torch.float64)},
        "replay": {
            "observation": age.float().repeat(2, 1, 1).expand(2, 48, 4).contiguous(),
            "reward": age.double().squeeze(1).repeat(2, 1) / 7,
            "position": torch.tensor([step, step]),
        },
    }


def save_step(folder: Path, step: int) -> checkpoint.Saved:
    return checkpoint.save(folder, of_step(step), {"step": step}, learner_axes=1)


def is_step(loaded: Any, step: int) -> bool:
    return same(loaded[0], of_step(step)) and loaded[1] == {"step": step}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(bytes(data))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest with a valid checksum, as an attacker would."""
    content = manifest_of(folder)
    del content["sha256"]
    change(content)
    digest = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3, 3), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    leaf = bits[..., 0] > 127 if dtype == torch.bool else bits.view(dtype)[..., 0]
    state = {"a": leaf, "nested": {"b": leaf, "none": {}}}
    checkpoint.save(tmp_path, state, {}, learner_axes=0)
    loaded, _ = checkpoint.load(tmp_path)
    assert same(loaded, state)
    assert loaded["nested"]["none"] == {}
    assert loaded["a"].data_ptr() != loaded["nested"]["b"].data_ptr() or loaded["a"].numel() == 0


def test_tensors_in_any_memory_layout_come_back(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    complex_ = torch.randn(2, 4, dtype=torch.complex64)
    state = {
        "transposed": base.t(),
        "expanded": torch.randn(3, 1).expand(3, 5),
        "sliced": base[1::2, ::3],
        "shared": base,
        "shared again": base,
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "conjugated": complex_.conj(),
        "negated": complex_.conj().imag,
        "negated in one piece": torch._neg_view(base[0].clone()),
        "every second": base[0, ::2],
        "one for all": torch.tensor([7]).expand(5),
        "one of a column": base[:1, 3],
        "replay": {"strided": torch.randn(40, 3, 4).transpose(0, 1)},
    }
    checkpoint.save(tmp_path, state, {}, learner_axes=1)
    loaded, _ = checkpoint.load(tmp_path)
    assert same(loaded, state)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tree.leaves(loaded)), "as what is allocated: bits depend on it"
    loaded["shared"].zero_()
    assert same(loaded["shared again"], base)


def test_about_comes_back_exactly_and_is_read_without_tensors(tmp_path: Path) -> None:
    about = {"steps": 2**53 + 1, "rate": 0.1 + 0.2, "clip": float("inf"), "é\ud800": [None, True, "x", {"k": -0.0}]}
    checkpoint.save(tmp_path, of_step(1), about, learner_axes=1)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    found = checkpoint.about(tmp_path)
    assert found == about
    assert str(found) == str(about)
    assert str(checkpoint.save(tmp_path / "2", {}, {"nan": float("nan")}, learner_axes=0).written) == "()"
    assert str(checkpoint.load(tmp_path / "2")) == "({}, {'nan': nan})"


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=5).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16, torch.bool]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3)) + draw(st.lists(st.integers(0, 200), max_size=1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@given(
    state=st.dictionaries(
        names | st.just("replay"),
        st.recursive(
            tensors(), lambda trees: st.dictionaries(names | st.just("replay"), trees, max_size=3), max_leaves=5
        ),
        max_size=4,
    ),
    learner_axes=st.integers(0, 3),
    about=st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.floats(allow_nan=False), st.lists)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state_comes_back(tmp_path: Path, state: dict[str, Any], learner_axes: int, about: dict[str, Any]) -> None:
    checkpoint.save(tmp_path, state, about, learner_axes=learner_axes)
    loaded = checkpoint.load(tmp_path)
    assert same(loaded[0], state)
    assert loaded[1] == about
    assert loaded.damage is None


def test_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    state = {"bool": torch.tensor([True, False, True]), "f64": torch.randn(3).double(), "bf": torch.ones(5).bfloat16()}
    (name,) = checkpoint.save(tmp_path, state, {}, learner_axes=0).written
    read = safetensors.torch.load_file(tmp_path / name)
    assert same({key: read[key] for key in state}, state)
    data = (tmp_path / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    for entry in json.loads(data[8 : 8 + length]).values():
        assert entry["data_offsets"][0] % {"F64": 8, "BF16": 2, "BOOL": 1}[entry["dtype"]] == 0
    assert name == hashlib.sha256(data).hexdigest() + ".safetensors"


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(3),
        {"a": 1.0},
        {"a": None},
        {"a": [torch.zeros(1)]},
        {"a/b": torch.zeros(1)},
        {"": torch.zeros(1)},
        {"x": {3: torch.zeros(1)}},
        {"__metadata__": torch.zeros(1)},
        {"\ud800": torch.zeros(1)},
        {"a": torch.zeros(1, dtype=torch.complex128)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
    ],
    ids=lambda state: repr(state)[:40],
)
def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path, state: Any) -> None:
    with pytest.raises(SettingError) as caught:
        checkpoint.save(tmp_path / "state", state, {}, learner_axes=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("about", "place"),
    [({"a": torch.zeros(1)}, "about/a"), ({"a": [{3: 4}]}, "about/a/0"), ({"a": {"b": {1}}}, "about/a/b"), ([1], None)],
    ids=["tensor", "integer name", "set", "list"],
)
def test_an_about_that_json_would_change_is_refused_with_its_place(tmp_path: Path, about: Any, place: str) -> None:
    with pytest.raises(SettingError, match=place or "`about` is of type list"):
        checkpoint.save(tmp_path / "state", {}, about, learner_axes=0)
    assert not (tmp_path / "state").exists()


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SettingError, match="JSON"):
        checkpoint.save(tmp_path, of_step(2), {"huge": 10**5000}, learner_axes=1)
    shortest = (tmp_path / "manifest.json").stat().st_size
    for module, limit, bytes_ in ((manifest, "MANIFEST_LIMIT", shortest), (checkpoint, "HEADER_LIMIT", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, bytes_)
            with pytest.raises(SettingError, match="above"):
                checkpoint.save(tmp_path, of_step(2), {"long": "x" * 1000}, learner_axes=1)
    assert sorted(os.listdir(tmp_path)) == before
    assert is_step(checkpoint.load(tmp_path), 1)


# ----------------------------------------------------------------------------------------------------------- segments


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("learners", [(), (3,), (2, 3)], ids=str)
def test_only_changed_segments_are_written(tmp_path: Path, learners: tuple[int, ...]) -> None:
    state: dict[str, Any]
    axes = len(learners)
    per_entry = 4 * 4 * max(1, torch.Size(learners).numel())
    rows = SEGMENT // per_entry
    capacity = rows * 10 + 1
    memory = torch.randn(*learners, capacity, 4)
    state = {"w": torch.zeros(learners), "replay": {"x": memory, "at": torch.zeros(learners, dtype=torch.int64)}}
    first = checkpoint.save(tmp_path, state, {}, learner_axes=axes)
    assert len(first.written) == 11 + 1
    assert manifest_of(tmp_path)["leaves"]["replay/x"]["rows"] == rows
    before = identity(tmp_path)

    memory.narrow(axes, 3 * rows, 1)[..., -1] += 1  # the first entry of the fourth segment, of every learner
    second = checkpoint.save(tmp_path, state, {}, learner_axes=axes)
    assert len(second.written) == 1
    assert second.bytes_written == sum((tmp_path / name).stat().st_size for name in second.written)
    assert len(second.reused) == 10 + 1
    after = identity(tmp_path)
    assert {name: after[name] for name in before} == before

    memory.narrow(axes, 4 * rows - 1, 2).zero_()  # the last entry of the fourth and the first of the fifth
    state["w"] += 1
    third = checkpoint.save(tmp_path, state, {}, learner_axes=axes)
    assert len(third.written) == 3
    loaded = checkpoint.load(tmp_path)[0]
    assert same(loaded, state)
    assert len(third.removed) == 1  # the fourth segment of the first checkpoint


def test_which_leaves_are_cut(tmp_path: Path) -> None:
    long = torch.arange(SEGMENT * 2.0).reshape(1, -1)
    state = {
        "replay": {"deep": {"long": long}, "short": long[:, : SEGMENT // 4], "scalar": torch.zeros(1)},
        "replayed": long,
        "memory": {"replay": long, "other": long},
        "buffer": {"x": long},
    }
    checkpoint.save(tmp_path, state, {}, segmented=("replay", "buffer"), learner_axes=1)
    leaves = manifest_of(tmp_path)["leaves"]
    assert {path for path, leaf in leaves.items() if "axis" in leaf} == {
        "replay/deep/long",
        "memory/replay",
        "buffer/x",
    }
    named = [name for leaf in leaves.values() if "axis" in leaf for name in leaf["files"]]
    assert len(set(named)) == len(named) == 3 * 8, "equal segments have files of their own"
    assert same(checkpoint.load(tmp_path)[0], state)
    one_row = {"replay": torch.randn(3, 2 * SEGMENT)}
    assert len(checkpoint.save(tmp_path, one_row, {}, learner_axes=0).written) == 3
    assert same(checkpoint.load(tmp_path)[0], one_row)


def test_segments_of_zeros_take_no_file_and_no_memory(tmp_path: Path) -> None:
    memory = torch.zeros(SEGMENT * 8)
    memory[-1], memory[SEGMENT] = 1.0, -0.0  # which is zero, but not all of its bits are
    state = {"replay": {"x": memory, "none": torch.zeros(2 * SEGMENT, dtype=torch.bool)}}
    saved = checkpoint.save(tmp_path, state, {}, learner_axes=0)
    assert len(saved.written) == 2
    leaves = manifest_of(tmp_path)["leaves"]
    assert [name for name in leaves["replay/x"]["files"] if name] == list(saved.written)
    assert leaves["replay/none"]["files"] == [None, None]
    loaded = checkpoint.load(tmp_path)[0]
    assert same(loaded, state)
    loaded["replay"]["none"][:] = True
    assert loaded["replay"]["x"].data_ptr() % 64 == 0 == loaded["replay"]["none"].data_ptr() % 64


def test_segments_of_another_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "SEGMENT_BYTES", 64)
    assert is_step(checkpoint.load(tmp_path), 5)


def test_a_file_of_many_leaves_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 5)
    read, paths = checkpoint._read_tensors, []

    def count(path: Path, size: int) -> dict[str, torch.Tensor]:
        paths.append(path)
        return read(path, size)

    monkeypatch.setattr(checkpoint, "_read_tensors", count)
    assert is_step(checkpoint.load(tmp_path), 5)
    assert paths.count(tmp_path / manifest_of(tmp_path)["leaves"]["params/w"]["files"][0]) == 1


def test_what_was_written_or_checked_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = checkpoint.read_bytes, list[Path]()

    def count(path: Path, limit: int) -> bytes:
        if path.suffix == ".safetensors":
            seen.append(path)
        return read(path, limit)

    monkeypatch.setattr(checkpoint, "read_bytes", count)
    state = {"replay": torch.randn(SEGMENT)}
    assert len(checkpoint.save(tmp_path, state, {}, learner_axes=0).written) == 4
    assert len(checkpoint.save(tmp_path, state, {}, learner_axes=0).reused) == 4
    assert seen == []
    checkpoint._verified.clear()
    checkpoint.load(tmp_path)
    assert len(seen) == 4
    checkpoint.save(tmp_path, state, {}, learner_axes=0)
    assert len(seen) == 4
    assert len(checkpoint._verified) == 4
    for step in range(3):
        checkpoint.save(tmp_path, {"step": torch.tensor(step)}, {}, learner_axes=0)
    assert len(checkpoint._verified) == 2


def test_a_new_folder_lasts_like_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced = tmp_path / "runs" / "first" / "state", list[int]()
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    save_step(folder, 1)
    assert is_step(checkpoint.load(folder), 1)
    assert folder.parent.stat().st_ino in synced


def test_what_a_killed_save_left_makes_room_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_checkpoints(tmp_path)
    left = [tmp_path / ("0" * 64 + ".safetensors"), tmp_path / ("1" * 64 + ".safetensors.tmp")]
    for path in left:
        path.write_bytes(b"left by a killed save")
    write, there = os.write, list[bool]()

    def look(file: int, data: memoryview) -> int:
        there.extend(path.exists() for path in left)
        return write(file, data)

    monkeypatch.setattr(os, "write", look)
    save_step(tmp_path, 9)
    assert len(there) > 4
    assert not any(there)


def test_only_files_of_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine.tmp").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    used = []
    for step in range(1, 30):
        orphan = "0" * 64 + ".safetensors"
        for name in (orphan, orphan + ".tmp", "manifest.json.tmp", "manifest.previous.json.tmp"):
            (tmp_path / name).write_bytes(b"left by a killed save")
        save_step(tmp_path, step)
        used.append(set(manifest_of(tmp_path)["files"]))
        expected = set().union(*used[-2:]) | {"manifest.json", "notes.txt", "mine.tmp", "model.safetensors"}
        assert set(os.listdir(tmp_path)) == expected | ({"manifest.previous.json"} if step > 1 else set())


# ------------------------------------------------------------------------------------------------------------- damage


def two_checkpoints(folder: Path) -> None:
    save_step(folder, 7)
    save_step(folder, 8)


def put(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2, 5),
    "last bit": lambda path: flip(path, path.stat().st_size - 1, 7),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "pickle": lambda path: path.write_bytes(pickle.dumps(print)),
    "folder": lambda path: put(path, os.mkdir),
    "pipe": lambda path: put(path, os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_recovered_from_or_refused(tmp_path: Path, damage: str) -> None:
    whole = tmp_path / "whole"
    two_checkpoints(whole)
    newest, previous = manifest_of(whole)["files"], json.loads((whole / "manifest.previous.json").read_text())["files"]
    assert set(previous) - set(newest)
    assert set(newest) & set(previous)
    for name in os.listdir(whole):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        DAMAGE[damage](folder / name)
        if name in newest and name in previous:
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(folder)
            assert name in str(caught.value)
            assert {"halved": "truncated", "pipe": "not a regular file"}.get(damage, "") in str(caught.value)
            assert "\n" not in str(caught.value)
        elif name in newest or name == "manifest.json":
            with pytest.warns(RuntimeWarning, match="using the checkpoint before it"):
                loaded = checkpoint.load(folder)
            assert is_step(loaded, 7)
            assert loaded.damage is not None
            assert name in loaded.damage
        else:
            loaded = checkpoint.load(folder)
            assert is_step(loaded, 8)
            assert loaded.damage is None
        shutil.rmtree(folder)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_the_manifest_goes_unnoticed(every: int, tmp_path: Path) -> None:
    save_step(tmp_path, 8)
    path = tmp_path / "manifest.json"
    text, good = path.read_bytes(), checkpoint.read_manifest(path)
    noticed = 0
    places = range(0, len(text), every)
    for offset in places:
        path.write_bytes(text)
        flip(path, offset, offset % 8)
        try:
            assert checkpoint.read_manifest(path) == good, offset
        except CheckpointError:
            noticed += 1
    white = sum(text[offset : offset + 1] == b" " for offset in places)
    assert noticed > len(places) - 2 * white - 1  # the others turned white space into white space


def test_a_lone_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    for name in os.listdir(tmp_path):
        good = (tmp_path / name).read_bytes()
        flip(tmp_path / name, len(good) // 2)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path)
        (tmp_path / name).write_bytes(good)
    assert is_step(checkpoint.load(tmp_path), 3)


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    for read in (checkpoint.load, checkpoint.about):
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(CheckpointError, match="no checkpoint in"):
                read(folder)


@pytest.mark.parametrize("fresh_process", [True, False])
def test_an_equal_run_after_a_fall_back_does_not_take_the_damaged_file_for_good(
    tmp_path: Path, fresh_process: bool
) -> None:
    two_checkpoints(tmp_path)
    unique = set(manifest_of(tmp_path)["files"]) - set(
        json.loads((tmp_path / "manifest.previous.json").read_text())["files"]
    )
    for name in unique:
        flip(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    if fresh_process:
        checkpoint._verified.clear()
    with pytest.warns(RuntimeWarning):
        assert is_step(checkpoint.load(tmp_path), 7)
    save_step(tmp_path, 8)
    assert is_step(checkpoint.load(tmp_path), 8)


@pytest.mark.filterwarnings("ignore:.*using the checkpoint before it:RuntimeWarning")
def test_a_damaged_manifest_never_pushes_out_the_good_one_before_it(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    flip(tmp_path / "manifest.json", 30)
    save_step(tmp_path, 9)
    assert is_step(checkpoint.load(tmp_path), 9)
    flip(tmp_path / "manifest.json", 30)
    assert is_step(checkpoint.load(tmp_path), 7)


# ------------------------------------------------------------------------------------------------------------ foreign


def set_files(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        old = content["leaves"]["w"]["files"][0]
        content["files"] = {name: content["files"][old]}
        content["leaves"]["w"]["files"] = [name]

    return change


def set_leaf(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["leaves"]["w"].update(changes)


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "absolute name": set_files("/etc/passwd"),
    "name above": set_files("../secret.safetensors"),
    "hash in a folder": set_files("a/" + "a" * 64 + ".safetensors"),
    "hash and newline": set_files("a" * 64 + ".safetensors\n"),
    "negative size": lambda content: content["files"].update({"a" * 64 + ".safetensors": -1}),
    "size that is text": lambda content: content["files"].update({"a" * 64 + ".safetensors": "9"}),
    "file not listed": lambda content: content.update(files={}),
    "files of text": lambda content: content.update(files="files"),
    "no leaves": lambda content: content.pop("leaves"),
    "leaves in a list": lambda content: content.update(leaves=[1]),
    "about is a list": lambda content: content.update(about=[]),
    "another format": lambda content: content.update(format="other"),
    "unknown dtype": set_leaf(dtype="object"),
    "dtype in a list": set_leaf(dtype=["float32"]),
    "longer shape": set_leaf(shape=[3, 1000]),
    "shorter shape": set_leaf(shape=[2]),
    "negative shape": set_leaf(shape=[-3, -1]),
    "fraction in shape": set_leaf(shape=[3.0]),
    "another dtype": set_leaf(dtype="int32"),
    "no file": set_leaf(files=[]),
    "two files": lambda content: content["leaves"]["w"]["files"].extend(content["files"]),
    "axis out of range": set_leaf(axis=9, rows=1),
    "axis below zero": set_leaf(axis=-1, rows=3),
    "axis far below zero": set_leaf(axis=-9, rows=3),
    "no rows": set_leaf(axis=0, rows=0),
    "axis without rows": set_leaf(axis=0),
    "segment of a whole file": set_leaf(axis=0, rows=3),
    "no file of a whole leaf": set_leaf(files=[None]),
    "a cut leaf of nothing": set_leaf(shape=[0], files=[], axis=0, rows=1),
    "a cut leaf of nothing, and long": set_leaf(shape=[1, 0, 10**30], files=[None], axis=0, rows=1),
    "an axis that there is not, and no files": set_leaf(files=[], axis=1, rows=1),
    "rows above all numbers": set_leaf(files=[None], axis=0, rows=10**30),
    "zeros above all numbers": set_leaf(shape=[3, 10**30], files=[None], axis=0, rows=3),
    "zeros above all memory": set_leaf(shape=[3, 10**17], files=[None], axis=0, rows=3),
    "leaf that is a number": lambda content: content["leaves"].update(w=3),
    "leaf below a leaf": lambda content: content["leaves"].update({"w/x": content["leaves"]["w"]}),
    "leaf below an empty one": lambda content: content["leaves"].update({"e": None, "e/x": content["leaves"]["w"]}),
    "empty name": lambda content: content["leaves"].update({"/w": content["leaves"]["w"]}),
    "name not in the file": lambda content: content["leaves"].update({"v": content["leaves"]["w"]}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused(tmp_path: Path, forgery: str) -> None:
    folder = tmp_path / "state"
    checkpoint.save(folder, {"w": torch.zeros(3)}, {}, learner_axes=0)
    forge(folder, lambda content: None)
    assert same(checkpoint.load(folder)[0], {"w": torch.zeros(3)})
    forge(folder, FORGERIES[forgery])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_ask_for_more_memory_than_its_files_fill(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"w": torch.zeros(3)}, {}, learner_axes=0)
    forge(tmp_path, set_leaf(shape=[10**12], axis=0, rows=10**12))
    with pytest.raises(CheckpointError, match="malformed"):
        checkpoint.load(tmp_path)


SEGMENTS: dict[str, Callable[[list[str]], list[str | None]]] = {
    "one file for all": lambda names: names[:1] * 4,
    "two segments exchanged": lambda names: [names[1], names[0], *names[2:]],
    "one less": lambda names: names[:3],
    "one more": lambda names: [*names, None],
    "a file that is not listed": lambda names: [*names[:3], "0" * 64 + ".safetensors"],
    "a number": lambda names: [*names[:3], 3],  # type: ignore[list-item]
}


@pytest.mark.parametrize("forgery", SEGMENTS)
def test_no_file_stands_for_another_segment(tmp_path: Path, forgery: str) -> None:
    """Also where both hold the same numbers: a file that could be named often would be read into memory as often."""
    memory = torch.ones(SEGMENT)
    checkpoint.save(tmp_path, {"replay": memory}, {}, learner_axes=0)
    names = manifest_of(tmp_path)["leaves"]["replay"]["files"]
    assert len(set(names)) == 4
    forge(tmp_path, lambda content: content["leaves"]["replay"].update(files=SEGMENTS[forgery](names)))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_leaves_share_no_segment(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"replay": {"a": torch.ones(SEGMENT), "b": torch.ones(SEGMENT)}}, {}, learner_axes=0)
    leaves = manifest_of(tmp_path)["leaves"]
    forge(tmp_path, lambda content: content["leaves"].update({"replay/b": leaves["replay/a"]}))
    with pytest.raises(CheckpointError, match="of another segment"):
        checkpoint.load(tmp_path)


def test_zeros_that_only_a_manifest_claims_take_no_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    checkpoint.save(tmp_path, {"w": torch.zeros(3)}, {}, learner_axes=0)
    forge(tmp_path, set_leaf(shape=[256, 1 << 20], files=[None] * 256, axis=0, rows=1))
    before = resident()
    claimed = checkpoint.load(tmp_path)[0]["w"]
    assert claimed.nbytes == 1 << 30
    assert resident() - before < 1 << 26


def test_a_whole_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    (name,) = checkpoint.save(folder, {"w": torch.zeros(3)}, {}, learner_axes=0).written
    shutil.move(folder / name, tmp_path / name)
    text = (folder / "manifest.json").read_text()
    for path in (f"../{name}", f"{tmp_path}/{name}", f"./../{name}", f"../state/../{name}"):
        (folder / "manifest.json").write_text(text)
        forge(folder, set_files(path))
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoint.load(folder)


@pytest.mark.parametrize(
    "names",
    [["w", "w/x"], ["w/x", "w"], ["w", "w/x/y"], ["/w"], ["w/"], [""], ["a//b"]],
    ids=lambda names: " ".join(names),
)
def test_leaf_names_that_are_no_tree_are_refused(tmp_path: Path, names: list[str]) -> None:
    checkpoint.save(tmp_path, {"w": torch.zeros(3)}, {}, learner_axes=0)
    rename_blob(tmp_path, b"".join(checkpoint._encode_tensors({name: torch.zeros(3) for name in names})))
    forge(tmp_path, lambda content: content.update(leaves=dict.fromkeys(names, content["leaves"]["w"])))
    with pytest.raises(CheckpointError, match="malformed"):
        checkpoint.load(tmp_path)
    if len(names) > 1:
        forge(tmp_path, lambda content: content["leaves"].update({min(names): None}))
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"sha256": []}', b"1" * 9000],
    ids=lambda content: repr(content[:8]),
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    for read in (checkpoint.load, checkpoint.about):
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read(tmp_path)


def test_an_unknown_schema_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    forge(tmp_path, lambda content: content.update(schema=2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for attempt in (
        lambda: checkpoint.load(tmp_path),
        lambda: checkpoint.about(tmp_path),
        lambda: save_step(tmp_path, 9),
    ):
        with pytest.raises(CheckpointError, match="schema 2, this rlmeta reads 1"):
            attempt()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_above_the_limits_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    for module, limit, message in (
        (manifest, "MANIFEST_LIMIT", "at most 20 expected"),
        (checkpoint, "HEADER_LIMIT", "header above 20"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 20)
            with pytest.raises(CheckpointError, match=message):
                checkpoint.load(tmp_path)


def rename_blob(folder: Path, data: bytes) -> None:
    """Make `data` the only tensor file, hashed and listed as it should be."""
    name = hashlib.sha256(data).hexdigest() + ".safetensors"
    (folder / name).write_bytes(data)

    def change(content: dict[str, Any]) -> None:
        content["files"] = {name: len(data)}
        content["leaves"]["w"]["files"] = [name]

    forge(folder, change)


@pytest.mark.parametrize(
    "data",
    [pickle.dumps({"w": print}), b"\xff" * 40, (2**40).to_bytes(8, "little") + b"{" * 40, b"\0" * 7 + b"\0" * 33],
    ids=["pickle", "ones", "long header", "zeros"],
)
def test_a_foreign_file_with_a_right_hash_is_refused(tmp_path: Path, data: bytes) -> None:
    checkpoint.save(tmp_path, {"w": torch.zeros(1)}, {}, learner_axes=0)
    rename_blob(tmp_path, data)
    with pytest.raises(CheckpointError, match=r"not a safetensors file|header above"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("which", ["manifest.json", "manifest.previous.json", "tensors"])
@pytest.mark.parametrize("temporary", [False, True])
def test_a_link_is_neither_read_nor_written_through(tmp_path: Path, which: str, temporary: bool) -> None:
    folder, outside = tmp_path / "state", tmp_path / "outside"
    two_checkpoints(folder)
    tensors = manifest_of(folder)["leaves"]["params/w"]["files"][0]
    name = tensors if which == "tensors" else which
    if temporary:
        outside.write_text("mine")
        (folder / f"{name}.tmp").symlink_to(outside)
    else:
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
    before = outside.read_bytes()
    checkpoint._verified.clear()
    if temporary or which == "manifest.previous.json":
        assert is_step(checkpoint.load(folder), 8)
    else:
        with pytest.warns(RuntimeWarning, match=f"{name} is not a regular file but a link"):
            assert is_step(checkpoint.load(folder), 7)
    save_step(folder, 8)  # whose tensors have the name of those that are there
    assert is_step(checkpoint.load(folder), 8)
    save_step(folder, 9)
    assert is_step(checkpoint.load(folder), 9)
    assert outside.read_bytes() == before
    assert not any(path.is_symlink() for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- every moment of a failure

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "listdir")


class Watch:
    """Calls `at(index, name, real, arguments)` in place of every system call of a save."""

    def __init__(self, at: Callable[..., Any]) -> None:
        self.count = 0
        self.at = at

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self.wrap(name, getattr(os, name)))
            yield

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            assert self.count < 2000, "the save does not end"
            return self.at(self.count - 1, name, real, *arguments, **named)

        return call


def failure(index: int, when: str, error: BaseException, failed: list[str]) -> Callable[..., Any]:
    """Let call number `index` raise, before or after it did its work, and note its name."""

    def call(count: int, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if count != index:
            return real(*arguments, **named)
        failed.append(name)
        result = real(*arguments, **named) if when == "after" else None
        if name == "open" and result is not None:
            os.close(result)
        raise error

    return call


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "stop"])
@pytest.mark.parametrize("old", [None, 8])
def test_a_failure_of_any_system_call_leaves_a_whole_checkpoint(
    tmp_path: Path, when: str, error: BaseException, old: int | None
) -> None:
    index, outcomes = 0, set()
    whole, folder = tmp_path / "whole", tmp_path / "state"
    whole.mkdir()
    if old is not None:
        two_checkpoints(whole)
    while True:
        shutil.copytree(whole, folder)
        failed: list[str] = []

        raised: BaseException | None = None
        try:
            with Watch(failure(index, when, error, failed)).watching():
                save_step(folder, 9)
        except (CheckpointError, KeyboardInterrupt) as caught:
            raised = caught
        if not failed:
            break
        if isinstance(error, OSError) and raised is not None:
            kept = (
                "the previous checkpoint is intact" if old or (folder / "manifest.json").exists() else "no checkpoint"
            )
            assert isinstance(raised, CheckpointError)
            assert kept in str(raised)
            assert "Input/output error" in str(raised)
        loaded = None
        if old is not None or (folder / "manifest.json").exists():
            loaded = checkpoint.load(folder)
            assert loaded.damage is None
            assert is_step(loaded, loaded[1]["step"])
        outcomes.add(loaded and loaded[1]["step"])
        if raised is None:
            assert is_step(checkpoint.load(folder), 9)
        elif loaded is None or loaded[1]["step"] == old:
            named = set(manifest_of(folder)["files"]) if (folder / "manifest.json").exists() else set()
            if (folder / "manifest.previous.json").exists():
                named |= set(json.loads((folder / "manifest.previous.json").read_text())["files"])
            assert set(os.listdir(folder)) - {"manifest.json", "manifest.previous.json"} == named, failed
        save_step(folder, 9)
        assert is_step(checkpoint.load(folder), 9)
        shutil.rmtree(folder)
        index += 1
    assert index > 40
    assert outcomes == {old, 9}


def test_a_kill_before_or_inside_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder, shots = tmp_path / "state", tmp_path / "shots"
    shots.mkdir()
    save_step(folder, 6)
    save_step(folder, 7)
    busy = False

    def shoot(count: int, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal busy
        if not busy:
            busy = True
            if name == "write":
                data = bytes(arguments[1])
                done = real(arguments[0], data[: len(data) // 2])
                shutil.copytree(folder, shots / f"{count} torn")
                busy = False
                return done + real(arguments[0], data[done:])
            shutil.copytree(folder, shots / f"{count} {name}")
            busy = False
        return real(*arguments, **named)

    with Watch(shoot).watching():
        save_step(folder, 8)
    seen = set()
    for shot in shots.iterdir():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = checkpoint.load(shot)
        assert is_step(loaded, loaded[1]["step"])
        seen.add(loaded[1]["step"])
        save_step(shot, 9)
        assert is_step(checkpoint.load(shot), 9)
        flip(shot / "manifest.json", 30)
        with pytest.warns(RuntimeWarning):
            assert is_step(checkpoint.load(shot), loaded[1]["step"])
    assert seen == {7, 8}
    assert len(list(shots.iterdir())) > 40


def test_everything_is_on_disk_before_it_is_named(tmp_path: Path) -> None:
    """The order that a power failure asks for, which no test by killing can see."""
    save_step(tmp_path, 6)
    save_step(tmp_path, 7)
    log: list[tuple[str, str]] = []
    opened: dict[int, str] = {}

    def note(count: int, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        if name == "open":
            opened[result] = Path(arguments[0]).name
        elif name in ("write", "fsync"):
            log.append((name, opened[arguments[0]]))
        elif name in ("replace", "unlink"):
            log.append((name, Path(arguments[0]).name))
        return result

    with Watch(note).watching():
        saved = save_step(tmp_path, 8)
    for name in (*saved.written, "manifest.json", "manifest.previous.json"):
        assert log.index(("fsync", f"{name}.tmp")) < log.index(("replace", f"{name}.tmp"))
        assert max(i for i, entry in enumerate(log) if entry == ("write", f"{name}.tmp")) < log.index(
            ("fsync", f"{name}.tmp")
        )
    folder_syncs = [i for i, entry in enumerate(log) if entry == ("fsync", tmp_path.name)]
    last_blob = max(log.index(("replace", f"{name}.tmp")) for name in saved.written)
    commit = log.index(("replace", "manifest.json.tmp"))
    first_removal = min(i for i, entry in enumerate(log) if entry[0] == "unlink")
    assert last_blob < log.index(("replace", "manifest.previous.json.tmp")) < commit < first_removal
    assert any(last_blob < i < commit for i in folder_syncs)
    assert any(commit < i < first_removal for i in folder_syncs)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:7])))
    save_step(tmp_path, 3)
    monkeypatch.undo()
    assert is_step(checkpoint.load(tmp_path), 3)


def test_a_reader_keeps_up_with_a_run_that_goes_on_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    steps = iter(range(2, 8))
    read = checkpoint._read_tensors

    def slow(path: Path, size: int) -> dict[str, torch.Tensor]:
        for step in [next(steps, None), next(steps, None)]:  # two checkpoints pass: the files asked for are gone
            if step is not None:
                save_step(tmp_path, step)
        return read(path, size)

    monkeypatch.setattr(checkpoint, "_read_tensors", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = checkpoint.load(tmp_path)
    assert is_step(loaded, 7)


KILLS = """
import contextlib, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_checkpoint import is_step, save_step
from rlmeta.runs import checkpoint
checkpoint.SEGMENT_BYTES = 256
warnings.simplefilter("error")
random.seed(0)
partial = 0
for kill in range(60):
    folder = Path(sys.argv[1]) / str(kill // 10)
    before = checkpoint.load(folder)[1]["step"] if kill % 10 else 0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        step = before
        while True:
            step += 1
            save_step(folder, step)
            os.write(write, step.to_bytes(4, "little"))
    os.close(write)
    if kill % 2:
        os.read(read, 4)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    confirmed = before
    while data := os.read(read, 4):
        confirmed = int.from_bytes(data, "little")
    os.close(read)
    if kill % 10 == 0 and not (folder / "manifest.json").exists():
        assert confirmed == 0, confirmed
        save_step(folder, 1)
        continue
    partial += any(path.suffix == ".tmp" for path in folder.iterdir())
    loaded = checkpoint.load(folder)
    assert is_step(loaded, loaded[1]["step"]), kill
    assert confirmed <= loaded[1]["step"] <= confirmed + 1 or kill % 2, (confirmed, loaded[1])
    assert loaded[1]["step"] >= confirmed
print(partial)
"""


def test_sixty_kills_in_the_middle_of_saving(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLS, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill fell into a write"


# ---------------------------------------------------------------------------------------------------------- disk full


def assert_full(folder: Path, step: int) -> None:
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=r"No space left.*previous checkpoint is intact.*free some space"):
        checkpoint.save(folder, {"w": torch.randn(1 << 19)}, {"step": step}, learner_axes=0)
    assert sorted(os.listdir(folder)) == before
    assert is_step(checkpoint.load(folder), step)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_checkpoints(tmp_path)
    write, room = os.write, 100_000

    def until_full(file: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, bytes(data[:room]))
        room -= written
        return written

    monkeypatch.setattr(os, "write", until_full)
    assert_full(tmp_path, 8)


def test_a_full_disk_without_a_checkpoint_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match=r"No space left.*no checkpoint was there before"):
        save_step(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_a_really_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        two_checkpoints(tmp_path / "state")
        assert_full(tmp_path / "state", 8)
        save_step(tmp_path / "state", 9)
        assert is_step(checkpoint.load(tmp_path / "state"), 9)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot save a checkpoint in"):
        save_step(tmp_path / "state", 1)


def test_the_state_saved_is_left_as_it_was(tmp_path: Path) -> None:
    state = of_step(4)
    save_step(tmp_path, 4)
    assert same(state, of_step(4))
    pointers = [leaf.data_ptr() for leaf in tree.leaves(state)]
    checkpoint.save(tmp_path, state, {}, learner_axes=1)
    assert [leaf.data_ptr() for leaf in tree.leaves(state)] == pointers
