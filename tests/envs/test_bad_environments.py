"""Training on broken environments: it ends normally, or with one sentence that names the fault."""

from __future__ import annotations

import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rlmeta as rl
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.errors import EnvironmentFailedError, RlmetaError, SettingError
from rlmeta.functional.random import make_keys
from rlmeta.runs import checkpoint
from tests.envs.bad_environment import FAILS, KINDS, WARNS, Bad, train

KEYS = make_keys([0, 1])
ACTIONS = torch.zeros(2, 2, dtype=torch.int64)

ALONE = (
    "raises KeyboardInterrupt",  # Ctrl-C
    "exits",
    "crashes",
    "sleeps for ever",
    "spins for ever",
    "never ends",
    "changes the folder",
)
"""Kinds that need a process, or time, of their own."""
ELSEWHERE = ("reward", "flag", "shape", "an axis more", "four values", "seeds torch", "fine", "one array")
"""What other tests of the adapter are about."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALONE and not kind.endswith(ELSEWHERE)])
def test_a_bad_environment(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmeta.report.listeners.write_curve", lambda run: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind in FAILS:
            with pytest.raises(RlmetaError, match=FAILS[kind]) as error:
                train(kind, "sync", tmp_path / "run")
            assert "'Bad'" in str(error.value) and "\n" not in str(error.value)
        else:
            run = train(kind, "sync", tmp_path / "run")
            assert run.env_steps == 200 or not run.state["active"].any()
    messages = [str(warning.message) for warning in caught if "'Bad'" in str(warning.message)]
    assert re.search(WARNS.get(kind, ""), "".join(messages))
    assert bool(messages) == (kind in WARNS), messages
    if kind != "reset without info":
        assert checkpoint.load(tmp_path / "run" / "state")


# ------------------------------------------------------------------------------------------- what an environment raises


def test_the_row_that_raised_is_named_and_what_it_raised_is_the_cause() -> None:
    index = [-1]  # the first is only looked at

    class Raises(Bad):
        def __init__(self) -> None:
            super().__init__("raises" if index[0] == 2 else "fine", begins=2)
            index[0] += 1

    world = GymnasiumWorld(Raises, (2,), 2)
    state, _ = world.step(world.reset(KEYS), ACTIONS)
    sentence = "environment 'Raises' in row 2 failed with RuntimeError: the wheel came off"
    with pytest.raises(EnvironmentFailedError, match=sentence) as error:
        world.step(state, ACTIONS)
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(SettingError, match="restore"):
        world.step(state, ACTIONS)


def test_a_worker_names_the_row_of_all_and_sends_its_traceback() -> None:
    def make() -> Bad:
        second = multiprocessing.current_process().name.startswith("worker 1")
        return Bad("raises" if second else "fine", begins=2)

    world = GymnasiumWorld(make, (2,), 2, mode="async", workers=2)
    state, _ = world.step(world.reset(KEYS), ACTIONS)
    with pytest.raises(EnvironmentFailedError) as error:
        world.step(state, ACTIONS)
    assert str(error.value).startswith("environment 'Bad' in row 2 failed with RuntimeError: the wheel came off (")
    (note,) = error.value.__notes__
    assert note.startswith("in the worker process of rows 2 to 3:\nTraceback") and "in _raise\n" in note


@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_what_a_vector_env_raises_is_told(mode: AutoresetMode, where: str) -> None:
    class Raises(Bad):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            if where == "reset" and self.resets == 1:
                raise OSError("no display")
            return super().reset(seed=seed)

        def step(self, action: Any) -> Any:
            if where == "step":
                raise OSError("no display")
            return super().step(action)

    world = GymnasiumWorld(SyncVectorEnv([Raises] * 4, autoreset_mode=mode), (2,), 2)
    with pytest.raises(EnvironmentFailedError, match=f"SyncVectorEnv.* failed with OSError: no display .*in {where}"):
        state = world.reset(KEYS)  # the second reset: to look for masks was the first
        world.step(state, ACTIONS)


def test_one_that_can_not_be_made_again_is_named() -> None:
    left = [1]

    def make() -> gym.Env[Any, Any]:
        if not left:
            raise OSError("no more licences")
        left.pop()
        return Bad()

    with pytest.raises(EnvironmentFailedError, match=r"'Bad' failed with OSError: no more licences .*in make"):
        GymnasiumWorld(make, (2,), 2)


def test_an_error_of_the_first_look_is_told() -> None:
    class Broken(Bad):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            raise ValueError("no map")

    with pytest.raises(EnvironmentFailedError, match=r"'Broken' failed with ValueError: no map .*in reset\)"):
        GymnasiumWorld(Broken, (2,), 2)


# ---------------------------------------------------------------------------------------------------------- its close()


class Stuck(Bad):
    """Environment whose close() raises."""

    closed: list[int] = []  # noqa: RUF012

    def close(self) -> None:
        self.closed.append(1)
        raise BaseException("the door is stuck")


def _closing(world: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        world().close()
    return [str(warning.message) for warning in caught]


def test_all_are_closed_where_one_raises_and_it_is_said_once() -> None:
    Stuck.closed.clear()
    (message,) = _closing(lambda: GymnasiumWorld(Stuck, (2,), 3))
    assert len(Stuck.closed) == 7, "six, and the first that is only looked at"
    assert re.fullmatch(
        r"close\(\) of environment 'Stuck' failed with BaseException: the door is stuck \(.*, in close\): what it "
        "holds may stay until this process ends",
        message,
    )


def test_a_vector_env_whose_close_raises() -> None:
    class Vector(SyncVectorEnv):
        def close(self, **kwargs: Any) -> None:
            if kwargs:
                return
            raise OSError("the door is stuck")

    def make(num_envs: int) -> Vector:
        return Vector([Bad] * num_envs)

    for refused in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if refused:
                with pytest.raises(SettingError, match="VectorEnv"):
                    GymnasiumWorld(make, (2,), 2, max_episode_steps=5)
            else:
                GymnasiumWorld(make, (2,), 2).close()
        assert ["the door is stuck" in str(warning.message) for warning in caught] == [True]


def test_an_environment_of_other_spaces_is_closed() -> None:
    sizes, closed = [1, 1, 2], []

    class Grows(Bad):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-1, 1, (sizes.pop(0),), np.float32)

        def close(self) -> None:
            closed.append(self)

    with pytest.raises(RlmetaError, match="different spaces"):
        GymnasiumWorld(Grows, (2,), 1)
    assert len(closed) == 3


def test_a_stream_closes_the_tasks_it_has_made_where_it_can_not_be() -> None:
    closed = []

    class Closes(Bad):
        def close(self) -> None:
            closed.append(self)

    class Other(Closes):
        observation_space = spaces.Box(-1, 1, (2,), np.float32)

    class Broken(Closes):
        def __init__(self) -> None:
            raise OSError("no display")

    for last, message in ((Other, "the tasks of a stream need the same"), (Broken, "no display")):
        stream = rl.stream([rl.task(Closes, name="a"), rl.task(last, name="b")])
        closed.clear()
        with pytest.raises(RlmetaError, match=message):
            stream.world((2,), 2)
        assert len(closed) == (10 if last is Other else 5)
