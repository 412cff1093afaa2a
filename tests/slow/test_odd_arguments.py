"""Odd arguments and surroundings, each in a process of its own with little memory: a sane result or a sentence of
`rlmeta.errors`, never another error, a hang, or memory without end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.errors import RlmetaError
from rlmeta.functional import tree
from tests.envs.bad_environment import Bad

pytestmark = pytest.mark.slow

MEMORY = 6 << 30
"""Bytes of address space that a case may have; torch itself takes a part of it."""
SECONDS = 60

NAN, INF = float("nan"), float("inf")


def ppo(**settings: Any) -> Any:
    small = {"num_envs": 2, "num_steps": 16, "batch_size": 32, "num_epochs": 1, "hidden_sizes": (8,), **settings}
    return rl.PPO(**small)


def train(agent: Any = None, problem: Any = "CartPole-v1", budget: Any = None, steps: int = 256, **about: Any) -> Any:
    chosen = budget or rl.Budget(steps=steps, final_episodes=2, eval_episodes=2, checkpoint_seconds=0.0)
    return rl.train(ppo() if agent is None else agent, problem, budget=chosen, **{"threads": 1, **about})


def digest(run: rl.Run) -> str:
    """Of the whole state."""
    leaves = sorted(tree.flatten(run.state).items())
    return hashlib.sha256(b"".join(n.encode() + x.contiguous().numpy().tobytes() for n, x in leaves)).hexdigest()


def same(within: Callable[[], Any]) -> bool:
    """Whether a run is what it is elsewhere where something global is set up first, which may be a context."""
    before = digest(train(seeds=2))
    context = within()
    with context if hasattr(context, "__enter__") else contextlib.nullcontext():
        return digest(train(seeds=2)) == before


class Tracker:
    """Raises at one place."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, run: rl.Run) -> Tracker:
        self.fail("init")
        return self

    def log(self, step: int, metrics: Any) -> None:
        self.fail("log")

    def close(self) -> None:
        self.fail("close")

    def fail(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(f"{where} of the tracker")


class Own(Exception):
    """A user's own, which passes as it is."""


def _raise() -> Any:
    raise Own


def passes(case: Callable[[], Any]) -> Callable[[], Any]:
    """A case in which a user's own function raises, which is no matter of rlmeta's."""

    def check() -> bool:
        try:
            case()
        except Own:
            return True
        return False

    return check


def stopped(at: int) -> Callable[..., None]:
    """A callback that raises at this iteration."""

    def callback(run: rl.Run, line: dict[str, Any]) -> None:
        if line["iteration"] >= at:
            raise Own

    return callback


def interrupted(prepare: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether a run that a callback has stopped ends as ever when it is resumed under something global."""
    with contextlib.suppress(Own):
        train(seeds=2, out="run", callbacks=[stopped(4)])
    prepare()
    resumed = digest(rl.resume("run"))
    again()
    return resumed == digest(train(seeds=2))


def threads(count: int) -> bool:
    """Whether runs in several threads at once are what one is alone."""
    found: list[str] = []
    others = [threading.Thread(target=lambda: found.append(digest(train(seeds=2)))) for _ in range(count)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    return found == [digest(train(seeds=2))] * count


def forked(prepare: Callable[[], Any]) -> bool:
    """Whether a forked copy of this process trains."""
    prepare()
    child = os.fork()
    if child == 0:
        train(seeds=4, threads=2)
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def twice(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    first()
    return second()


def budget(**settings: Any) -> Callable[[], Any]:
    return lambda: train(budget=rl.Budget(**{"steps": 64, "final_episodes": 2, **settings}), out="run")


def given(**about: Any) -> Callable[[], Any]:
    return lambda: train(**about)


def settings(**about: Any) -> Callable[[], Any]:
    return lambda: train(ppo(**about), seeds=2)


def written(out: Any) -> bool:
    """Whether a folder of this name is read back as it was written."""
    run = train(out=out)
    return run.folder is None or bool(torch.equal(rl.load(out).scores, run.scores))


def steps(count: Any) -> Callable[[], Any]:
    return lambda: rl.train(ppo(), "CartPole-v1", steps=count, threads=1, callbacks=[lambda run, line: True])


def _cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    rates = [NAN, INF, -1.0, 0.0, "x", [], [NAN, 1e-3], None, True, np.float32(1e-3), torch.tensor(1e-3)]
    for rate in [*rates, np.array([1e-3, 1e-4]), 1e30, [1e-3, 1e-3], 1e-320, {}, b"1", 10**400]:
        yield f"learning_rate={rate!r:.40}", settings(learning_rate=rate)
    for gamma in (2.0, -1.0, NAN, INF):
        yield f"gamma={gamma}", settings(gamma=gamma)
    seeds = [0, -1, [], [1, 1], [-1, -5], [2**63], [2**64 - 1], [2**200], [1.5], 2.0, "3", True, None, range(2), {1, 2}]
    seeds += [np.arange(2), torch.arange(2), [2**63 - 1], [-(2**63)], [-1, 2**64 - 1], [True, False], [1, True]]
    for seed in [*seeds, [np.int64(1), 1], (one for one in range(2)), {}, 10**12, [NAN], "12", b"12"]:
        yield f"seeds={seed!r:.40}", given(seeds=seed, steps=1 if isinstance(seed, int) and seed > 10 else 256)
        yield f"seeds={seed!r:.40}, written", given(seeds=seed, out="run", steps=1)
    for count in (1, 0, -1, 1.5, "x", NAN, None, True, 10**30, INF):
        yield f"steps={count!r}", steps(count)
    for count in (10**12, 10**19, 0, -1, 1.5, "x", True, None, NAN):
        yield f"num_envs={count!r}", settings(num_envs=count)
        yield f"num_steps={count!r}", settings(num_steps=count)
    for size in ((-1,), (0,), (10**9,), 64, (), "8", (8.0,), None, (8,) * 400, (10**30,)):
        yield f"hidden_sizes={size!r:.30}", settings(hidden_sizes=size)
    for size in (0, -1, 10**9, 1.5, "x", None):
        yield f"batch_size={size!r}", settings(batch_size=size)
    for count in (0, -1, 10**30, 1.5, "x", None):
        yield f"num_epochs={count!r}", settings(num_epochs=count)
    names = ["ünï码 run", "a b c", "x" * 300, "/".join(["y" * 100] * 60), "a\0b", "", ".", "a\nb", "a\udcff", "~/zz"]
    for out in [*names, b"abc", "/etc/passwd/x", "/dev/null", 5, None, Path("p"), [], "/proc/x", "\x1b[31m"]:
        yield f"out={out!r:.40}", lambda out=out: written(out)
    for value in (NAN, INF, -1.0, "x", None, True):
        yield f"checkpoint_seconds={value!r}", budget(checkpoint_seconds=value)
        yield f"target={value!r}", budget(target=value)
        yield f"log_points={value!r}", budget(log_points=value)
        yield f"final_episodes={value!r}", budget(final_episodes=value)
        yield f"eval_every={value!r}", budget(eval_every=value)
    for device in ("cuda", "meta", "bogus", 5, None, "", torch.device("cpu"), "cpu:7"):
        yield f"device={device!r}", given(device=device)
    for count in (-1, 10**9, "x", 1.5, True, None, 10**30):
        yield f"threads={count!r}", given(threads=count)


def _surroundings() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "callback that raises, resumed", lambda: interrupted(list, list)
    yield "callback that is none", given(callbacks=[5])
    yield "callbacks that are no list", given(callbacks=lambda run, line: None)
    for where in ("init", "log", "close"):

        def tracked(where: str = where) -> bool:
            with contextlib.suppress(RuntimeError):
                train(out="run", seeds=2, trackers=[Tracker(where)])
            return digest(rl.resume("run")) == digest(train(seeds=2))

        yield f"tracker that raises in {where}, resumed", tracked
    yield "tracker that is none", given(trackers=[5])
    yield "in another thread", lambda: threads(1)
    yield "in three threads", lambda: threads(3)
    yield "after another run", lambda: same(lambda: train(ppo(hidden_sizes=(16,)), "Pendulum-v1"))
    yield "one folder twice", lambda: twice(given(out="run"), given(out="run"))
    for dtype in (torch.float64, torch.float16):
        yield f"default {dtype}", lambda dtype=dtype: same(lambda: torch.set_default_dtype(dtype))
    yield (
        "resumed under float64",
        lambda: interrupted(
            lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
        ),
    )
    for device in ("meta", "cpu"):
        yield f"default device {device}", lambda device=device: same(lambda: torch.set_default_device(device))
    yield "global seeds", lambda: same(lambda: (torch.manual_seed(1), np.random.seed(1)))
    yield "no_grad", lambda: same(torch.no_grad)
    yield "inference_mode", lambda: same(torch.inference_mode)
    yield "deterministic algorithms", lambda: same(lambda: torch.use_deterministic_algorithms(True))
    yield "anomaly detection", lambda: same(lambda: torch.autograd.set_detect_anomaly(True))
    yield "autocast", lambda: same(lambda: torch.autocast("cpu", torch.bfloat16))
    yield "forked after a run", lambda: forked(lambda: train(seeds=2))
    yield "forked after two threads", lambda: forked(lambda: torch.set_num_threads(2))
    yield "warnings are errors", lambda: same(lambda: warnings.simplefilter("error"))


def _problems() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "the class of an agent", lambda: train(rl.PPO)
    yield "the name of an agent", lambda: train("ppo")
    for problem in (None, 5, "", [], {}, b"CartPole-v1", "CartPole", "\0", "x" * 10**6):
        yield f"problem={problem!r:.30}", lambda problem=problem: train(problem=problem)
    yield "an environment that is made", lambda: train(problem=gym.make("CartPole-v1"))
    yield "the class of an environment", lambda: train(problem=Bad)
    yield "a function that returns None", lambda: train(problem=lambda: None)
    yield "a function with arguments", lambda: train(problem=lambda size: Bad())
    yield "a network that is None", settings(network=lambda space: None)
    yield "a network that raises", passes(settings(network=lambda space: _raise()))
    yield "a network that is none", settings(network=5)
    yield "methods that are none", given(lifelong=[5])
    yield "methods that are no list", given(lifelong=rl.EWC())
    yield "rewards that are none", settings(rewards=[5])


CASES = {name: case for cases in (_cases(), _surroundings(), _problems()) for name, case in cases}


def apart(case: Callable[[], Any], folder: Path) -> str:
    """How it ends in a forked copy of this process: `sane: ...`, `refused: ...`, or what must not be."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _go(case, folder, writer)
    os.close(writer)
    said, due = b"", True
    while due and (due := bool(select.select([reader], [], [], SECONDS)[0])) and (part := os.read(reader, 4096)):
        said += part
    os.close(reader)
    if not due:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said.decode() or (f"died with {code}" if due else "hangs")


def _go(case: Callable[[], Any], folder: Path, writer: int) -> None:
    os.setsid()
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        found = case()
        said = f"sane: {found}" if found is not False else "wrong: it makes a difference"
    except RlmetaError as error:
        said = f"refused: {type(error).__name__}: {error}"
    except BaseException as error:
        frame = sys.exc_info()[2]
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
        said = f"raw: {type(error).__name__}: {error} ({place})"
    os.write(writer, said.encode(errors="replace")[:4000])
    os._exit(0)


@pytest.mark.parametrize("name", CASES)
def test_odd_arguments(name: str, tmp_path: Path) -> None:
    said = apart(CASES[name], tmp_path)
    print(f"{name}: {said}")
    assert said.startswith(("sane: ", "refused: ")), said
