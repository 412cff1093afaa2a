"""Ctrl-C, SIGTERM and the time of saving do not wait for a line of metrics, and a resume is exact."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import rlmeta as rl
from rlmeta.agents.a2c import A2CAgent
from tests.runs.killer import Killer
from tests.runs.test_resume import assert_same_run

A2C = rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(8,))
ITERATIONS = 12
BUDGET = rl.Budget(steps=16 * ITERATIONS, eval_every=10**6, final_episodes=2, log_points=1, checkpoint_seconds=1e9)
"""With a single line of metrics, at its end."""
ALWAYS = rl.Budget(**{**vars(BUDGET), "checkpoint_seconds": 0.0})


def train(folder: Path, budget: rl.Budget = BUDGET) -> rl.Run:
    return rl.train(A2C, "CartPole-v1", seeds=2, out=folder, budget=budget, threads=1)


def iterations_of(run: rl.Run) -> int:
    return int(run.state["count"]["iterations"].max())


def send_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: int) -> None:
    """The process gets a signal within that iteration, counted from 0."""
    iterate = A2CAgent.iterate

    def interrupted(self: Any, state: Any, world: Any) -> Any:
        if int(state["count"]["iterations"].max()) == iteration:
            signal.raise_signal(number)
        return iterate(self, state, world)

    monkeypatch.setattr(A2CAgent, "iterate", interrupted)


def test_control_c_between_two_lines_ends_the_iteration_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patched:
        send_at(patched, 4, signal.SIGINT)
        run = train(tmp_path / "run")
    assert (run.stopped, iterations_of(run)) == ("interrupted", 5)
    assert capfd.readouterr().err == "finishing this iteration and saving; Ctrl-C again stops at once\n"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
    assert_same_run(whole, rl.resume(tmp_path / "run"))


def test_a_second_control_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: Any, state: Any, world: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(A2CAgent, "iterate", twice)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    assert_same_run(train(tmp_path / "whole"), rl.resume(tmp_path / "run"))


def terminated(folder: str) -> None:
    """Train in a process that gets SIGTERM."""
    send_at(pytest.MonkeyPatch(), 4, signal.SIGTERM)
    train(Path(folder))
    print("not reached")


def test_sigterm_saves_and_then_ends_the_process(tmp_path: Path, killer: Killer) -> None:
    status, said = killer.run("tests.runs.test_signals:terminated", str(tmp_path / "run"))
    assert (status, said) == (-signal.SIGTERM, "terminated: finishing this iteration and saving\n")
    assert iterations_of(rl.load(tmp_path / "run")) == 5
    assert_same_run(train(tmp_path / "whole"), rl.resume(tmp_path / "run"))


def test_a_users_own_handler_gets_sigterm_once_the_run_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(iterations_of(rl.load(tmp_path / "run"))))
    try:
        send_at(monkeypatch, 4, signal.SIGTERM)
        run = train(tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (run.stopped, got) == ("interrupted", [5])


def test_it_saves_by_the_clock_whatever_the_rhythm_of_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = rl.Run.save

    def counted(self: rl.Run, about: dict[str, Any]) -> None:
        saved.append(about["iteration"])
        save(self, about)

    monkeypatch.setattr(rl.Run, "save", counted)
    train(tmp_path / "always", ALWAYS)
    assert saved == [*range(ITERATIONS + 1), ITERATIONS]
    saved.clear()
    train(tmp_path / "never")
    assert saved == [0, ITERATIONS]


def killed_after_saving(folder: str) -> None:
    """Train in a process that dies once a checkpoint is there."""
    save = rl.Run.save

    def last(self: rl.Run, about: dict[str, Any]) -> None:
        save(self, about)
        if about["iteration"] == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    rl.Run.save = last  # type: ignore[method-assign]
    train(Path(folder), ALWAYS)


def test_killed_between_two_lines_and_resumed_equals_never_stopped(tmp_path: Path, killer: Killer) -> None:
    killer.kill("tests.runs.test_signals:killed_after_saving", str(tmp_path / "run"))
    assert iterations_of(rl.load(tmp_path / "run")) == 7
    assert_same_run(train(tmp_path / "whole"), rl.resume(tmp_path / "run"))
