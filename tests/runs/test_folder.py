from __future__ import annotations

import datetime
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlmeta.errors import CheckpointError, RunExistsError, SettingError
from rlmeta.runs import checkpoint
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
        ({"a": {"b": torch.zeros(1)}}, "'a.b' is of type Tensor"),
        ({"a": [1, None]}, r"'a\[1\]' is of type NoneType"),
        ({"a": [{"b": {1}}]}, r"'a\[0\].b' is of type set"),
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
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.toml is missing; give the folder of one"):
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


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_disk_that_fails_under_a_lock_is_said_so(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*run\.lock: No space left"), run_folder.lock(tmp_path):
        raise AssertionError("locked")
    monkeypatch.undo()
    with run_folder.lock(tmp_path) as held:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"cannot write .*run\.lock: No space left"):
            held.sign(ID)


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot lock"), run_folder.lock(tmp_path / "none"):
        pass


# ------------------------------------------------------------------------------------------------- what leads out of it


def second_name(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("lead", [Path.symlink_to, second_name, pipe], ids=["link", "second name", "pipe"])
def test_a_lock_that_leads_out_of_the_folder_is_not_written(tmp_path: Path, lead: Callable[[Path, Path], Any]) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    lead(tmp_path / "run" / "run.lock", tmp_path / "outside")
    with (
        pytest.raises(CheckpointError, match=r"run\.lock is .*, expected a file of its own"),
        run_folder.lock(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.jsonl", "curve.png", "anything"])
@pytest.mark.parametrize("lead", [Path.symlink_to, pipe], ids=["link", "pipe"])
def test_a_folder_that_holds_no_plain_files_is_refused(tmp_path: Path, lead: Callable[..., Any], name: str) -> None:
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "notes").mkdir()
    (folder / "config.toml.tmp").write_text("plain")
    run_folder.check_plain(folder)
    lead(folder / name, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"{name} is (a link|no regular file).*remove it") as caught:
        run_folder.check_plain(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state", "tensorboard", "wandb"])
def test_a_subfolder_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "whole" / name / "deep").mkdir(parents=True)
    run_folder.check_plain(tmp_path / "whole")
    (tmp_path / "whole" / name / "deep" / "x").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    for folder in ("whole", "run"):
        with pytest.raises(CheckpointError, match=f"{name}.* is a link"):
            run_folder.check_plain(tmp_path / folder)


def test_the_links_that_wandb_makes_in_its_own_folder_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "run" / "wandb" / "offline-run-1" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "latest-run").symlink_to("offline-run-1")
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to("offline-run-1/logs/debug.log")
    run_folder.check_plain(tmp_path / "run")
    (tmp_path / "run" / "wandb" / "up").symlink_to("../state")
    with pytest.raises(CheckpointError, match=r"wandb/up is a link"):
        run_folder.check_plain(tmp_path / "run")


def test_nothing_is_written_through_a_link_in_place_of_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    for name in ("config.toml", "config.toml.tmp"):
        (tmp_path / name).symlink_to("outside")
    run_folder.write_config(tmp_path, {"a": 1})
    assert (tmp_path / "outside").read_text() == "mine"
    assert run_folder.read_config(tmp_path) == {"a": 1}
    assert not (tmp_path / "config.toml").is_symlink()


def test_settings_behind_a_link_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("a = 1\n")
    (tmp_path / "config.toml").symlink_to("outside")
    with pytest.raises(CheckpointError, match="not a regular file but a link"):
        run_folder.read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------- whose it is

ID = "0123456789abcdef"


def test_a_lock_keeps_the_id_of_its_run(tmp_path: Path) -> None:
    with run_folder.lock(tmp_path) as held:
        held.sign(ID)
        held.check()
    for _ in range(2):
        with run_folder.lock(tmp_path):
            assert (tmp_path / "run.lock").read_text().splitlines()[1:] == [f"run {ID}"]
    with run_folder.lock(tmp_path) as held:
        held.sign("f" * 16)
        assert (tmp_path / "run.lock").read_text().splitlines()[1:] == ["run " + "f" * 16]


@pytest.mark.parametrize("change", ["deleted", "moved", "made anew", "locked anew"])
def test_who_holds_a_folder_sees_that_it_is_another_now(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with run_folder.lock(folder) as held:
        folder.rename(tmp_path / "moved")
        if change != "moved":
            (tmp_path / "moved" / "run.lock").unlink()
        if change == "made anew":
            folder.mkdir()
        if change == "locked anew":
            folder.mkdir()
            assert in_a_fork(folder) == "locked"
        with pytest.raises(CheckpointError, match=r"moved, deleted or created again: the run ends here") as caught:
            held.check()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", [None, 3, "", "x" * 16, ID + "\n", [ID]])
def test_a_config_without_the_id_of_its_run_is_refused(tmp_path: Path, run: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.toml: run is .*, expected the id of the run"):
        run_folder.run_id({"run": run}, tmp_path)
    assert run_folder.run_id({"run": ID}, tmp_path) == ID


# --------------------------------------------------------------------------------------------------- what has not begun


def failed_start(folder: Path) -> None:
    """What is there at most before the first checkpoint."""
    (folder / "state").mkdir(parents=True)
    run_folder.write_config(folder, {"run": ID, "a": 1})
    for name in ("config.toml.tmp", "plan.toml.tmp"):
        (folder / name).write_text("[a")
    for name in ("metrics.jsonl", "timing.jsonl"):
        (folder / name).touch()
    (folder / "state" / ("0" * 64 + ".safetensors")).write_bytes(b"x")
    (folder / "state" / "manifest.json.tmp").write_bytes(b"{")


def test_what_a_failed_start_has_left_is_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    failed_start(folder)
    with run_folder.lock(folder):
        before = sorted(os.listdir(folder))
        assert run_folder.create(folder) == folder
        assert sorted(os.listdir(folder)) == before, "whoever holds it removes it"
        run_folder.clear(folder)
        assert os.listdir(folder) == ["run.lock"]
    run_folder.check_free(folder)


KEPT: dict[str, Callable[[Path], Any]] = {
    "a checkpoint": lambda folder: (folder / "state" / "manifest.json").touch(),
    "the checkpoint before": lambda folder: (folder / "state" / "manifest.previous.json").touch(),
    "a record": lambda folder: (folder / "metrics.jsonl").write_text("{}\n"),
    "a time": lambda folder: (folder / "timing.jsonl").write_text("{}\n"),
    "a summary": lambda folder: (folder / "summary.json").touch(),
    "another file": lambda folder: (folder / "notes.txt").touch(),
    "another file in state": lambda folder: (folder / "state" / "mine.safetensors").touch(),
    "another config": lambda folder: (folder / "config.toml").write_text("a = 1\n"),
    "a plan": lambda folder: (folder / "plan.toml").write_text("sha256"),
    "a broken config": lambda folder: (folder / "config.toml").write_text("a ="),
    "a link": lambda folder: (folder / "config.toml.tmp").unlink() or (folder / "config.toml.tmp").symlink_to("x"),
    "a folder": lambda folder: (folder / "metrics.jsonl").unlink() or (folder / "metrics.jsonl").mkdir(),
    "state elsewhere": lambda folder: (
        (folder / "state").rename(folder.parent / "elsewhere") and (folder / "state").symlink_to("../elsewhere")
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_whatever_may_be_worth_keeping_is_kept(tmp_path: Path, kept: str) -> None:
    folder = tmp_path / "run"
    failed_start(folder)
    KEPT[kept](folder)
    before = sorted(os.listdir(folder))
    for refuses in (run_folder.check_free, run_folder.create, run_folder.clear):
        with pytest.raises(RunExistsError):
            refuses(folder)
    assert sorted(os.listdir(folder)) == before
    assert checkpoint.is_unfinished(folder / "state") == ("checkpoint" not in kept and "state" not in kept)


# ------------------------------------------------------------------------------------------------------------ summary


def test_no_flipped_bit_of_a_summary_goes_unnoticed(tmp_path: Path) -> None:
    assert run_folder.read_summary(tmp_path, ID) is None
    content = {"run": ID, "returns": [[0.1, math.inf], [-0.0, 1e-300]], "stopped": ""}
    run_folder.write_summary(tmp_path, content)
    assert repr(run_folder.read_summary(tmp_path, ID)) == repr(content)
    path = tmp_path / "summary.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert run_folder.read_summary(tmp_path, ID) == content
        except CheckpointError as error:
            assert "summary.json is damaged" in str(error) and "remove it, `rlmeta resume" in str(error)
        else:
            assert whole[place : place + 1] == b" "
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"it is of run {ID}, config.toml of ffff"):
        run_folder.read_summary(tmp_path, "f" * 16)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"sha256": []}'])
def test_a_summary_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .*: remove it"):
        run_folder.read_summary(tmp_path, ID)
