"""Broken environment, with every kind of fault that users' environments have had."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

import rlmeta as rl

SPACE = spaces.Box(-1, 1, (3,), np.float32)
RESETS = 4
"""How many of an environment's resets are right, where what is wrong is one."""


class Odd(BaseException):
    """Exception that is no `Exception`, has no text, and cannot be pickled."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> Any:
        raise ZeroDivisionError


class Bad(gym.Env[Any, Any]):
    """Environment with episodes of 20 steps and a fault of the given kind from its 60th step on.

    Args:
        kind: a key of `STEPS`, or one of `ELSEWHERE`.
        begins: the step from which it is bad.
        hanging: a file to make before it hangs.
    """

    action_space = spaces.Discrete(2)
    observation_space: spaces.Box = SPACE

    def __init__(self, kind: str = "fine", begins: int = 60, hanging: Path | None = None) -> None:
        self.kind, self.begins, self.hanging = kind, begins, hanging
        self.steps = self.resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time, self.resets = 0, self.resets + 1
        self.x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        if self.resets > RESETS and self.kind == "raises in reset":
            raise ValueError("no way back")
        if self.resets > RESETS and self.kind == "other space":
            self.observation_space = spaces.Box(-1, 1, (5,), np.float32)
            return np.zeros(5, np.float32), {}
        if self.resets > RESETS and self.kind == "NaN in reset":
            return self.x * np.nan, {}
        if self.kind == "reset without info":
            return self.x
        if self.kind == "one array":
            self.shown = self.x.copy()
            return self.shown, {}
        return self.x.copy(), {}

    def step(self, action: Any) -> Any:
        self.steps, self.time = self.steps + 1, self.time + 1
        self.x = np.clip(self.x + self.np_random.normal(0, 0.1, 3), -1, 1).astype(np.float32)
        result = [self.x.copy(), float(action), False, self.time >= 20 and self.kind != "never ends", {}]
        if self.steps >= self.begins and self.kind in STEPS:
            result = STEPS[self.kind](self, result)
        if self.kind == "one array":
            self.shown[:] = result[0]
            result[0] = self.shown
        return tuple(result)

    def close(self) -> None:
        if self.kind == "raises in close":
            raise RuntimeError("the door is stuck")


def _put(place: int, value: Any) -> Callable[[Bad, list[Any]], list[Any]]:
    """A step whose result has another value at this place, or what a function makes of the one there."""

    def step(env: Bad, result: list[Any]) -> list[Any]:
        result[place] = value(result[place]) if callable(value) else value
        return result

    return step


def _do(action: Callable[[], Any]) -> Callable[[Bad, list[Any]], list[Any]]:
    """Step with a side effect."""

    def step(env: Bad, result: list[Any]) -> list[Any]:
        action()
        return result

    return step


def _raise(error: BaseException) -> Any:
    raise error


def _hang(wait: Callable[[], Any]) -> Callable[[Bad, list[Any]], list[Any]]:
    def step(env: Bad, result: list[Any]) -> list[Any]:
        if env.hanging is not None:
            env.hanging.touch()
        while True:
            wait()

    return step


STEPS: dict[str, Callable[[Bad, list[Any]], list[Any]]] = {
    "raises": _do(lambda: _raise(RuntimeError("the wheel came off"))),
    "raises BaseException": _do(lambda: _raise(BaseException("the wheel came off"))),
    "raises SystemExit": _do(lambda: sys.exit(5)),
    "raises KeyboardInterrupt": _do(lambda: _raise(KeyboardInterrupt())),
    "raises StopIteration": _do(lambda: _raise(StopIteration("x"))),
    "raises what can't be sent or shown": _do(lambda: _raise(Odd())),
    "NaN observation": _put(0, lambda x: x * np.nan),
    "infinite observation": _put(0, lambda x: x * np.float32(np.inf)),
    "NaN reward": _put(1, float("nan")),
    "infinite reward": _put(1, float("inf")),
    "huge reward": _put(1, 1e38),
    "no reward": _put(1, None),
    "text for a reward": _put(1, "1"),
    "array for a reward": _put(1, np.array([1.0])),
    "other shape": _put(0, np.zeros(4, np.float32)),
    "an axis more": _put(0, np.zeros((1, 3), np.float32)),
    "float64": _put(0, lambda x: x.astype(np.float64)),
    "complex": _put(0, lambda x: x.astype(np.complex64)),
    "objects": _put(0, np.array([None, 1, 2], object)),
    "no observation": _put(0, None),
    "a list": _put(0, [0.0, 0.0, 0.0]),
    "outside of the space": _put(0, lambda x: x + np.float32(1000)),
    "exits": _do(lambda: os._exit(7)),
    "crashes": _do(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "sleeps for ever": _hang(lambda: time.sleep(1)),
    "spins for ever": _hang(lambda: None),
    "four values": lambda env, result: [*result[:3], {}],
    "no info": _put(4, None),
    "no flag": _put(2, None),
    "numpy's flag": _put(2, np.bool_(True)),
    "text for a flag": _put(2, "no"),
    "both flags": lambda env, result: [*result[:2], True, True, {}],
    "changes the folder": _do(lambda: os.chdir("/")),
    "seeds torch": _do(lambda: torch.manual_seed(0)),
}
"""What a step does."""

ELSEWHERE = (
    "fine",
    "raises in reset",
    "NaN in reset",
    "other space",
    "reset without info",
    "one array",
    "never ends",
    "raises in close",
)
"""Kinds that are bad in other places, or not at all."""

KINDS = (*ELSEWHERE, *STEPS)

FAILS = {
    "raises": r"failed with RuntimeError: the wheel came off \(.*bad_environment.py:\d+, in _raise\)",
    "raises BaseException": "failed with BaseException: the wheel came off",
    "raises SystemExit": "failed with SystemExit: 5",
    "raises StopIteration": "failed with StopIteration: x",
    "raises what can't be sent or shown": r"failed with Odd: \(which can't be shown\)",
    "raises in reset": r"failed with ValueError: no way back \(.*, in reset\)",
    "other space": r"observation of shape \(5,\)",
    "reset without info": r"gave ndarray from reset\(\)",
    "no reward": "gave reward None",
    "text for a reward": "gave reward '1'",
    "array for a reward": r"gave reward array\(\[1\.\]\)",
    "other shape": r"observation of shape \(4,\)",
    "an axis more": r"observation of shape \(1, 3\)",
    "complex": "dtype complex64",
    "objects": "dtype object",
    "no observation": r"observation of shape \(\) and dtype object",
    "four values": "gave 4 values",
    "no flag": "gave terminated None",
    "text for a flag": "gave terminated 'no'",
}
"""Kinds that end a run, and what its one sentence says; others are trained on to the end."""

WARNS = {
    "NaN observation": r"'Bad' gave an observation that is not finite in row \d, environment \d of learner \d",
    "NaN in reset": r"'Bad' gave an observation that is not finite in row \d.*at its reset",
    "infinite observation": "'Bad' gave an observation that is not finite in row",
    "NaN reward": "'Bad' gave the reward nan in row",
    "infinite reward": "'Bad' gave the reward inf in row",
    "outside of the space": "'Bad' gave an observation outside of its space",
    "never ends": r"'Bad': 2 of 2|'Bad': 4 of 4",
    "raises in close": r"close\(\) of environment 'Bad' failed with RuntimeError: the door is stuck",
}
"""What is said of some that don't."""


def train(kind: str, mode: Any, folder: str | Path | None = None, hanging: Path | None = None, **budget: Any) -> rl.Run:
    """Train two learners on such environments, whose faults begin in the third episode or later."""
    settings = rl.PPO(num_envs=2, num_steps=20, batch_size=40, num_epochs=1, hidden_sizes=(8,))
    task = rl.task(lambda: Bad(kind, hanging=hanging), name="bad", mode=mode)
    about = rl.Budget(**{"steps": 200, "final_episodes": 2, "eval_episodes": 2, "checkpoint_seconds": 0.0, **budget})
    return rl.train(settings, task, seeds=[3, 5], budget=about, out=folder, threads=1)
