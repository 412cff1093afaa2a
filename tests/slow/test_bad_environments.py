"""Environments with something wrong with them, in this process or in workers, each in a training process of its own: it
ends by itself, or after the first Ctrl-C where the environment hangs; it is trained to the end or says in one sentence
what is wrong; nothing of it is left over; and a checkpoint that was written is there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlmeta.errors import RlmetaError
from rlmeta.runs import checkpoint
from tests.envs.bad_environment import FAILS, KINDS, WARNS, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HANGING = ("sleeps for ever", "spins for ever")
WAIT = 4.0
"""Seconds after which Ctrl-C ends a call of an environment at once."""
DIES = {"exits": 7, "crashes": -signal.SIGSEGV}
"""Exit codes of what ends its own process."""
UNTRAINED = ("reset without info",)
"""Kinds that are refused before a folder is made."""


def start(kind: str, mode: str, folder: Path, steps: str = "200") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.slow.test_bad_environments", kind, mode, steps]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def session(number: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == number and state != "Z":
            found.append(int(path.parent.name))
    return found


def finish(process: subprocess.Popen[str], hanging: Path) -> tuple[str, str]:
    """What it printed, after one Ctrl-C where the environment hangs."""
    deadline = time.monotonic() + 200
    while process.poll() is None and not hanging.exists():
        assert time.monotonic() < deadline, "it neither ends nor hangs"
        time.sleep(0.1)
    if process.poll() is None:
        time.sleep(WAIT)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_environment(kind: str, mode: str, tmp_path: Path) -> None:
    process = start(kind, mode, tmp_path)
    try:
        out, err = finish(process, tmp_path / "hanging")
        deadline = time.monotonic() + 20
        while session(process.pid):
            assert time.monotonic() < deadline, "processes are left over"
            time.sleep(0.1)
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
    code = process.returncode
    assert "Traceback" not in err, err
    if kind in HANGING or (kind, mode) == ("raises KeyboardInterrupt", "sync"):
        assert (code, out) == (130, "")
    elif kind in DIES and mode == "sync":
        assert (code, out) == (DIES[kind], "")
    elif kind in FAILS or kind in DIES or kind == "raises KeyboardInterrupt":
        died = f"died with exit code {DIES.get(kind)} in row"
        said = FAILS.get(kind, died if kind in DIES else "failed with KeyboardInterrupt")
        (sentence,) = out.splitlines()
        assert code == 2 and "'Bad'" in sentence and re.search(said, sentence), out
    else:
        assert (code, out.splitlines()[-1:]) == (0, ["trained"]), out + err
        assert re.search(WARNS.get(kind, ""), err), err
        assert err.count("the door is stuck") <= 3, "workers say it, too"
    if kind not in UNTRAINED:
        state, about = checkpoint.load(tmp_path / "run" / "state")
        assert state and about["iteration"] >= (0 if kind == "NaN in reset" else 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["fine", *HANGING])
def test_a_run_that_is_ended_leaves_no_process(kind: str, number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM waits for the iteration, so that the run is saved: not where that never ends."""
    if number is signal.SIGTERM and kind in HANGING:
        number = signal.SIGQUIT
    process, records = start(kind, "async", tmp_path, "2000000"), tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 200
        while not ((tmp_path / "hanging").exists() or (records.exists() and records.read_text())):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while session(process.pid):
            assert time.monotonic() < deadline, "processes are left over"
            time.sleep(0.1)
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == -number and "Traceback" not in err, err
    _, about = checkpoint.load(tmp_path / "run" / "state")
    assert about["iteration"] >= 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as one does that nohup started
    try:
        train(sys.argv[1], sys.argv[2], "run", Path("hanging").absolute(), steps=int(sys.argv[3]))
        print("trained")
    except RlmetaError as error:
        print(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
