from __future__ import annotations

import datetime
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlmeta.errors import CheckpointError, RunExistsError, SettingError
from rlmeta.runs import folder as run_folder


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = run_folder.create(str(tmp_path / "runs" / "first"))
    assert folder == tmp_path / "runs" / "first"
    assert folder.is_dir()
    assert run_folder.create(folder) == folder  # empty still
    with run_folder.lock(folder):
        pass
    assert run_folder.create(folder) == folder  # a lock alone is no run


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunExistsError, match=r"config\.toml.*another --out, or `rlmeta resume") as caught:
        run_folder.create(tmp_path)
    assert "\n" not in str(caught.value)
    for inside in (tmp_path / "config.toml", tmp_path / "config.toml" / "run"):
        with pytest.raises(RunExistsError, match="a file is in its place: use another --out"):
            run_folder.create(inside)
    with pytest.raises(SettingError, match="cannot make the run folder"):
        run_folder.create("/proc/none/run")


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | texts
configs = st.dictionaries(
    keys,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
    ),
    max_size=4,
)


@given(config=configs)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_comes_back_exactly(tmp_path: Path, config: dict[str, Any]) -> None:
    run_folder.write_config(tmp_path, config)
    found = run_folder.read_config(tmp_path)
    assert found == config
    assert sorted(map(repr, flat(found))) == sorted(map(repr, flat(config)))  # 1 is not True, 0.0 is not -0.0
    assert os.listdir(tmp_path) == ["config.toml"]


def flat(value: Any, path: str = "") -> list[Any]:
    if isinstance(value, dict):
        return [entry for name, child in value.items() for entry in flat(child, f"{path}/{name}")]
    if isinstance(value, list):
        return [entry for index, child in enumerate(value) for entry in flat(child, f"{path}/{index}")]
    return [(path, value)]


def test_none_is_dropped_and_tuples_are_lists(tmp_path: Path) -> None:
    config = {
        "a": None,
        "b": {"c": None, "d": (64, 64)},
        "e": [{"f": None, "g": 1}, {}],
        "day": datetime.date(2026, 1, 2),
        "target": math.inf,
    }
    run_folder.write_config(tmp_path, config)
    assert run_folder.read_config(tmp_path) == {
        "b": {"d": [64, 64]},
        "e": [{"g": 1}, {}],
        "day": datetime.date(2026, 1, 2),
        "target": math.inf,
    }
    assert config["a"] is None


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"a": {"b": torch.zeros(1)}}, "'a.b' is a Tensor"),
        ({"a": [1, None]}, r"'a\[1\]' is a NoneType"),
        ({"a": [{"b": {1}}]}, r"'a\[0\].b' is a set"),
        ({"a": {3: 4}}, "every name must be text"),
        ({"a": "\ud800"}, "not unicode"),
    ],
    ids=["tensor", "none in list", "set", "integer name", "surrogate"],
)
def test_a_value_without_a_form_in_toml_is_refused_with_its_place(tmp_path: Path, config: Any, place: str) -> None:
    run_folder.write_config(tmp_path, {"old": 1})
    with pytest.raises(SettingError, match=place):
        run_folder.write_config(tmp_path, config)
    assert run_folder.read_config(tmp_path) == {"old": 1}


def test_a_failed_write_leaves_the_old_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_config(tmp_path, {"old": 1})

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(CheckpointError, match="No space left"):
                run_folder.write_config(tmp_path, {"new": 2})
        assert os.listdir(tmp_path) == ["config.toml"]
        assert run_folder.read_config(tmp_path) == {"old": 1}
    with pytest.raises(CheckpointError, match="cannot write"):
        run_folder.write_config(tmp_path / "none", {"new": 2})


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"[" * 10])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        run_folder.read_config(tmp_path)
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not TOML"):
        run_folder.read_config(tmp_path)


HOLDER = """
import sys, time
from rlmeta.runs import folder as run_folder
with run_folder.lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_this_one_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for _ in range(2):  # being refused must not free it
            message = f"another process \\(pid {holder.pid} on .*another --out"
            with pytest.raises(RunExistsError, match=message), run_folder.lock(tmp_path):
                raise AssertionError("two processes hold one run")
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        with open(tmp_path / "run.lock", "a") as longer:
            longer.write("x" * 300)
        with run_folder.lock(tmp_path):
            found = (tmp_path / "run.lock").read_text()
            assert found.startswith(f"pid {os.getpid()} on ")
            assert found.index("\n") == len(found) - 1
    finally:
        holder.kill()
        holder.communicate()


def test_one_process_locks_a_run_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with run_folder.lock(tmp_path / "run"):
        for name in ("run", "link", "run/../run"):
            message = f"this very process \\(pid {os.getpid()}\\)"
            with pytest.raises(RunExistsError, match=message), run_folder.lock(tmp_path / name):
                raise AssertionError("locked twice")
        assert in_a_fork(tmp_path / "run") == "refused"  # also after the attempts above closed their files
    with run_folder.lock(tmp_path / "link"):
        pass
    with pytest.raises(ZeroDivisionError), run_folder.lock(tmp_path / "run"):
        raise ZeroDivisionError
    assert in_a_fork(tmp_path / "run") == "locked"


def in_a_fork(folder: Path) -> str:
    child = os.fork()
    if child == 0:
        try:
            with run_folder.lock(folder):
                os._exit(1)
        except RunExistsError as error:
            os._exit(2 if "another process" in str(error) else 3)
        finally:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    return {1: "locked", 2: "refused"}.get(os.waitstatus_to_exitcode(status), "broken")


def test_a_worker_left_behind_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from rlmeta.runs import folder as run_folder\n"
        "lock = run_folder.lock(sys.argv[1]); lock.__enter__()\n"
        "worker = os.fork()\n"
        "time.sleep(60) if worker == 0 else (print(worker, flush=True), os.kill(os.getpid(), 9))"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            deadline = time.monotonic() + 30
            while parent.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            with run_folder.lock(tmp_path):
                os.kill(worker, 0)  # it is alive still
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot lock"), run_folder.lock(tmp_path / "none"):
        pass
