"""Gymnasium environments in worker processes, with observations and actions in shared memory.

Workers are forked from a server process that has only imported modules, never from this process: a fork of a process
that has used torch's threads would wait forever for threads that were not copied.
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
from rlmeta.envs import user_modules
from rlmeta.envs.gymnasium import failures
from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT, Buffers, Rows, Template, require_timeout
from rlmeta.errors import EnvironmentFailedError, RlmetaError, SettingError

_FIRST_WARNING = 30.0
"""Seconds of waiting until the first warning, at most; further ones follow after twice the time, four times, ..."""

_QUICK = 3.0
"""Seconds of waiting after which Ctrl-C interrupts it at once."""

_PATIENCE = 2.0
"""Seconds in which workers may close their environments before they are killed."""

_SHORT_PATIENCE = 0.5
"""Seconds in which workers may close their environments after Ctrl-C."""

_ORPHANED = 1.0
"""Seconds in which a worker without a parent may close its environments."""

_STUCK = 1.0
"""Further seconds after which such a worker is killed."""


class WorkerRows:
    """R live environments in worker processes, with the interface of `Rows`.

    The template is sent by cloudpickle: code of the main program is sent by value, and the main program is not imported
    again; code of modules is imported in the worker. torch has one thread there. A guard process, which runs no
    environment code, kills the workers if this process is killed and they do not end by themselves.

    Args:
        template: factory of the environments.
        count: R.
        workers: number of processes, at most R; None takes one per core.
        timeout: seconds that a call of an environment may take before its world fails. After 30 s, or a twentieth of
            this time, a warning names the slow environment, and again in growing intervals.

    Raises:
        SettingError: a wrong count or timeout, or a template that cannot be sent.
        EnvironmentFailedError: the construction of an environment failed in a worker.
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
        blocks = [(context.RawArray("b", max(array.nbytes, 1)), array.shape, array.dtype) for array in like]
        *arrays, self._progress = [_view(*block) for block in blocks]
        leaves = len(self.actions.leaves)
        self.buffers = Buffers.of(arrays[: -leaves - 1])
        self._actions, self._seeds = arrays[-leaves - 1 : -1], arrays[-1]
        bounds = np.linspace(0, count, workers + 1).astype(int).tolist()
        self._slices = list(itertools.pairwise(bounds))
        self._name, self._busy = template.name, False
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self._processes, self._pipes)
        sent = _pack(template)
        try:
            with _fresh_start():
                for worker, (start, stop) in enumerate(self._slices):
                    name = f"worker {worker}, rows {start}-{stop - 1}"
                    self._start(context, name, _work, (sent, worker, (start, stop), blocks))
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
        """Reset the environments of some rows, each with its seed."""
        self._divide("reset", rows, seeds)

    def step(self, actions: Sequence[Array], next_seeds: Array) -> None:
        """Step every environment; see `Rows.step`."""
        for shared, action in zip(self._actions, actions):
            shared[:] = action
        self._seeds[:] = next_seeds
        self._exchange(dict.fromkeys(range(len(self._slices)), ("step",)))

    def replay(self, rows: Sequence[int], seeds: Sequence[int], actions: Sequence[Sequence[Array]]) -> list[bool]:
        """Replay episodes from their seeds and actions; see `Rows.replay`."""
        return self._divide("replay", rows, seeds, actions)

    def close(self) -> None:
        """Close the environments and end the worker processes; those that do not end are killed."""
        self._finalizer()

    def _start(self, context: Any, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True, name=name)
        self._pipes.append(ours)
        process.start()
        self._processes.append(process)
        theirs.close()

    def _divide(self, command: str, rows: Sequence[int], *columns: Sequence[Any]) -> list[Any]:
        """Send each row's arguments to its worker; answers in the order of `rows`."""
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
        """Receive an answer of each worker.

        Raises:
            RlmetaError: the first one of a worker; all workers are closed then.
        """
        answers, failure = [], None
        try:
            for worker in workers:
                answer = self._answer(worker) if failure is None else failure
                failure = failure or (answer if isinstance(answer, RlmetaError) else None)
                answers.append(answer)
        except BaseException:  # Ctrl-C: the slow worker may never answer
            if self._finalizer.detach():
                _stop(os.getpid(), self._processes, self._pipes, _SHORT_PATIENCE)
            raise
        self._busy = False
        if failure is not None:
            self.close()
            raise failure
        return answers

    def _answer(self, worker: int) -> Any:
        """Receive the answer of a worker, or create the error if it died or is too slow."""
        try:
            quick = min(_QUICK, self._first_warning(worker))
            if not self._polls[worker].poll(1000 * quick):
                with _ctrl_c_at_once():
                    self._wait(worker, quick)
            return self._pipes[worker].recv()
        except (EOFError, OSError):
            return self._death(worker)
        except EnvironmentFailedError as error:
            return error

    def _timeout_of(self, worker: int) -> float:
        """Timeout of a worker in seconds, longer before its first call of an environment, when it imports modules."""
        return self._timeout if self._progress[worker, 1] else max(self._timeout, WORKER_TIMEOUT)

    def _first_warning(self, worker: int) -> float:
        """Seconds of waiting for a worker until the first warning."""
        return min(_FIRST_WARNING, self._timeout_of(worker) / 20)

    def _wait(self, worker: int, waited: float) -> None:
        """Wait for the answer of a worker, with warnings that name the slow environment.

        Args:
            worker: its index.
            waited: seconds of waiting so far.

        Raises:
            EnvironmentFailedError: a call has taken longer than the timeout.
        """
        calls = int(self._progress[worker, 1])
        begun, due = time.monotonic() - waited, self._first_warning(worker)
        while True:
            waited, limit = time.monotonic() - begun, self._timeout_of(worker)
            if int(self._progress[worker, 1]) != calls:  # slow perhaps, but it makes progress
                calls = int(self._progress[worker, 1])
                begun, waited, due = time.monotonic(), 0.0, self._first_warning(worker)
            elif waited >= limit:
                raise EnvironmentFailedError(
                    f"{self._place(worker)} has not answered for {waited:.3g} s and was ended: correct it, find where "
                    "it waits with mode='sync', or give it more time by worker_timeout="
                )
            elif waited >= due:
                text = f"{self._place(worker)} has not answered for {waited:.3g} s: waiting up to {limit:.5g} s"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                due *= 2
            pause = min(min(due, limit) - waited, self._first_warning(worker))
            if self._polls[worker].poll(1000 * max(0.001, pause)):
                return

    def _place(self, worker: int) -> str:
        """Description of the environment that a worker is calling."""
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
    """Count the cores that this process may use, in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _view(block: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape))
    return np.frombuffer(block, dtype, size).reshape(shape)


def _stop(owner: int, processes: list[Any], pipes: list[Connection], patience: float = _PATIENCE) -> None:
    if os.getpid() != owner:  # the garbage collection of a forked process must not close the workers of its parent
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
    """Context in which Ctrl-C raises KeyboardInterrupt at once, even if its handler elsewhere only sets a flag."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------- start of workers, in the parent


class _Payload(NamedTuple):
    """State of this process that a worker takes over, and the template."""

    environment: dict[str, str]
    """Environment variables: those of the server process may be older."""
    specs: dict[str, bytes]
    """Pickled specs that are registered with gymnasium and not its own."""
    filters: list[Any]
    """Warning filters."""
    path: list[str]
    """Module search path, with entries for modules of the current folder that a command names."""
    template: bytes
    """Pickled template, which is unpickled after the rest has been set."""


def _pack(template: Template) -> bytes:
    """Pickle the payload that is sent to every worker.

    Raises:
        SettingError: the template cannot be pickled.
    """
    make: Any = template.make
    if isinstance(make, functools.partial) and make.args and isinstance(make.args[0], EnvSpec):
        make = functools.partial(make.func, _with_class(make.args[0]), *make.args[1:], **make.keywords)
    specs: dict[str, bytes] = {}
    for name, spec in gym.registry.items():
        if not str(spec.entry_point).startswith("gymnasium."):
            with contextlib.suppress(Exception):  # a spec that cannot be pickled may not be needed
                specs[name] = cloudpickle.dumps(_with_class(spec))
    try:
        pickled = cloudpickle.dumps(dataclasses.replace(template, make=make))
        path = [entry for entry in sys.path if entry]
        return cloudpickle.dumps(_Payload(dict(os.environ), specs, list(warnings.filters), path, pickled))
    except Exception as error:
        raise SettingError(
            f"{template.name} can't be sent to worker processes ({type(error).__name__}: {error}): put what makes it "
            "into a module, let it refer to nothing that is open or running, or use mode='sync'"
        ) from error


def _with_class(spec: EnvSpec) -> EnvSpec:
    """Replace the name of a class of the main program in a spec by the class, since no worker can import it."""
    point = spec.entry_point
    if isinstance(point, str) and point.startswith("__main__:"):
        own: Any = load_env_creator(point)
        return dataclasses.replace(spec, entry_point=own)
    return spec


def _forget_server() -> None:
    """Reset the fork server in a forked process, where it is no child and multiprocessing would raise."""
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_server)


@contextlib.contextmanager
def _fresh_start() -> Iterator[None]:
    """Context in which processes start without importing the main program, and with this process's search path.

    A main program without a guard would train again if it were imported again; and a server that is started by
    `python -c` would import modules from the current folder first, whoever's files are there.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    main = sys.modules["__main__"]
    folders = [entry for entry in sys.path if entry and not entry.startswith(user_modules.PREFIX)]
    variables = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(folders)}
    before = {name: os.environ.get(name) for name in variables}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else Ctrl-C ends the server as it imports
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(variables)
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


def _work(payload: bytes, worker: int, part: tuple[int, int], blocks: list[Any], pipe: Connection) -> None:
    """Main function of a worker process: runs its rows until it is closed or its parent has ended.

    Args:
        payload: pickled `_Payload`.
        worker: its index.
        part: first row and end of its rows.
        blocks: shared memory, with shape and dtype.
        pipe: to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which closes this worker
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `_fresh_start` blocked it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    start, stop = part
    rows: Rows | None = None
    name = "an environment"
    try:
        *arrays, progress = [_view(*block) for block in blocks]
        arrays = [array[start:stop] for array in arrays]
        template = _unpack(payload)
        name = template.name
        leaves = len(Layout(template.action_space, "action").leaves)
        actions, seeds = arrays[-leaves - 1 : -1], arrays[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parent has created an environment too, and shown its warnings
            own, called = Buffers.of(arrays[: -leaves - 1]), memoryview(progress[worker])
            rows = Rows(template, stop - start, own, called, start)
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
                warnings.simplefilter("ignore")  # the parent has closed an environment too, and shown its warnings
                rows.close()


def _commands(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    """Receive commands of the parent, until it sends "close" or has ended."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        if message[0] == "close":
            return
        yield message


def _unpack(payload: bytes) -> Template:
    """Set the state of the parent process, and unpickle the template."""
    parent: _Payload = pickle.loads(payload)
    os.environ.clear()
    os.environ.update(parent.environment)
    warnings.filters[:] = parent.filters  # type: ignore[index]
    user_modules.inherit(parent.path)
    for name, spec in parent.specs.items():
        if name not in gym.registry:
            with contextlib.suppress(Exception):
                gym.registry[name] = pickle.loads(spec)
    template: Template = pickle.loads(parent.template)
    return template


def _end_with_parent() -> None:
    """End this process after its parent has ended, even if a call of an environment never returns."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(_ORPHANED)  # in this time a worker that waits for a command closes its environments
    os._exit(1)


def _guard(workers: list[int], pipe: Connection) -> None:
    """Main function of the guard process, which kills workers that outlive their parent.

    A worker watches its parent in a thread, which cannot run while compiled code holds the interpreter's lock.

    Args:
        workers: their process ids.
        pipe: from the parent, which sends "close" if it ends them itself.
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
        workers = [pid for pid in workers if _exists(pid)]  # the id of an ended worker may soon be reused
    for pid in workers:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _exists(pid: int) -> bool:
    """Whether a process exists; the server reaps ended ones."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _report(error: BaseException, name: str, start: int, stop: int) -> BaseException:
    """Prepare an error for the parent, with the traceback as a note, since causes are not pickled."""
    known = isinstance(error, RlmetaError) and type(error).__module__ == RlmetaError.__module__
    report = error if known else failures.failed(name, error)
    if report is not error or error.__cause__ is not None:
        report.add_note(f"in the worker process of rows {start} to {stop - 1}:\n{traceback.format_exc()}")
    return report
