"""What the loop opens is closed again, and it does not wait for environments that never answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import rlmeta as rl
from rlmeta.errors import CheckpointError
from rlmeta.runs import signals
from rlmeta.runs.metric_log import MetricLog
from tests.envs.bad_environment import Bad

PPO = rl.PPO(num_envs=2, num_steps=20, batch_size=40, num_epochs=1, hidden_sizes=(8,))
BUDGET = rl.Budget(steps=80, eval_every=40, eval_episodes=2, final_episodes=2)


@pytest.mark.parametrize("broken", ["metrics", "timing"])
def test_everything_is_closed_where_the_records_can_not_be_opened(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"made": 0, "closed": 0}

    class Counted(Bad):
        def __init__(self) -> None:
            super().__init__()
            counts["made"] += 1

        def close(self) -> None:
            counts["closed"] += 1

    opened: list[MetricLog] = []

    def opens(path: Path) -> MetricLog:
        if path.stem == broken:
            raise CheckpointError("the disk is full")
        opened.append(MetricLog(path))
        return opened[-1]

    monkeypatch.setattr("rlmeta.runs.loop.MetricLog", opens)
    with pytest.raises(CheckpointError, match="the disk is full"):
        rl.train(PPO, rl.task(Counted), budget=BUDGET, out=tmp_path / "run", threads=1)
    assert counts == {"made": 6, "closed": 6}, "two to train in, two to be evaluated in, and one to look at of each"
    assert [log._file for log in opened] == [-1] * (broken == "timing")


def _ctrl_c_when(begun: threading.Event, wait: float) -> None:
    begun.wait(60)
    time.sleep(wait)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("hangs", [True, False])
def test_ctrl_c_ends_a_call_that_has_lasted(hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has begun just now may come back, so that the iteration is finished and saved."""
    monkeypatch.setattr(signals, "HANGS", 0.2 if hangs else 30.0)
    begun, came_back = threading.Event(), []

    class Slow(Bad):
        def step(self, action: Any) -> Any:
            if self.steps == 10 and not begun.is_set():
                begun.set()
                time.sleep(60 if hangs else 0.6)
                came_back.append(True)
            return super().step(action)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_ctrl_c_when, args=(begun, 0.3), daemon=True).start()
    try:
        if hangs:
            with pytest.raises(KeyboardInterrupt):
                rl.train(PPO, rl.task(Slow), budget=BUDGET, out=tmp_path / "run", threads=1)
        else:
            run = rl.train(PPO, rl.task(Slow), budget=BUDGET, out=tmp_path / "run", threads=1)
            assert run.stopped == "interrupted" and run.env_steps == 40
    finally:
        signal.signal(signal.SIGINT, before)
    assert came_back == [True] * (not hangs)


def test_an_environment_may_change_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def leave(run: rl.Run, line: dict[str, Any]) -> bool:
        return run.env_steps == 80

    (tmp_path / "else").mkdir()

    class Moves(Bad):
        def step(self, action: Any) -> Any:
            if self.steps == 15:
                os.chdir(tmp_path / "else")
            return super().step(action)

    budget = rl.Budget(steps=160, eval_every=80, eval_episodes=2, final_episodes=2, checkpoint_seconds=0.0)
    run = rl.train(PPO, rl.task(Moves), budget=budget, out="run", threads=1, callbacks=[leave])
    assert run.folder == tmp_path / "run" and run.env_steps == 80
    monkeypatch.chdir(tmp_path)
    assert rl.resume("run", env=Moves).env_steps == 160
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "run"]
    assert list((tmp_path / "else").iterdir()) == []


def test_no_call_is_on_between_steps() -> None:
    from rlmeta.envs.gymnasium.rows import seconds_in_call

    run = rl.train(PPO, rl.task(Bad), budget=BUDGET, threads=1)
    assert seconds_in_call() == 0.0
    run.evaluation_world(2).close()
    assert seconds_in_call() == 0.0
