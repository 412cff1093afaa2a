from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlmeta.errors import CheckpointError, SettingError
from rlmeta.runs import metric_log
from rlmeta.runs.metric_log import Mark, MetricLog, check_start, end_of_last_line, read_metric_log


def write_all(path: Path, *records: dict[str, Any]) -> None:
    with MetricLog(path) as file:
        for record in records:
            file.write(record)


def mark_of(content: bytes) -> Mark:
    return Mark(len(content), hashlib.sha256(content).hexdigest())


values = st.recursive(
    st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(records=st.lists(st.dictionaries(st.text(), values, max_size=5), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_come_back_exactly(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    write_all(path, *records)
    assert repr(read_metric_log(path)) == repr(records)
    assert path.read_bytes().count(b"\n") == len(records)


def test_numbers_that_are_not_finite_are_null_and_read_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "none": None})
    assert path.read_text() == '{"a":null,"b":[1.5,null,{"c":null}],"none":null}\n'
    (record,) = read_metric_log(path)
    assert math.isnan(record["a"])
    assert record["b"][0] == 1.5
    assert math.isnan(record["b"][1])
    assert math.isnan(record["b"][2]["c"])
    assert np.isnan(np.array([*record["b"][:2], record["none"]])).tolist() == [False, True, True]


def test_tensors_and_arrays_become_lists_of_their_exact_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {
        "float32": torch.tensor([0.1, math.nan], requires_grad=True),
        "counts": torch.tensor([2**62, -1]),
        "flags": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "array": np.array([0.1, 3.0], dtype=np.float32),
        "number": np.float64(0.1),
        "half": np.float16(0.1),
        "tuple": (np.int64(3), True),
    }
    write_all(path, record)
    assert path.read_text() == (
        '{"float32":[0.10000000149011612,null],"counts":[4611686018427387904,-1],"flags":[[true],[false]],'
        '"scalar":0.1,"array":[0.10000000149011612,3.0],"number":0.1,"half":0.0999755859375,"tuple":[3,true]}\n'
    )


@pytest.mark.parametrize(
    "record",
    [{"a": {1}}, {"a": [b"x"]}, {3: 4}, {"a": {3: 4}}, {"a": 1j}, {"a": 10**5000}],
    ids=["set", "bytes", "integer name", "integer name inside", "complex", "huge"],
)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as file, pytest.raises(SettingError):
        file.write(record)
    assert path.read_bytes() == b""


def test_records_after_the_checkpoint_are_dropped_and_rewritten_equal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": [step / 7, math.nan]} for step in range(6)]
    with MetricLog(path) as file:
        assert file.mark() == mark_of(b"")
        for record in records[:3]:
            file.write(record)
        mark = file.mark()
        assert mark == mark_of(path.read_bytes())
        for record in records[3:]:
            file.write(record)
    straight = path.read_bytes()
    with open(path, "ab") as torn:
        torn.write(b'{"step":6,"lo')
    with MetricLog(path) as file:
        file.truncate(mark)
        assert [record["step"] for record in read_metric_log(path)] == [0, 1, 2]
        assert file.mark() == mark
        for record in records[3:]:
            file.write(record)
        assert file.mark() == mark_of(straight)
    assert path.read_bytes() == straight
    with MetricLog(path) as file:
        file.truncate(mark_of(b""))
    assert read_metric_log(path) == []


@pytest.mark.parametrize("length", [-1, 3, 17, 1000])
def test_a_mark_that_was_never_one_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, {"step": 1}, {"step": 2})
    before = path.read_bytes()
    with MetricLog(path) as file, pytest.raises(CheckpointError, match=r"metrics\.jsonl") as caught:
        file.truncate(Mark(length, mark_of(before).sha256))
    assert str(length) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    with MetricLog(path) as file, pytest.raises(CheckpointError, match=r"has 22 bytes, .* at 23"):
        file.truncate(Mark(23, mark_of(before).sha256))


def test_lines_that_were_changed_before_the_mark_are_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricLog(path) as file:
        for step in range(2):
            file.write({"step": step})
        mark = file.mark()
        for step in range(2, 4):
            file.write({"step": step})
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with MetricLog(path) as file:
            if place < mark.length:
                with pytest.raises(CheckpointError, match=r"metrics\.jsonl are not those it had .*: restore it"):
                    file.truncate(mark)
            else:
                file.truncate(mark)
                assert file.mark() == mark


def test_a_digest_of_a_long_file_takes_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_log, "BLOCK", 7)
    write_all(tmp_path / "metrics.jsonl", {"step": 1}, {"step": 2})
    with MetricLog(tmp_path / "metrics.jsonl") as file:
        assert file.mark() == mark_of((tmp_path / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize("saved", [None, 3, [], [1], [1, 2], ["1", "x"], [True, "x"], [1, "x", 2], {"length": 1}])
def test_what_is_no_mark_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match="is not the mark"):
        Mark.of(saved)


@pytest.mark.parametrize("change", ["deleted", "moved", "made anew"])
def test_a_file_that_is_not_its_own_any_more_is_left_alone(tmp_path: Path, change: str) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    with MetricLog(path) as file:
        file.write({"step": 1})
        shutil.move(path.parent, tmp_path / "moved")
        if change != "moved":
            shutil.rmtree(tmp_path / "moved")
        if change == "made anew":
            path.parent.mkdir()
            path.write_bytes(b"theirs")
        with pytest.raises(CheckpointError, match=r"moved, deleted or created again: the run ends here") as caught:
            file.write({"step": 2})
        assert "\n" not in str(caught.value)
    if change == "made anew":
        assert path.read_bytes() == b"theirs"
    if change == "moved":
        assert read_metric_log(tmp_path / "moved" / "metrics.jsonl") == [{"step": 1}]


def second_name(path: Path, target: Path) -> None:
    path.hardlink_to(target)


@pytest.mark.parametrize("lead", [Path.symlink_to, second_name, lambda path, target: os.mkfifo(path)])
def test_records_are_written_into_no_other_file(tmp_path: Path, lead: Any) -> None:
    (tmp_path / "outside").write_bytes(b"mine, without an end of line")
    lead(tmp_path / "metrics.jsonl", tmp_path / "outside")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is .*, expected a file of its own"):
        MetricLog(tmp_path / "metrics.jsonl")
    assert (tmp_path / "outside").read_bytes() == b"mine, without an end of line"


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, {"a": 1}, {"a": 2})
    whole = path.read_bytes()
    line = b'{"a":"\xc3\xa9"}'
    for length in range(1, len(line) + 1):
        path.write_bytes(whole + line[:length])
        assert read_metric_log(path) == [{"a": 1}, {"a": 2}]
        write_all(path, {"a": 3})
        assert path.read_bytes() == whole + b'{"a":3}\n'


@pytest.mark.parametrize("size", range(12))
def test_the_end_of_the_last_line_is_found_in_any_number_of_blocks(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    for content in (b"x" * size, b"x" * size + b"\n", b"\n" + b"x" * size, b"\n" * size, b"ab\ncd\n" + b"x" * size):
        path.write_bytes(content)
        with open(path, "rb") as file:
            for block in (1, 2, 3, 5, 100):
                assert end_of_last_line(file.fileno(), block) == content.rfind(b"\n") + 1


@pytest.mark.parametrize("line", [b"{", b"[1]", b"", b"\xff", b"3", b"null", b"[" * 100_000])
def test_a_whole_line_that_is_no_record_is_refused_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2"):
        read_metric_log(path)


def test_missing_files_and_folders_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_metric_log(tmp_path / "none.jsonl")
    with pytest.raises(CheckpointError, match="cannot open"):
        MetricLog(tmp_path / "none" / "metrics.jsonl")


def test_a_failed_write_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / "metrics.jsonl", os.write, 25

    def until_full(file: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, bytes(data[: min(room, 4)]))
        room -= written
        return written

    with MetricLog(path) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", until_full)
            file.write({"step": 1})
            file.write({"step": 2})
            with pytest.raises(CheckpointError, match="No space left on device"):
                file.write({"step": 3})
        assert path.read_text() == '{"step":1}\n{"step":2}\n'
        file.write({"step": 4})
    assert read_metric_log(path) == [{"step": 1}, {"step": 2}, {"step": 4}]


@pytest.mark.parametrize("call", ["ftruncate", "pread"])
def test_a_disk_that_fails_while_records_are_opened_or_cut_back_is_said_so(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"

    def fail(*arguments: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with MetricLog(path) as file:
        file.write({"a": 1})
        mark = file.mark()
        file.write({"b": 2})
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            opened = len(os.listdir("/proc/self/fd"))
            for attempt in (lambda: MetricLog(path), lambda: file.truncate(mark)):
                with pytest.raises(CheckpointError, match=r"metrics\.jsonl: Input/output error; .* are intact"):
                    attempt()
            assert len(os.listdir("/proc/self/fd")) == opened, "a file was left open"
        file.truncate(mark)
        file.write({"c": 3})
    assert read_metric_log(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_regular_file_is_neither_read_nor_waited_for(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "elsewhere").write_text("{}\n")
    make(path)
    for read in (lambda: read_metric_log(path), lambda: check_start(path, Mark(0, hashlib.sha256().hexdigest()))):
        with pytest.raises(
            CheckpointError, match=r"metrics\.jsonl( is not a regular file|: Too many levels|: Is a directory)"
        ):
            read()


def test_the_mark_is_of_what_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with MetricLog(tmp_path / "metrics.jsonl") as file:
        file.write({"a": 1})
        assert synced == []
        assert [file.mark().length] == synced == [8]

        def fail(file: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            file.mark()


def test_a_record_survives_the_death_of_its_writer(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from rlmeta.runs.metric_log import MetricLog\n"
        "file = MetricLog(sys.argv[1]); file.write({'a': 1}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.jsonl")], timeout=120)
    assert done.returncode == -9
    assert read_metric_log(tmp_path / "m.jsonl") == [{"a": 1}]


def test_lines_are_strict_json_and_closing_twice_is_fine(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = tmp_path / "metrics.jsonl"
    file = MetricLog(path)
    file.write({"x": [1e300 * 10, -0.0, 5e-324, 1e22], "t": "a\nb"})
    file.close()
    file.close()
    assert json.loads(path.read_text(), parse_constant=refuse) == {"x": [1e301, -0.0, 5e-324, 1e22], "t": "a\nb"}
