"""A pure function of tensors, recorded once and replayed without Python.

For small networks most of a gradient step is Python and autograd's bookkeeping. What is recorded is the very sequence
of tensor operations, so a replay gives the same bits; that is checked, with other numbers than those of the recording,
before the first one is used. What can't be recorded, checked or replayed is called as before, and a warning says why:
to record spares time and nothing else, so no error of it ends a run.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlmeta.engine.backends import Backend, chosen
from rlmeta.engine.passes import split, without_idle, without_writes, written_over
from rlmeta.engine.tape import NotRecordable, Place, Tape, own_memory, record
from rlmeta.functional import tree

Function = Callable[[tree.Tree], tree.Tree]
"""From a nested dictionary of tensors to one. It may depend on nothing else that changes, and not on their values."""

WARM_UP = 30
"""Calls before a function is recorded: recording takes about as long as a few hundred of them."""

_CHECKS = 3
"""Calls that a recording must answer as the function does; it is optimised within them."""

_UNRECORDED = "{}: not recorded, so this run is slower ({})"

_RECORDING = threading.Lock()
"""Recorders keep notes of their own, one for all threads."""


class Capture:
    """Calls functions, and replays those that were called often with tensors of the same names and layouts."""

    def __init__(self, warm_up: int | None = None, backends: Sequence[Backend] | None = None) -> None:
        """Create it with nothing recorded.

        Args:
            warm_up: calls before a function is recorded.
            backends: what plays recordings, in the order in which they are tried; `backends.chosen()` by default.
        """
        self._warm_up = WARM_UP if warm_up is None else warm_up
        self._backends = chosen() if backends is None else tuple(backends)
        self._calls: Counter[Hashable] = Counter()
        self._programs: dict[Hashable, _Program | None] = {}
        self._said: set[tuple[Hashable, str]] = set()

    def __call__(self, name: Hashable, function: Function, inputs: tree.Tree) -> tree.Tree:
        """`function(inputs)`, without a graph of autograd's.

        Args:
            name: tells functions apart; calls under one name must be of the same function. A warning calls the function
                by it, or by its first entry.
            function: see `Function`.
            inputs: the tensors it depends on.
        """
        key, leaves = _key(name, inputs)
        program = self._programs.get(key)
        if program is not None and program.checks >= _CHECKS:
            return self._tried(name, key, partial(program, leaves), partial(function, inputs))
        if key not in self._programs and self._ready(key, 1):
            return self._tried(
                name, key, partial(self._record, key, function, inputs, _once), partial(function, inputs)
            )
        expected = function(inputs)
        if program is not None:
            self._check(name, key, leaves, expected)
        return expected

    def scan(
        self,
        name: Hashable,
        function: Function,
        carried: tree.Tree,
        fixed: tree.Tree,
        each: tree.Tree,
        times: int,
        axis: int = 0,
    ) -> tuple[tree.Tree, tree.Tree]:
        """Calls of a function in a row, each with what the one before it left: as one program, no Python in between.

        Args:
            name: as for a single call.
            function: from `{"carried": ..., "fixed": ..., "each": ...}` to `{"carried": ..., "row": ...}`.
            carried: what the first call gets.
            fixed: what all of them get.
            each: every leaf `[times, ...]`, of which each call gets its own.
            times: how many calls, 1 or more.
            axis: of the rows, along which the calls are stacked.

        Returns:
            What the last call left, and the rows of all, stacked.
        """
        key, leaves = _key((name, "scan", axis), {"carried": carried, "fixed": fixed, "each": each})

        def in_turn(times: int = times) -> tree.Tree:
            return _in_turn(function, carried, fixed, each, times, axis)

        def recorded() -> tree.Tree:
            first = {"carried": tree.map(torch.clone, carried), "fixed": fixed, "each": tree.map(lambda x: x[0], each)}
            self._record(key, function, first, partial(_scan, axis))
            return in_turn()

        if key not in self._programs and self._ready(key, times):
            found = self._tried(name, key, recorded, in_turn)
            return found["carried"], found["row"]
        program = self._programs.get(key)
        if program is not None and program.checks < _CHECKS:
            few = min(times, 2)
            self._check(name, key, [*leaves, few], in_turn(few))
            program = self._programs[key]
        if program is None:
            found = in_turn()
        else:
            found = self._tried(name, key, partial(program, [*leaves, times]), in_turn)
        return found["carried"], found["row"]

    def operations(self) -> dict[str, int]:
        """How many operations are in the recordings that are in use, by the function's name; the largest of a name."""
        counts: dict[str, int] = {}
        for key, program in self._programs.items():
            name: Any = key
            while isinstance(name, tuple):
                name = name[0]
            if program is not None:
                counts[name] = max(counts.get(name, 0), program.operations)
        return counts

    def _ready(self, key: Hashable, calls: int) -> bool:
        self._calls[key] += calls
        return bool(self._backends) and self._calls[key] >= self._warm_up

    def _record(self, key: Hashable, function: Function, inputs: tree.Tree, build: _Build) -> tree.Tree:
        """What the function gives; its program is kept."""
        with _RECORDING:
            found, tape = record(function, inputs)
            short, examples = without_idle(without_writes(tape)), tree.map(own_memory, inputs)
            builds = [partial(build, backend, short, examples, found) for backend in self._backends]
            self._programs[key] = _first_program(builds, found)
            self._programs[key].operations = len(short.operations)  # type: ignore[union-attr]
        return found

    def _tried(self, name: Hashable, key: Hashable, work: Callable[[], Any], instead: Callable[[], Any]) -> Any:
        """What the work with a program gives; where it fails there is no program any more, and something else is done.

        An error of the function's own is raised by what is done instead.
        """
        try:
            return work()
        except Exception as error:
            self._programs[key], reason = None, _reason(error)
        found = instead()
        self._say(name, reason)
        return found

    def _check(self, name: Hashable, key: Hashable, given: Sequence[Any], expected: tree.Tree) -> None:
        """Compare a program with what the function gave; where they differ, the next backend's takes its place."""
        program = self._programs[key]
        while program is not None:
            try:
                program.check(given, expected)
                return
            except Exception as error:
                reason = _reason(error)
            try:
                with _RECORDING:
                    operations = program.operations
                    program = _first_program(program.others, program.outputs)
                    program.operations = operations
            except Exception:
                program = None
            self._programs[key] = program
        self._say(name, reason)

    def _say(self, name: Hashable, reason: str) -> None:
        """Warn once that something is not recorded."""
        what = name[0] if isinstance(name, tuple) else name
        if (what, reason) not in self._said:
            self._said.add((what, reason))
            warnings.warn(_UNRECORDED.format(what, reason), RuntimeWarning, stacklevel=4)


def _reason(error: Exception) -> str:
    """Why something can't be recorded, on one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if isinstance(error, NotRecordable) else f"{type(error).__name__}: {lines[-1]}"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same; what is NaN in both is."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _key(name: Hashable, inputs: tree.Tree) -> tuple[Hashable, list[Tensor]]:
    """What tells recordings apart, and the leaves of the inputs, in the order of `tree.leaves`."""
    form: list[Hashable] = [name]
    leaves: list[Tensor] = []
    _gather_leaves(inputs, form, leaves)
    return tuple(form), leaves


def _gather_leaves(inputs: tree.Tree, form: list[Hashable], leaves: list[Tensor]) -> None:
    names = sorted(inputs)
    form.append(tuple(names))
    for name in names:
        value = inputs[name]
        if isinstance(value, dict):
            _gather_leaves(value, form, leaves)
        else:
            form.append((value.shape, value.stride(), value.dtype, value.device))
            leaves.append(value)


def _in_turn(
    function: Function, carried: tree.Tree, fixed: tree.Tree, each: tree.Tree, times: int, axis: int
) -> tree.Tree:
    """`Capture.scan`, call by call."""
    rows = []
    for number in range(times):
        now = tree.map(lambda x: x[number], each)  # noqa: B023 - used at once
        found = function({"carried": carried, "fixed": fixed, "each": now})
        carried = found["carried"]
        rows.append(found["row"])
    return {"carried": carried, "row": tree.map(lambda *steps: torch.stack(steps, axis), *rows)}


# ---------------------------------------------------------------------- the programs

_Run = Callable[[Sequence[Any]], Sequence[Tensor]]
_Build = Callable[[Backend, Tape, tree.Tree, tree.Tree], _Run]
"""From a backend, a tape, copies of its inputs and what it gave."""


class _Program:
    """A recorded function."""

    def __init__(self, run: _Run, outputs: tree.Tree, others: Sequence[Callable[[], _Run]] = ()) -> None:
        self._run, self._numbers = run, tree.rebuild(outputs, itertools.count())
        self.outputs, self.others = outputs, others
        """What the function gave, and how other backends make a program: kept until this one has been checked."""
        self.checks = self.operations = 0
        """How often it gave what the function gave; how many operations it has."""

    def __call__(self, given: Sequence[Any]) -> tree.Tree:
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):
            found = self._run(given)
        return tree.map(found.__getitem__, self._numbers)

    def check(self, given: Sequence[Any], expected: tree.Tree) -> None:
        """Compare with what the function gave, bit for bit.

        Raises:
            NotRecordable: they differ.
        """
        if not all(_equal(a, b) for a, b in zip(tree.leaves(self(given)), tree.leaves(expected), strict=True)):
            raise NotRecordable("what was recorded gives other numbers when it is called again")
        self.checks += 1
        if self.checks == _CHECKS:
            self.outputs, self.others = {}, ()


def _first_program(builds: Sequence[Callable[[], _Run]], outputs: tree.Tree) -> _Program:
    """The program of the first backend that makes one.

    Raises:
        Exception: none does; what the last one said.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer about itself, and of torch about the tracer
        for number, build in enumerate(builds):
            try:
                return _Program(build(), outputs, builds[number + 1 :])
            except Exception:
                if number + 1 == len(builds):
                    raise
    raise NotRecordable("there is no backend")


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
"""What need not be asked about every operation of a replay."""
for _key_of_autograd in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
    _AUTOGRAD = _AUTOGRAD | torch._C.DispatchKeySet(_key_of_autograd)


def _once(backend: Backend, tape: Tape, examples: tree.Tree, found: tree.Tree) -> _Run:
    """A call of the function."""
    leaves = list(tree.leaves(examples))
    constants, rest = split(tape, ())
    rest = rest.with_constants(constants.play(leaves))
    program = backend.compile(written_over(rest), leaves)
    return lambda given: program(list(given))


def _scan(axis: int, backend: Backend, tape: Tape, examples: tree.Tree, found: tree.Tree) -> _Run:
    """A loop of calls; inputs come as `tree.leaves` has them: carried, each, fixed.

    What depends on fixed inputs alone is computed before the loop, carried tensors are written over where the call that
    changes them was the last to read them, and views of those are made before the loop, too.
    """
    leaves = list(tree.leaves(examples))
    carried, each = (len(list(tree.leaves(examples[name]))) for name in ("carried", "each"))
    old, new = tape.inputs[:carried], [x for x in tape.outputs[:carried] if isinstance(x, Place)]
    same_names = tree.flatten(examples["carried"]).keys() == tree.flatten(found["carried"]).keys()
    if not same_names or [tape.layouts[x] for x in old] != [tape.layouts[x] for x in new]:
        raise NotRecordable("what one call leaves for the next has other names, shapes, types or strides than it got")
    known = tape.inputs[carried + each :]
    before, body = split(tape, [*known, *(x for x, y in zip(old, new) if x == y)])
    ends = Counter(tape.memory[x] for x in (*tape.inputs, *tape.outputs) if isinstance(x, Place))
    body = written_over(body, [x for x, y in zip(old, new) if ends[tape.memory[y]] == 1])
    in_place = [x for x, y in zip(old, new) if body.memory[x] == body.memory[y]]
    views, body = split(body, in_place, views_of=in_place)
    operations = (*before.operations, *views.operations)
    outputs = body.inputs[len(tape.inputs) :] or tape.inputs[:1]  # a program has to give something
    start = replace(before, operations=operations, outputs=outputs)
    start_program = backend.compile(start, leaves)
    program = backend.loop(start_program, backend.compile(body, [*leaves, *start_program(leaves)]))

    def run(given: Sequence[Any]) -> Sequence[Tensor]:
        *found, times = given
        lists = found[:carried], found[carried : carried + each], found[carried + each :]
        return program(*lists, times, len(tape.outputs) - carried, axis)

    return run
