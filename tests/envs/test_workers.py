"""Worker processes: their start, messages about a hanging one, and their end with the parent process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rlmeta as rl
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.errors import EnvironmentFailedError, SettingError
from rlmeta.functional.random import make_keys

KEYS = make_keys([0, 1])
ACTIONS = torch.zeros(2, 2, dtype=torch.int64)


class Walk(gym.Env[Any, Any]):
    """Random walk with a seed, which calls `before()` before every step."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.before, self.x = before, 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = float(self.np_random.normal())
        return np.array([self.x], np.float32), {}

    def step(self, action: Any) -> Any:
        self.before()
        self.x += float(self.np_random.normal())
        return np.array([self.x], np.float32), self.x, False, False, {}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _pids(world: GymnasiumWorld) -> list[int]:
    rows: Any = world._rows
    return [process.pid for process in rows._processes]


def _until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _script(tmp_path: Path, text: str, folder: str = ".") -> subprocess.Popen[str]:
    """Start a program in a subfolder of its own folder."""
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path / folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
    )


# --------------------------------------------------------------------------------------------------------------- start

_TORCH = """
import gymnasium as gym
import numpy as np
import torch

from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.functional import random

torch.set_num_threads(2)
(torch.ones(600, 600) @ torch.ones(600, 600)).tanh().sum()  # both threads are at work from here on
print("main", flush=True)

class Torch(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        x = (torch.ones(600, 600) @ torch.full((600, 600), float(self.np_random.normal()))).tanh().sum()
        return np.array([float(x)], np.float32), float(torch.get_num_threads()), False, False, {}

gym.register("Torch-v0", entry_point="__main__:Torch", max_episode_steps=7)
for make in (Torch, "Torch-v0", lambda: gym.make("Torch-v0")):
    world = GymnasiumWorld(make, (2,), 2, mode="async", workers=2)
    state = world.reset(random.make_keys([0, 1]))
    for _ in range(3):
        state, transition = world.step(state, torch.zeros(2, 2, dtype=torch.int64))
    print(transition.reward.flatten().tolist(), world.max_episode_steps, flush=True)
    world.close()
"""


def test_environments_that_use_torch_do_not_wait_for_threads_of_their_parent(tmp_path: Path) -> None:
    """In a program without a main guard: it runs once, and its definitions reach the workers."""
    process = _script(tmp_path, _TORCH)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.splitlines() == ["main", "[1.0, 1.0, 1.0, 1.0] None", *["[1.0, 1.0, 1.0, 1.0] 7"] * 2]


def test_a_forked_copy_starts_workers_of_its_own(tmp_path: Path) -> None:
    """Neither these workers nor the program's own import modules from the current folder."""
    (tmp_path / "data").mkdir()
    for name in ("torch", "numpy", "gymnasium"):
        (tmp_path / "data" / f"{name}.py").write_text("open('imported', 'w'); raise SystemExit('imported')")
    text = """
import os
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.functional import random

def run():
    world = GymnasiumWorld("CartPole-v1", (), 2, mode="async", workers=1)
    world.reset(random.make_keys([0])[0])
    world.close()

run()
child = os.fork()
if child == 0:
    run()
    os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
run()
"""
    process = _script(tmp_path, text, "data")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (0, "3\n"), err
    assert not (tmp_path / "data" / "imported").exists()


def test_workers_see_the_surroundings_of_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fork server was started with other environment variables and another current folder."""
    GymnasiumWorld(Walk, (2,), 2, mode="async", workers=1).close()
    monkeypatch.setenv("RLMETA_TEST_SAYS", "1234")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number").write_text("0.5")

    class Tells(Walk):
        def step(self, action: Any) -> Any:
            number = float(os.environ["RLMETA_TEST_SAYS"]) + float(Path("number").read_text())
            return np.zeros(1, np.float32), number, "PYTHONSAFEPATH" in os.environ, False, {}

    world = GymnasiumWorld(Tells, (2,), 2, mode="async", workers=1)
    _, transition = world.step(world.reset(KEYS), ACTIONS)
    world.close()
    assert transition.reward.tolist() == [[1234.5] * 2] * 2 and not transition.terminated.any()
    assert "PYTHONSAFEPATH" not in os.environ


def test_what_can_not_be_sent_is_refused() -> None:
    lock = threading.Lock()
    with pytest.raises(SettingError, match=r"Walk.*can't be sent.*mode='sync'"):
        GymnasiumWorld(lambda: Walk(lock.acquire), (2,), 2, mode="async", workers=1)


# ---------------------------------------------------------------------------------------------------------- that hangs


def _hangs(row: int, how: Callable[[], Any]) -> Callable[[], gym.Env[Any, Any]]:
    """Random walks; the one in a given row of a worker does something at its third step."""
    count = [-1]  # the first is made here, and only looked at

    class Hangs(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.number, self.steps = count[0], 0
            count[0] += 1

        def step(self, action: Any) -> Any:
            self.steps += 1
            if self.number == row and self.steps == 3:
                how()
            return super().step(action)

    return Hangs


def _spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "how", [lambda: time.sleep(1000), pytest.param(_spin, marks=pytest.mark.slow)], ids=["sleeps", "spins"]
)
def test_an_environment_that_does_not_answer_is_named_and_ended(how: Callable[[], Any]) -> None:
    task = rl.task(_hangs(1, how), name="hangs", mode="async", worker_timeout=1.0)
    world: Any = GymnasiumWorld(task.source, (2,), 2, mode="async", workers=1, worker_timeout=task.worker_timeout)
    state, pids = world.reset(KEYS), _pids(world)
    for _ in range(2):
        state, _ = world.step(state, ACTIONS)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(EnvironmentFailedError) as failed:
        warnings.simplefilter("always")
        world.step(state, ACTIONS)
    place = f"environment 'Hangs' in row 1, worker process 0 of 1 (pid {pids[0]}), has not answered for "
    messages = [str(warning.message) for warning in caught]
    assert len(messages) >= 2 and all(text.startswith(place) for text in [*messages, str(failed.value)]), messages
    seconds = [float(text.removeprefix(place).split()[0]) for text in messages]
    assert seconds == sorted(seconds) and "waiting up to 1 s" in messages[0] and "worker_timeout" in str(failed.value)
    _until_gone(pids)


def test_slow_environments_that_go_on_are_waited_for() -> None:
    """A worker with four environments may take longer than a single environment may."""
    world = GymnasiumWorld(lambda: Walk(lambda: time.sleep(0.6)), (2,), 2, "async", 1, worker_timeout=2.0)
    state = world.reset(KEYS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, _ = world.step(state, ACTIONS)
    assert all("has not answered" in str(warning.message) for warning in caught)
    world.close()


class Odd(BaseException):
    """Exception that is no `Exception` and has no text."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("error", [KeyboardInterrupt, Odd])
def test_whatever_a_worker_raises_is_told(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    world = GymnasiumWorld(lambda: Walk(fail), (2,), 2, mode="async", workers=1)
    message = f"environment 'Walk' in row 0 failed with {error.__name__}: .*in fail\\)"
    with pytest.raises(EnvironmentFailedError, match=message) as failed:
        world.step(world.reset(KEYS), ACTIONS)
    assert "Traceback" in failed.value.__notes__[0]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), True, "60", None])
def test_a_timeout_is_seconds(timeout: Any) -> None:
    with pytest.raises(SettingError, match="worker_timeout"):
        rl.task(Walk, worker_timeout=timeout)
    with pytest.raises(SettingError, match="worker_timeout"):
        GymnasiumWorld(Walk, (2,), 2, mode="async", workers=1, worker_timeout=timeout)


_TRAIN = """
import os, signal, sys, time
from pathlib import Path
import gymnasium as gym
import numpy as np
import rlmeta as rl

def {how}():
    {does}

class Hangs(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {{}}

    def step(self, action):
        self.steps += 1
        if self.steps == 30:
            Path(f"pid-{{os.getpid()}}").touch()
            {how}()
        return np.zeros(1, np.float32), 0.0, False, self.steps % 10 == 0, {{}}

settings = rl.PPO(num_envs=2, num_steps=20, batch_size=40, num_epochs=1, hidden_sizes=(8,))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
task = rl.task(Hangs, mode="async", max_episode_steps=10, worker_timeout={timeout})
budget = rl.Budget(steps=400, eval_every=400, eval_episodes=2, final_episodes=2)
rl.train(settings, task, seeds=[0], budget=budget, threads=1)
"""


def _stuck(tmp_path: Path, does: str, timeout: float) -> tuple[subprocess.Popen[str], list[int]]:
    """Start training; the process, and its workers once one of them hangs."""
    process = _script(tmp_path, _TRAIN.format(how="hang", does=does, timeout=timeout))
    deadline = time.monotonic() + 120
    while not (pids := [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process, pids


WAYS_TO_HANG = {
    "sleeps": "time.sleep(1000)",
    "spins": "[0 for _ in iter(int, 1)]",
    "holds the interpreter's lock": "__import__('ctypes').PyDLL(None).sleep(1000)",
}


@pytest.mark.parametrize(
    "does",
    [
        pytest.param(code, id=name, marks=pytest.mark.slow if name == "spins" else [])
        for name, code in WAYS_TO_HANG.items()
    ],
)
def test_a_hanging_worker_ends_when_training_is_killed(does: str, tmp_path: Path) -> None:
    process, workers = _stuck(tmp_path, does, 600.0)
    assert all(_alive(pid) for pid in workers)
    process.kill()
    process.wait()
    _until_gone(workers)


def test_ctrl_c_ends_training_that_waits(tmp_path: Path) -> None:
    """At once after some waiting: training's own handler would wait for an iteration that never ends."""
    process, workers = _stuck(tmp_path, "time.sleep(1000)", 40.0)
    assert process.stderr is not None
    while "has not answered" not in (line := process.stderr.readline()):
        assert line, "ended without a word"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in err and "was ended" not in err
    _until_gone(workers)
