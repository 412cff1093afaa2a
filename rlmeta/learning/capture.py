"""A pure function of tensors, recorded once and replayed without Python.

For small networks most of a gradient step is Python and autograd's bookkeeping. What is recorded is the very sequence
of tensor operations, so a replay gives the same bits; that is checked, with other numbers than those of the recording,
before the first one is used.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.jit.frontend import FrontendError

from rlmeta.functional import tree
from rlmeta.learning.passes import split, without_idle, without_writes, written_over
from rlmeta.learning.tape import LooksAtValues, Place, Tape, record

Function = Callable[[tree.Tree], tree.Tree]
"""From a nested dictionary of tensors to one. It may depend on nothing else that changes, and not on their values."""

WARM_UP = 30
"""Calls before a function is recorded: recording takes about as long as a few hundred of them."""

_CHECKS = 3
"""Calls that a recording must answer as the function does; it is optimised within them."""

_NO_SOURCE = (
    "rlmeta's own source has changed or is not there ({}): this run goes on, slower, without recorded operations"
)
"""TorchScript reads a loop's source when the first is recorded, which may be late in a run."""

_RECORDING = threading.Lock()
"""Recorders keep notes of their own, one for all threads."""


class Capture:
    """Calls functions, and replays those that were called often with tensors of the same names and layouts."""

    def __init__(self, warm_up: int | None = None) -> None:
        self._warm_up = WARM_UP if warm_up is None else warm_up
        self._calls: Counter[Hashable] = Counter()
        self._programs: dict[Hashable, _Program | None] = {}

    def __call__(self, name: Hashable, function: Function, inputs: tree.Tree) -> tree.Tree:
        """`function(inputs)`, without a graph of autograd's.

        Args:
            name: tells functions apart; calls under one name must be of the same function.
            function: see `Function`.
            inputs: the tensors it depends on.
        """
        key, leaves = _key(name, inputs)
        program = self._programs.get(key)
        if program is not None and program.checks >= _CHECKS:
            return program(leaves)
        if key not in self._programs and self._ready(key, 1):
            expected, self._programs[key] = _recorded(function, inputs, _once)
            return expected
        expected = function(inputs)
        if program is not None:
            self._check(key, program, leaves, expected)
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
            name: tells functions apart; calls under one name must be of the same function.
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
        program = self._programs.get(key)
        if program is not None and program.checks < _CHECKS:
            few = min(times, 2)
            program = self._check(key, program, [*leaves, few], _in_turn(function, carried, fixed, each, few, axis))
        if program is None:
            if key not in self._programs and self._ready(key, times):
                first = {"carried": carried, "fixed": fixed, "each": tree.map(lambda x: x[0], each)}
                _, self._programs[key] = _recorded(function, first, partial(_scan, first, axis))
            found = _in_turn(function, carried, fixed, each, times, axis)
        else:
            found = program([*leaves, times])
        return found["carried"], found["row"]

    def _ready(self, key: Hashable, calls: int) -> bool:
        self._calls[key] += calls
        return self._calls[key] >= self._warm_up

    def _check(self, key: Hashable, program: _Program, given: Sequence[Any], expected: tree.Tree) -> _Program | None:
        """The program where it gives what the function gave, bit for bit; otherwise it is dropped."""
        program.checks += 1
        pairs = zip(tree.leaves(program(given)), tree.leaves(expected))
        if not all(_equal(a, b) for a, b in pairs):
            self._programs[key] = None
        return self._programs[key]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same; what is NaN in both is."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _key(name: Hashable, inputs: tree.Tree) -> tuple[Hashable, list[Tensor]]:
    """What tells recordings apart, and the leaves of the inputs."""
    leaves: list[Tensor] = []
    _gather_leaves(inputs, leaves)
    return (name, *[(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves]), leaves


def _gather_leaves(inputs: tree.Tree, found: list[Tensor]) -> None:
    """`tree.leaves`, in half the time."""
    for value in inputs.values():
        if isinstance(value, dict):
            _gather_leaves(value, found)
        else:
            found.append(value)


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


class _Program:
    """A recorded function."""

    def __init__(self, run: _Run, outputs: tree.Tree) -> None:
        self._run, self._outputs = run, tree.map(lambda _: None, outputs)
        self.checks = 0
        """How often it gave what the function gave."""

    def __call__(self, given: Sequence[Any]) -> tree.Tree:
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):
            found = iter(self._run(given))
        return tree.map(lambda _: next(found), self._outputs)


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
"""What need not be asked about every operation of a replay."""
for _key_of_autograd in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
    _AUTOGRAD = _AUTOGRAD | torch._C.DispatchKeySet(_key_of_autograd)


def _recorded(
    function: Function, inputs: tree.Tree, build: Callable[[Tape, Sequence[Tensor]], _Run | None]
) -> tuple[tree.Tree, _Program | None]:
    """What the function gives, and the function as a program, or None where it can't be one."""
    with _RECORDING:
        try:
            found, tape = record(function, inputs)
        except LooksAtValues:
            return function(inputs), None
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the tracer about itself
                run = build(without_idle(without_writes(tape)), list(tree.leaves(inputs)))
        except RuntimeError:  # an operation that can't be recorded
            run = None
        except (OSError, FrontendError) as error:
            warnings.warn(_NO_SOURCE.format(str(error).splitlines()[0]), RuntimeWarning, stacklevel=2)
            run = None
    return found, None if run is None else _Program(run, found)


def _traced(tape: Tape, examples: Sequence[Tensor]) -> Any:
    """The tape as a program from the list of its inputs to that of its outputs."""
    return torch.jit.trace(tape.play, (list(examples),), check_trace=False)  # type: ignore[no-untyped-call]


def _once(tape: Tape, leaves: Sequence[Tensor]) -> _Run:
    """A call of the function."""
    constants, rest = split(tape, ())
    rest = rest.with_constants(constants.play(leaves))
    return _traced(written_over(rest), leaves)


def _scan(first: tree.Tree, axis: int, tape: Tape, leaves: Sequence[Tensor]) -> _Run | None:
    """A loop of calls.

    What depends on fixed inputs alone is computed before the loop, carried tensors are written over where the call that
    changes them was the last to read them, and views of those are made before the loop, too.
    """
    carried, fixed = (len(list(tree.leaves(first[name]))) for name in ("carried", "fixed"))
    old, new = tape.inputs[:carried], [x for x in tape.outputs[:carried] if isinstance(x, Place)]
    if [tape.layouts[x] for x in old] != [tape.layouts[x] for x in new]:
        return None
    known = tape.inputs[carried : carried + fixed]
    before, body = split(tape, [*known, *(x for x, y in zip(old, new) if x == y)])
    ends = Counter(tape.memory[x] for x in (*tape.inputs, *tape.outputs) if isinstance(x, Place))
    body = written_over(body, [x for x, y in zip(old, new) if ends[tape.memory[y]] == 1])
    in_place = [x for x, y in zip(old, new) if body.memory[x] == body.memory[y]]
    views, body = split(body, in_place, views_of=in_place)
    operations = (*before.operations, *views.operations)
    outputs = body.inputs[len(tape.inputs) :] or tape.inputs[:1]  # a program has to give something
    start = replace(before, operations=operations, outputs=outputs)
    start_leaves = [leaf.clone() for leaf in leaves]
    start_program = _traced(start, start_leaves)
    program = _looped(start_program, _traced(body, [*start_leaves, *start_program(start_leaves)]))

    def run(given: Sequence[Any]) -> Sequence[Tensor]:
        *found, times = given
        ends = carried, carried + fixed
        lists = found[: ends[0]], found[ends[0] : ends[1]], found[ends[1] :]
        return program(*lists, times, len(tape.outputs) - carried, axis)

    return run


def _looped(start: Any, body: Any) -> Any:
    """The loop around a body, which gets the carried tensors, the fixed ones, its own, and what `start` computed."""

    def loop(
        carried: list[Tensor], fixed: list[Tensor], each: list[Tensor], times: int, width: int, axis: int
    ) -> list[Tensor]:
        carried = [x.clone() for x in carried]
        known = start(carried + fixed + [x[0] for x in each])
        rows: list[Tensor] = []
        for i in range(times):
            found = body(carried + fixed + [x[i] for x in each] + known)
            carried = found[: len(carried)]
            rows += found[len(carried) :]
        return carried + [torch.stack(rows[row::width], axis) for row in range(width)]

    return torch.jit.script(loop)
