"""Progress: what a terminal shows, what a log file gets, and how a terminal is left."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlmeta.agents.ppo import PPO
from rlmeta.api import listeners
from rlmeta.envs.task import task
from rlmeta.report.progress import Progress
from rlmeta.runs.experiment import Experiment

NAN = float("nan")
PARTS = {"act": 20.0, "environment": 10.0, "learn": 65.0, "evaluate": 4.9, "save": 0.1}


def experiment(seeds: int = 3) -> Experiment:
    return Experiment((PPO(),), tuple(range(seeds)), task("CartPole-v1"))


@contextmanager
def progress(experiment: Experiment, iterations: int, steps_per_iteration: int, done: int = 0) -> Iterator[Progress]:
    bar = Progress()
    bar.start(experiment, iterations, steps_per_iteration, done)
    try:
        yield bar
    finally:
        bar.close()


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("rlmeta.report.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# ---------------------------------------------------------------------- no terminal


def test_without_a_terminal_there_is_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(experiment(), iterations=100, steps_per_iteration=2048) as bar:
        for done in range(1, 81):
            clock.now += 1
            bar.update(
                done, {"charts/episodic_return": [1.0, NAN, 4.0]} if done == 20 else None, clock.now - 1000, PARTS
            )
            if done == 59:
                bar.update(done, {"eval/return": [1234.5], "charts/episodic_return": [NAN, NAN, NAN]}, 59.0, PARTS)
    said = capsys.readouterr()
    parts = "act 20 %, environment 10 %, learn 65 %, evaluate 5 %"
    assert said.out == ""
    assert said.err.splitlines() == [
        "ppo on CartPole-v1, 3 learners: 30%, 61,440 of 204,800 steps, 6,144 steps/s, return 2.5, 1:10 left; " + parts,
        "ppo on CartPole-v1, 3 learners: 60%, 122,880 of 204,800 steps, 6,144 steps/s, return 2.5, evaluation 1,234.5, "
        "0:40 left; " + parts,
    ]


def test_a_name_is_never_obeyed_by_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    named = Experiment((PPO(),), (0,), task("CartPole-v1", name="\x1b[2Jmine"))
    with progress(named, iterations=10, steps_per_iteration=1) as bar:
        clock.now += 31
        bar.update(1, None, 31.0)
    assert capsys.readouterr().err.startswith("ppo on \\x1b[2Jmine: 10%")


def test_the_rate_is_that_of_late_and_counts_no_iterations_before_a_resume(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(experiment(1), iterations=100_000, steps_per_iteration=1, done=50_000) as bar:
        for second in range(1, 91):  # 10 iterations a second for a minute, then 100
            clock.now += 1
            bar.update(50_000 + 10 * second + 90 * max(second - 60, 0), None, 5000.0 + second)
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"([\d,]+) steps/s", line) for line in lines] == [["10"], ["10"], ["100"]]
    assert lines[2] == "ppo on CartPole-v1: 54%, 53,600 of 100,000 steps, 100 steps/s, 7:44 left"


def test_the_whole_time_stands_in_the_place_of_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(experiment(1), iterations=2, steps_per_iteration=10) as bar:
        clock.now += 40
        bar.update(2, None, 7384.0)
    assert capsys.readouterr().err == "ppo on CartPole-v1: 100%, 20 of 20 steps, 0 steps/s, 2:03:04 in all\n"


def test_nothing_is_said_where_nothing_is_due(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(experiment(), 10, 8) as bar:
        for done in range(10):
            clock.now += 2.9
            bar.update(done, {"eval/return": [1.0]}, 1.0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with progress(experiment(1), 10, 8) as bar:
        clock.now += 31
        bar.update(5, None, 31.0)
    assert screen.getvalue().startswith("ppo on CartPole-v1: 50%, 40 of 80 steps") and "\x1b" not in screen.getvalue()


# ---------------------------------------------------------------------- a terminal


class Screen:
    """A terminal of 100 columns and a process in it."""

    def __init__(self, work: Callable[[], None], stdout: int | None = None) -> None:
        self.text = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            try:
                os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="30")
                if stdout is not None:
                    os.dup2(stdout, 1)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                work()
            finally:
                sys.stdout.flush()
                os._exit(0)

    def read(self, until: str | None = None) -> str:
        """What is shown until a text appears, or until the process ends."""
        deadline = time.monotonic() + 30
        while until is None or until not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.file, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    os.waitpid(self.pid, 0)
                    break
        return self.text

    def frames(self) -> list[str]:
        """The successive pictures, without colours."""
        plain = re.sub(r"\x1b\[[\d;]*m", "", self.read())
        return [frame.strip() for frame in re.split(r"(?:\r?\x1b\[\??[\d]*[A-Zlh])+", plain) if frame.strip()]


def iterate(iterations: int, seconds: float, also: Callable[[], Any] = lambda: None) -> None:
    with progress(experiment(), iterations, 1024) as bar:
        for done in range(1, iterations + 1):
            bar.update(
                done, {"charts/episodic_return": [done, NAN, NAN], "eval/return": [7.0, 8.0]}, done * 10.0, PARTS
            )
            also()
            time.sleep(seconds)


def test_a_terminal_shows_a_bar_that_ends_full_and_gives_its_cursor_back() -> None:
    screen = Screen(lambda: iterate(12, 0.05))
    frames = screen.frames()
    assert 2 <= len(frames) <= 6  # 12 updates in 0.6 s, five looks a second, and the last
    first, last = frames[0].splitlines(), frames[-1].splitlines()
    assert re.fullmatch(r"ppo on CartPole-v1, 3 learners [━╸╺ ]+ 8%  \d+:\d\d left", first[0])
    assert re.fullmatch(r"ppo on CartPole-v1, 3 learners ━+ 100%  2:00 in all", last[0])
    assert all(len(line) <= 100 for frame in frames for line in frame.splitlines())
    assert re.fullmatch(r"12,288 of 12,288 steps, [\d,]+ steps/s, return 12.0, evaluation 7.5", last[1])
    assert last[2:] == ["act 20 %, environment 10 %, learn 65 %, evaluate 5 %"]
    assert screen.text.count("\x1b[?25l") == 1 and screen.text.rstrip().endswith("\x1b[?25h")


def test_nothing_listens_that_was_not_asked_for() -> None:
    assert not any(isinstance(one, Progress) for one in listeners(progress=False))
    assert any(isinstance(one, Progress) for one in listeners(progress=True))


def test_control_c_leaves_the_terminal_as_it_was() -> None:
    def work() -> None:
        try:
            iterate(1000, 0.05)
        except KeyboardInterrupt:
            print("stopped by hand")

    screen = Screen(work)
    before = termios.tcgetattr(screen.file)
    screen.read(until="steps/s")
    assert "\x1b[?25h" not in screen.text
    os.write(screen.file, b"\x03")
    screen.read(until="stopped by hand")
    assert termios.tcgetattr(screen.file) == before
    screen.read()
    shown, _, after = screen.text.partition("\x1b[?25h")
    assert "\x1b[?25l" in shown and after.strip().endswith("stopped by hand")


def test_what_is_printed_meanwhile_stands_above_the_bar() -> None:
    screen = Screen(lambda: iterate(2, 0.0, lambda: print("hello from a callback")))
    frames = screen.frames()
    assert sum("hello from a callback" in frame for frame in frames) == 2
    assert "hello" not in frames[-1] and "100%" in frames[-1]


def test_what_goes_into_a_pipe_stays_in_the_pipe() -> None:
    reading, writing = os.pipe()
    screen = Screen(lambda: iterate(2, 0.0, lambda: print("a result")), stdout=writing)
    os.close(writing)
    assert "a result" not in screen.read() and "100%" in screen.text
    assert os.read(reading, 1000).decode() == "a result\na result\n"
