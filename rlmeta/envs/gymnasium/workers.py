"""Live gymnasium environments divided over worker processes, with observations and actions in shared memory."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import numpy as np

from rlmeta.data.spaces import Array, Layout
from rlmeta.envs.gymnasium.rows import Buffers, Rows, Template
from rlmeta.errors import EnvironmentFailedError, RlmetaError, SettingError

_PATIENCE = 2.0
"""Seconds that a worker gets to close its environments before it is killed."""


class WorkerRows:
    """R live environments in worker processes; the same as `Rows` otherwise.

    A program whose platform starts processes afresh (Windows, macOS, any from Python 3.14 on) must guard its top level
    with `if __name__ == "__main__":`, as always with multiprocessing.

    Args:
        template: how to make one.
        count: R.
        workers: how many processes; None takes one a core. Never more than R.
        start_method: "fork", "spawn" or "forkserver"; None takes the platform's.
    """

    def __init__(
        self, template: Template, count: int, workers: int | None = None, start_method: str | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise SettingError(f"workers is {workers}, expected at least 1")
        context: Any = multiprocessing.get_context(start_method)
        workers = min(count, workers or _cores())
        self.observations, self.actions = Layout(template.observation_space), Layout(template.action_space, "action")
        like = [
            *Buffers.allocate(self.observations, count).arrays(),
            *(np.zeros((count, *leaf.shape), leaf.dtype) for leaf in self.actions.leaves),
            np.zeros(count, np.int64),
        ]
        memory = [(context.RawArray("b", max(array.nbytes, 1)), array.shape, array.dtype) for array in like]
        arrays = [_view(*block) for block in memory]
        leaves = len(self.actions.leaves)
        self.buffers = Buffers.of(arrays[: -leaves - 1])
        self._actions, self._seeds = arrays[-leaves - 1 : -1], arrays[-1]
        bounds = np.linspace(0, count, workers + 1).astype(int).tolist()
        self._slices = list(itertools.pairwise(bounds))
        self._name, self._busy = template.name, False
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self._processes, self._pipes)
        pickled = cloudpickle.dumps(template)
        try:
            for start, stop in self._slices:
                ours, theirs = context.Pipe()
                arguments = (pickled, start, stop, memory, theirs, ours)
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"rows {start}-{stop - 1}")
                self._pipes.append(ours)
                process.start()
                self._processes.append(process)
                theirs.close()
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
        for worker in workers:
            try:
                answer = self._pipes[worker].recv()
            except (EOFError, OSError):
                answer = self._death(worker)
            failure = failure or (answer if isinstance(answer, RlmetaError) else None)
            answers.append(answer)
        self._busy = False
        if failure is not None:
            self.close()
            raise failure
        return answers

    def _death(self, worker: int) -> EnvironmentFailedError:
        process, (start, stop) = self._processes[worker], self._slices[worker]
        process.join(1.0)
        return EnvironmentFailedError(
            f"the worker process of {self._name}, rows {start} to {stop - 1}, died with exit code {process.exitcode}: "
            f"run with mode='sync' to see where"
        )


def _cores() -> int:
    """How many this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _view(block: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape))
    return np.frombuffer(block, dtype, size).reshape(shape)


def _stop(owner: int, processes: list[Any], pipes: list[Connection]) -> None:
    if os.getpid() != owner:  # a forked copy that is collected must not close the original's workers
        return
    for pipe in pipes:
        with contextlib.suppress(OSError, ValueError):
            pipe.send(("close",))
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    for pipe in pipes:
        pipe.close()


def _work(template: bytes, start: int, stop: int, memory: list[Any], pipe: Connection, other_end: Connection) -> None:
    """What a worker process runs: rows `start` to `stop` - 1, until it is told to close or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes us
    other_end.close()  # else a dead parent would never be noticed
    rows: Rows | None = None
    try:
        arrays = [_view(*block)[start:stop] for block in memory]
        made: Template = cloudpickle.loads(template)
        leaves = len(Layout(made.action_space, "action").leaves)
        actions, seeds = arrays[-leaves - 1 : -1], arrays[-1]
        rows = Rows(made, stop - start, Buffers.of(arrays[: -leaves - 1]))
        pipe.send(None)
        while True:
            command, *arguments = pipe.recv()
            if command == "close":
                break
            if command == "step":
                # a copy, because an environment may keep its last action and shared memory is overwritten
                rows.step([action.copy() for action in actions], seeds)
                pipe.send(None)
            else:
                pipe.send(getattr(rows, command)(*arguments))
    except EOFError:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(_report(error, made.name if "made" in locals() else "an environment", start, stop))
    finally:
        if rows is not None:
            with contextlib.suppress(Exception):
                rows.close()


def _report(error: Exception, name: str, start: int, stop: int) -> RlmetaError:
    if isinstance(error, RlmetaError):
        return error
    return EnvironmentFailedError(
        f"{name} failed in the worker process of rows {start} to {stop - 1} with {type(error).__name__}: {error}\n"
        f"{traceback.format_exc()}"
    )
