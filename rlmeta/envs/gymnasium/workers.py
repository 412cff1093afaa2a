"""Live gymnasium environments divided over worker processes, with observations and actions in shared memory.

Workers are forked from a server process that has imported what they need and run none of it, never from this one: a
copy of a process that has used torch's threads waits forever for threads that were not copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rlmeta.data.spaces import Array, Layout
from rlmeta.envs import own_folders
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT, Buffers, Rows, Template, require_timeout
from rlmeta.errors import EnvironmentFailedError, RlmetaError, SettingError

_FIRST_WORD = 30.0
"""Seconds of waiting after which it is said at the latest, and again after twice as many, four times, ..."""

_QUICK = 3.0
"""Seconds of waiting after which Ctrl-C ends it at once."""

_PATIENCE = 2.0
"""Seconds that workers get to close their environments before they are killed."""

_SHORT_PATIENCE = 0.5
"""The same, after Ctrl-C."""

_ORPHANED = 1.0
"""Seconds that a worker without a parent gets to close its environments."""

_STUCK = 1.0
"""Seconds after which one that has not ended by itself is killed."""


class WorkerRows:
    """R live environments in worker processes; the same as `Rows` otherwise.

    What makes an environment is sent by cloudpickle: what stands in the main program travels whole, and it is not
    imported again; what stands in a module is imported in the worker. torch has one thread there. One more process,
    which runs none of the environments' code, kills the workers where this one is killed and they don't end by
    themselves.

    Args:
        template: how to make one.
        count: R.
        workers: how many processes; None takes one a core. Never more than R.
        timeout: seconds that one call of an environment may take before its world fails. Long before (after 30 s, or
            a twentieth of it) a warning names the environment that is waited for, and again in growing intervals.

    Raises:
        SettingError: a wrong count or time, or environments that can't be sent.
        EnvironmentFailedError: an environment could not be made in a worker.
    """

    def __init__(
        self, template: Template, count: int, workers: int | None = None, timeout: float = WORKER_TIMEOUT
    ) -> None:
        if workers is not None and workers < 1:
            raise SettingError(f"workers is {workers}, expected at least 1")
        require_timeout(timeout)
        self._timeout = float(timeout)
        workers = min(count, workers or _cores())
        self.observations, self.actions = Layout(template.observation_space), Layout(template.action_space, "action")
        like = [
            *Buffers.allocate(self.observations, count).arrays(),
            *(np.zeros((count, *leaf.shape), leaf.dtype) for leaf in self.actions.leaves),
            np.zeros(count, np.int64),
            np.zeros((workers, 2), np.int64),
        ]
        context = multiprocessing.get_context("forkserver")
        memory = [(context.RawArray("b", max(array.nbytes, 1)), array.shape, array.dtype) for array in like]
        *arrays, self._progress = [_view(*block) for block in memory]
        leaves = len(self.actions.leaves)
        self.buffers = Buffers.of(arrays[: -leaves - 1])
        self._actions, self._seeds = arrays[-leaves - 1 : -1], arrays[-1]
        bounds = np.linspace(0, count, workers + 1).astype(int).tolist()
        self._slices = list(itertools.pairwise(bounds))
        self._name, self._busy = template.name, False
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self._processes, self._pipes)
        sent = _packed(template)
        try:
            with _fresh_start():
                for worker, (start, stop) in enumerate(self._slices):
                    name = f"worker {worker}, rows {start}-{stop - 1}"
                    self._start(context, name, _work, (sent, worker, (start, stop), memory))
                pids = [process.pid for process in self._processes]
                self._start(context, "guard of the workers", _guard, (pids,))
            self._polls = [select.poll() for _ in range(workers)]
            for poll, pipe in zip(self._polls, self._pipes):
                poll.register(pipe, select.POLLIN)
            self._busy = True
            self._receive(range(workers))
        except BaseException:
            self.close()
            raise

    def reset(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Start an episode from the given seed in each of the rows."""
        self._divide("reset", rows, seeds)

    def step(self, actions: Sequence[Array], next_seeds: Array) -> None:
        """Act in every row; see `Rows.step`."""
        for shared, action in zip(self._actions, actions):
            shared[:] = action
        self._seeds[:] = next_seeds
        self._exchange(dict.fromkeys(range(len(self._slices)), ("step",)))

    def replay(self, rows: Sequence[int], seeds: Sequence[int], actions: Sequence[Sequence[Array]]) -> list[bool]:
        """Bring each of the rows to where its episode was after the given actions; see `Rows.replay`."""
        return self._divide("replay", rows, seeds, actions)

    def close(self) -> None:
        """Close the environments and end the processes; those that do not end are killed."""
        self._finalizer()

    def _start(self, context: Any, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True, name=name)
        self._pipes.append(ours)
        process.start()
        self._processes.append(process)
        theirs.close()

    def _divide(self, command: str, rows: Sequence[int], *columns: Sequence[Any]) -> list[Any]:
        """Send each row's arguments to its worker, and return the answers in the order of `rows`."""
        messages, places = {}, []
        for worker, (start, stop) in enumerate(self._slices):
            chosen = [place for place, row in enumerate(rows) if start <= row < stop]
            if chosen:
                own = [rows[place] - start for place in chosen]
                messages[worker] = (command, own, *([column[place] for place in chosen] for column in columns))
                places.extend(chosen)
        answers = [answer for chunk in self._exchange(messages) for answer in chunk or ()]
        return [answer for _, answer in sorted(zip(places, answers), key=lambda pair: pair[0])]

    def _exchange(self, messages: dict[int, tuple[Any, ...]]) -> list[Any]:
        if not self._finalizer.alive:
            raise EnvironmentFailedError(f"the workers of {self._name} are closed: make a new world")
        if self._busy:
            raise EnvironmentFailedError(
                f"the workers of {self._name} were interrupted: make a new world and restore it"
            )
        self._busy = True
        for worker, message in messages.items():
            with contextlib.suppress(OSError):  # a dead worker is reported below
                self._pipes[worker].send(message)
        return self._receive(messages)

    def _receive(self, workers: Any) -> list[Any]:
        """One answer of each worker.

        Raises:
            RlmetaError: the first that a worker raised; all are closed then.
        """
        answers, failure = [], None
        try:
            for worker in workers:
                answer = self._answer(worker) if failure is None else failure
                failure = failure or (answer if isinstance(answer, RlmetaError) else None)
                answers.append(answer)
        except BaseException:  # Ctrl-C: whoever was waited for may never answer
            if self._finalizer.detach():
                _stop(os.getpid(), self._processes, self._pipes, _SHORT_PATIENCE)
            raise
        self._busy = False
        if failure is not None:
            self.close()
            raise failure
        return answers

    def _answer(self, worker: int) -> Any:
        """What a worker sends, or the error that says why nothing comes."""
        try:
            quick = min(_QUICK, self._first_word(worker))
            if not self._polls[worker].poll(1000 * quick):
                with _ctrl_c_at_once():
                    self._wait(worker, quick)
            return self._pipes[worker].recv()
        except (EOFError, OSError):
            return self._death(worker)
        except EnvironmentFailedError as error:
            return error

    def _limit(self, worker: int) -> float:
        """Seconds that a worker may take for what it is at; until it first calls an environment it imports modules."""
        return self._timeout if self._progress[worker, 1] else max(self._timeout, WORKER_TIMEOUT)

    def _first_word(self, worker: int) -> float:
        """Seconds after which it is said that a worker is waited for."""
        return min(_FIRST_WORD, self._limit(worker) / 20)

    def _wait(self, worker: int, waited: float) -> None:
        """Wait until a worker sends something, and name the environment that is waited for.

        Args:
            worker: whose answer has not come.
            waited: seconds that it was waited for already.

        Raises:
            EnvironmentFailedError: a call has taken longer than the timeout.
        """
        calls = int(self._progress[worker, 1])
        begun, due = time.monotonic() - waited, self._first_word(worker)
        while True:
            waited, limit = time.monotonic() - begun, self._limit(worker)
            if int(self._progress[worker, 1]) != calls:  # slow perhaps, but it goes on
                calls = int(self._progress[worker, 1])
                begun, waited, due = time.monotonic(), 0.0, self._first_word(worker)
            elif waited >= limit:
                raise EnvironmentFailedError(
                    f"{self._place(worker)} has not answered for {waited:.3g} s and was ended: correct it, find where "
                    "it waits with mode='sync', or give it more time by worker_timeout="
                )
            elif waited >= due:
                text = f"{self._place(worker)} has not answered for {waited:.3g} s: waiting up to {limit:.5g} s"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                due *= 2
            pause = min(min(due, limit) - waited, self._first_word(worker))
            if self._polls[worker].poll(1000 * max(0.001, pause)):
                return

    def _place(self, worker: int) -> str:
        """The environment that a worker is at, in words."""
        (start, _), (row, calls) = self._slices[worker], self._progress[worker].tolist()
        process = f"worker process {worker} of {len(self._slices)} (pid {self._processes[worker].pid})"
        return f"{self._name} in row {start + row}, {process}," if calls else f"{process} of {self._name}"

    def _death(self, worker: int) -> EnvironmentFailedError:
        process, (start, stop) = self._processes[worker], self._slices[worker]
        process.join(1.0)
        row, calls = self._progress[worker].tolist()
        return EnvironmentFailedError(
            f"the worker process of {self._name}, rows {start} to {stop - 1}, died with exit code {process.exitcode}"
            f"{f' in row {start + row}' if calls else ''}: run with mode='sync' to see where"
        )


def _cores() -> int:
    """How many this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _view(block: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape))
    return np.frombuffer(block, dtype, size).reshape(shape)


def _stop(owner: int, processes: list[Any], pipes: list[Connection], patience: float = _PATIENCE) -> None:
    if os.getpid() != owner:  # a forked copy that is collected must not close the original's workers
        return
    for pipe in pipes:
        with contextlib.suppress(OSError, ValueError):
            pipe.send(("close",))
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    for pipe in pipes:
        pipe.close()


@contextlib.contextmanager
def _ctrl_c_at_once() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, whatever it does elsewhere: who waits here would see no flag."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------ start-up, here


class _Sent(NamedTuple):
    """What a worker needs of this process."""

    environment: dict[str, str]
    """Of the process: its server may have been started in another."""
    specs: dict[str, bytes]
    """What is registered with gymnasium and not its own, pickled."""
    filters: list[Any]
    """Of warnings."""
    path: list[str]
    """Where modules are searched for, those of the current folder that a command names among them."""
    template: bytes
    """How to make an environment, pickled: it is read when the others are in place."""


def _packed(template: Template) -> bytes:
    """What is sent to every worker.

    Raises:
        SettingError: something that makes the environments can't be sent.
    """
    make: Any = template.make
    if isinstance(make, functools.partial) and make.args and isinstance(make.args[0], EnvSpec):
        make = functools.partial(make.func, _whole(make.args[0]), *make.args[1:], **make.keywords)
    specs: dict[str, bytes] = {}
    for name, spec in gym.registry.items():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(Exception):  # what can't be sent may not be needed
                specs[name] = cloudpickle.dumps(_whole(spec))
    try:
        pickled = cloudpickle.dumps(dataclasses.replace(template, make=make))
        path = [entry for entry in sys.path if entry]
        return cloudpickle.dumps(_Sent(dict(os.environ), specs, list(warnings.filters), path, pickled))
    except Exception as error:
        raise SettingError(
            f"{template.name} can't be sent to worker processes ({type(error).__name__}: {error}): put what makes it "
            "into a module, let it refer to nothing that is open or running, or use mode='sync'"
        ) from error


def _whole(spec: EnvSpec) -> EnvSpec:
    """A spec that holds a class of the main program itself, for no worker can import it."""
    point = spec.entry_point
    if isinstance(point, str) and point.startswith("__main__:"):
        own: Any = load_env_creator(point)
        return dataclasses.replace(spec, entry_point=own)
    return spec


def _forget_server() -> None:
    """In a forked copy of this process the server is not a child, which multiprocessing takes for an error."""
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_server)


@contextlib.contextmanager
def _fresh_start() -> Iterator[None]:
    """Within, processes start without the main program, and what they import is searched for where this process does.

    A main program that is imported again would train again, where nothing guards its top level; and a server that is
    started by `python -c` would look for modules in the current folder first, whoever's files lie there.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    main = sys.modules["__main__"]
    folders = [entry for entry in sys.path if entry and not entry.startswith(own_folders.PREFIX)]
    shown = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(folders)}
    before = {name: os.environ.get(name) for name in shown}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else Ctrl-C ends the server as it imports
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(shown)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# ------------------------------------------------------------------------------------------------ in a worker's process


def _work(sent: bytes, worker: int, part: tuple[int, int], memory: list[Any], pipe: Connection) -> None:
    """What a worker process runs: its rows, until it is told to close or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `_fresh_start` blocked it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    start, stop = part
    rows: Rows | None = None
    name = "an environment"
    try:
        *arrays, progress = [_view(*block) for block in memory]
        arrays = [array[start:stop] for array in arrays]
        made = _unpacked(sent)
        name = made.name
        leaves = len(Layout(made.action_space, "action").leaves)
        actions, seeds = arrays[-leaves - 1 : -1], arrays[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parent has made one, and shown what it warns of
            own, called = Buffers.of(arrays[: -leaves - 1]), memoryview(progress[worker])
            rows = Rows(made, stop - start, own, called, start)
        pipe.send(None)
        for command, *arguments in _commands(pipe):
            if command == "step":
                # a copy, because an environment may keep its last action and shared memory is overwritten
                rows.step([action.copy() for action in actions], seeds)
                pipe.send(None)
            else:
                pipe.send(getattr(rows, command)(*arguments))
    except BaseException as error:
        report = _report(error, name if rows is None else rows.current, start, stop)
        with contextlib.suppress(OSError):
            pipe.send(report)
    finally:
        if rows is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the parent has closed one, and said what it raises
                rows.close()


def _commands(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """What the parent sends, until it says "close" or is gone."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        if message[0] == "close":
            return
        yield message


def _unpacked(sent: bytes) -> Template:
    """How to make an environment, in a process that is made like the parent."""
    given: _Sent = pickle.loads(sent)
    os.environ.clear()
    os.environ.update(given.environment)
    warnings.filters[:] = given.filters  # type: ignore[index]
    own_folders.inherit(given.path)
    for name, spec in given.specs.items():
        if name not in gym.registry:
            with contextlib.suppress(Exception):
                gym.registry[name] = pickle.loads(spec)
    made: Template = pickle.loads(given.template)
    return made


def _end_with_parent() -> None:
    """End this process when its parent has ended, even where an environment never returns."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(_ORPHANED)  # in which one that waits for a command sees the end of its pipe, and closes its environments
    os._exit(1)


def _guard(workers: list[int], pipe: Connection) -> None:
    """What one more process runs: it kills workers that outlive their parent.

    A worker watches its parent by a thread, which can't run while compiled code holds the interpreter's lock.

    Args:
        workers: their process ids.
        pipe: from the parent, which says "close" where it ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        pipe.recv()
        return
    except (EOFError, OSError):
        deadline = time.monotonic() + _ORPHANED + _STUCK
    while workers and time.monotonic() < deadline:
        time.sleep(0.05)
        workers = [pid for pid in workers if _exists(pid)]  # one that has ended may be another's number soon
    for pid in workers:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _exists(pid: int) -> bool:
    """Whether there is a process of this number; the server reaps those that have ended."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _report(error: BaseException, name: str, start: int, stop: int) -> BaseException:
    """The error to send, with this process's traceback as a note: what it was raised from can't be sent."""
    known = isinstance(error, RlmetaError) and type(error).__module__ == RlmetaError.__module__
    said = error if known else failures.failed(name, error)
    if said is not error or error.__cause__ is not None:
        said.add_note(f"in the worker process of rows {start} to {stop - 1}:\n{traceback.format_exc()}")
    return said
