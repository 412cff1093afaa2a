"""Capture: a pure function of tensors, recorded once and replayed without Python.

For small networks most of a gradient step is Python and autograd's bookkeeping. What is recorded is the very sequence
of tensor operations, so a replay gives the same bits; that is checked, with other numbers than those of the recording,
before the first one is used. What can't be recorded, checked or replayed is called as before, and a warning says why:
to record spares time and nothing else, so no error of it ends a run.

Where Python looks at a number in a tensor, as in `if mask.any()`, the recording holds for that number alone: it is
guarded. A replay that meets another number is thrown away and the function called; if that happens often, the function
is recorded once more, for the other number.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlmeta.engine.backends import Backend, Program, chosen
from rlmeta.engine.passes import batched, direct_views, split, without_idle, without_writes, written_over
from rlmeta.engine.tape import ALIGNED, LOOKED_AT, Guard, NotRecordable, Place, Tape, own_memory, record
from rlmeta.functional import tree

Function = Callable[[tree.Tree], tree.Tree]
"""From a nested dictionary of tensors to one. It may depend on nothing else that changes."""

WARM_UP = 30
"""Calls before a function is recorded: recording takes about as long as a few hundred of them."""

_CHECKS = 3
"""Calls that a recording must answer as the function does; it is optimised within them."""

_VARIANTS = 4
"""Recordings of a function that are kept, each for other guarded numbers."""

_VARIANT_WARM_UP = 5
"""Calls that meet other guarded numbers before the function is recorded for those, too."""

_WASTE = 100
"""Replays thrown away, beyond those of use, before a function is not recorded any more."""

_RECORDING_COSTS = 10
"""Replays that a further recording counts for."""

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
        self._programs: dict[Hashable, list[_Program] | None] = {}
        self._waste: Counter[Hashable] = Counter()
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
        replayed = self._replay(name, key, leaves)
        if replayed is not None:
            return replayed
        if self._unchecked(key) is None and self._ready(key, 1):
            return self._tried(
                name, key, partial(self._record, name, key, function, inputs, _once), partial(function, inputs)
            )
        expected = function(inputs)
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

        def recorded() -> None:
            first = {"carried": tree.map(torch.clone, carried), "fixed": fixed, "each": tree.map(lambda x: x[0], each)}
            self._record(name, key, function, first, partial(_scan, axis, list(tree.leaves(each))))

        outputs = self._replay(name, key, [*leaves, times])
        if outputs is None and self._unchecked(key) is None and self._ready(key, times):
            outputs = self._tried(name, key, recorded, in_turn)
        if outputs is None and self._unchecked(key) is not None:
            few = min(times, 2)
            if self._check(name, key, [*leaves, few], in_turn(few)):
                outputs = self._replay(name, key, [*leaves, times], checks=1)
        outputs = in_turn() if outputs is None else outputs
        return outputs["carried"], outputs["row"]

    def refuse(self, name: str, reason: str) -> None:
        """Warn once that a function is not recorded."""
        self._say(name, reason)

    def operations(self) -> dict[str, int]:
        """How many operations are in the recordings that are in use, by the function's name; the largest of a name."""
        counts: dict[str, int] = {}
        for key, programs in self._programs.items():
            name: Any = key
            while isinstance(name, tuple):
                name = name[0]
            for program in programs or ():
                counts[name] = max(counts.get(name, 0), program.operations)
        return counts

    def _ready(self, key: Hashable, calls: int) -> bool:
        """Whether to record now, after so many more calls that no recording holds for."""
        self._calls[key] += calls
        programs = self._programs.get(key, [])
        enough = min(self._warm_up, _VARIANT_WARM_UP) if programs else self._warm_up
        return bool(self._backends) and self._calls[key] >= enough and programs is not None

    def _unchecked(self, key: Hashable) -> _Program | None:
        """The program that is to be compared with the function before it is used."""
        programs = self._programs.get(key) or ()
        return next((program for program in programs if program.checks < _CHECKS), None)

    def _replay(self, name: Hashable, key: Hashable, inputs: Sequence[Any], checks: int = _CHECKS) -> tree.Tree | None:
        """What the program gives that has been checked so often and whose guards hold; None where there is none."""
        programs, missed = self._programs.get(key), list[_Miss]()
        for program in tuple(programs or ()):
            if program.checks < checks or not all(program.may_hold_after(miss) for miss in missed):
                continue
            try:
                outputs = program(inputs)
            except Exception as error:
                self._drop(name, key, _reason(error))
                return None
            if not isinstance(outputs, _Miss):
                self._waste[key] = max(0, self._waste[key] - 1)
                _move_to_front(programs, program)
                return outputs
            missed.append(outputs)
        if missed:
            self._lose(name, key, len(missed))
        return None

    def _lose(self, name: Hashable, key: Hashable, replays: int) -> None:
        """Count replays' worth of time that brought nothing, and give up where that is most of them."""
        self._waste[key] += replays
        if self._waste[key] > _WASTE:
            self._drop(name, key, LOOKED_AT + ", and they change too often")

    def _drop(self, name: Hashable, key: Hashable, reason: str) -> None:
        self._programs[key] = None
        self._say(name, reason)

    def _record(self, name: Hashable, key: Hashable, function: Function, inputs: tree.Tree, build: _Build) -> tree.Tree:
        """What the function gives; its program is kept."""
        with _RECORDING:
            outputs, tape, guards = record(function, inputs)
            short, examples = without_idle(without_writes(tape)), tree.map(own_memory, inputs)
            builds = [partial(build, backend, short, examples, outputs) for backend in self._backends]
            program = _first_program(builds, outputs, guards)
        others = self._programs.get(key) or []
        self._programs[key], self._calls[key] = [program, *others][:_VARIANTS], 0
        if others:
            self._lose(name, key, _RECORDING_COSTS)
        return outputs

    def _tried(self, name: Hashable, key: Hashable, work: Callable[[], Any], instead: Callable[[], Any]) -> Any:
        """What the work with a program gives; where it fails there is no program any more, and something else is done.

        An error of the function's own is raised by what is done instead.
        """
        try:
            return work()
        except Exception as error:
            self._programs[key], reason = None, _reason(error)
        outputs = instead()
        self._say(name, reason)
        return outputs

    def _check(self, name: Hashable, key: Hashable, inputs: Sequence[Any], expected: tree.Tree) -> bool:
        """Compare the newest program with what the function gave; where they differ, the next backend's takes its
        place.

        Returns:
            Whether there is a program, and it gave the same.
        """
        program = self._unchecked(key)
        while program is not None:
            try:
                agrees = program.check(inputs, expected)
                if not agrees:
                    self._lose(name, key, 1)
                return agrees
            except Exception as error:
                reason = _reason(error)
            programs = self._programs[key]
            assert programs is not None
            place = programs.index(program)
            try:
                with _RECORDING:
                    program = programs[place] = program.of_next_backend()
            except Exception:
                self._drop(name, key, reason)
                return False
        return False

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
        outputs = function({"carried": carried, "fixed": fixed, "each": now})
        carried = outputs["carried"]
        rows.append(outputs["row"])
    return {"carried": carried, "row": tree.map(lambda *steps: torch.stack(steps, axis), *rows)}


# ---------------------------------------------------------------------- the programs

_Run = Callable[[Sequence[Any]], Sequence[Tensor]]


class _Built(NamedTuple):
    """What plays a recording."""

    run: _Run
    operations: int
    """How many of them a call takes."""


_Build = Callable[[Backend, Tape, tree.Tree, tree.Tree], _Built]
"""From a backend, a tape, copies of its inputs and what it gave."""


class _Miss(NamedTuple):
    """A guard that did not hold in a replay."""

    held: tuple[Guard, ...]
    """The guards before it, which held."""
    number: Guard
    """What Python would have seen."""


class _Program:
    """A recorded function."""

    def __init__(
        self, built: _Built, outputs: tree.Tree, guards: Sequence[Guard], others: Sequence[Callable[[], _Built]] = ()
    ) -> None:
        self._run, self._numbers = built.run, tree.rebuild(outputs, itertools.count())
        self._count, self._guards = len(list(tree.leaves(outputs))), tuple(guards)
        self._outputs, self._others = outputs, others  # kept until this program has been checked
        self.checks, self.operations = 0, built.operations
        """How often it gave what the function gave; how many operations it has."""

    def __call__(self, inputs: Sequence[Any]) -> tree.Tree | _Miss:
        """What the function gives, or the first guard that does not hold."""
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):
            outputs = self._run(inputs)
            for number, (numbers, guard) in enumerate(zip(outputs[self._count :], self._guards, strict=True)):
                differs = numbers == numbers if guard != guard else numbers != guard
                if bool(differs.any()):
                    return _Miss(self._guards[:number], numbers[differs][0].item())
        return tree.map(outputs.__getitem__, self._numbers)

    def may_hold_after(self, miss: _Miss) -> bool:
        """Whether this program's guards may hold for inputs for which another's did not: up to there both see the
        same numbers."""
        place = len(miss.held)
        return self._guards[:place] == miss.held and self._guards[place : place + 1] == (miss.number,)

    def check(self, inputs: Sequence[Any], expected: tree.Tree) -> bool:
        """Compare with what the function gave, bit for bit; False where a guard does not hold, so nothing is compared.

        Raises:
            NotRecordable: they differ.
        """
        outputs = self(inputs)
        if isinstance(outputs, _Miss):
            return False
        if not all(_equal(a, b) for a, b in zip(tree.leaves(outputs), tree.leaves(expected), strict=True)):
            raise NotRecordable("what was recorded gives other numbers when it is called again")
        self.checks += 1
        if self.checks == _CHECKS:
            self._outputs, self._others = {}, ()
        return True

    def of_next_backend(self) -> _Program:
        """The same function played by the next backend that can.

        Raises:
            Exception: none can.
        """
        return _first_program(self._others, self._outputs, self._guards)


def _move_to_front(programs: list[_Program] | None, program: _Program) -> None:
    if programs is not None and programs[0] is not program:
        programs.remove(program)
        programs.insert(0, program)


def _first_program(builds: Sequence[Callable[[], _Built]], outputs: tree.Tree, guards: Sequence[Guard]) -> _Program:
    """The program of the first backend that makes one.

    Raises:
        Exception: none does; the error of the last one.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer about itself, and of torch about the tracer
        for number, build in enumerate(builds):
            try:
                return _Program(build(), outputs, guards, builds[number + 1 :])
            except Exception:
                if number + 1 == len(builds):
                    raise
    raise NotRecordable("there is no backend")


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
"""What need not be asked about every operation of a replay."""
for _key_of_autograd in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
    _AUTOGRAD = _AUTOGRAD | torch._C.DispatchKeySet(_key_of_autograd)


def _once(backend: Backend, tape: Tape, examples: tree.Tree, outputs: tree.Tree) -> _Built:
    """A call of the function."""
    leaves = list(tree.leaves(examples))
    constants, rest = split(direct_views(tape), ())
    rest = rest.with_constants(constants.play(leaves))
    program = backend.compile(written_over(rest), leaves)
    return _Built(lambda inputs: program(list(inputs)), len(rest.operations))


def _scan(
    axis: int, rows: Sequence[Tensor], backend: Backend, tape: Tape, examples: tree.Tree, outputs: tree.Tree
) -> _Built:
    """A loop of calls; inputs come as `tree.leaves` has them: carried, each, fixed.

    What depends on fixed inputs alone is computed before the loop, what depends on nothing carried for all calls at
    once, carried tensors are written over where the call that changes them was the last to read them, and views of
    those are made before the loop, too.
    """
    leaves = list(tree.leaves(examples))
    carried, each = (len(list(tree.leaves(examples[name]))) for name in ("carried", "each"))
    old, new = tape.inputs[:carried], [x for x in tape.outputs[:carried] if isinstance(x, Place)]
    same_names = tree.flatten(examples["carried"]).keys() == tree.flatten(outputs["carried"]).keys()
    if not same_names or [tape.layouts[x].dense() for x in old] != [tape.layouts[x].dense() for x in new]:
        raise NotRecordable("what one call leaves for the next has other names, shapes, types or strides than it got")
    ahead, tape, own = _ahead(backend, tape, carried, rows, leaves[carried + each :])
    leaves[carried : carried + each] = [x[0] for x in own]
    known = tape.inputs[carried + len(own) :]
    before, body = split(direct_views(tape), [*known, *(x for x, y in zip(old, new) if x == y)])
    ends = Counter(tape.memory[x] for x in (*tape.inputs, *tape.outputs) if isinstance(x, Place))
    body = written_over(body, [x for x, y in zip(old, new) if ends[tape.memory[y]] == 1])
    in_place = [x for x, y in zip(old, new) if body.memory[x] == body.memory[y]]
    views, body = split(body, in_place, views_of=in_place)
    operations = (*before.operations, *views.operations)
    precomputed = body.inputs[len(tape.inputs) :] or tape.inputs[:1]  # a program has to give something
    start = replace(before, operations=operations, outputs=precomputed)
    start_program = backend.compile(start, leaves)
    program = backend.loop(start_program, backend.compile(body, [*leaves, *start_program(leaves)]))

    def run(inputs: Sequence[Any]) -> Sequence[Tensor]:
        *tensors, times = inputs
        first, others, fixed = tensors[:carried], tensors[carried:], tensors[carried + each :]
        return program(first, ahead(others), fixed, times, len(tape.outputs) - carried, axis)

    return _Built(run, len(body.operations))


def _ahead(
    backend: Backend, tape: Tape, carried: int, rows: Sequence[Tensor], fixed: Sequence[Tensor]
) -> tuple[Program, Tape, Sequence[Tensor]]:
    """What a loop's body needs nothing carried for, as a program for all calls at once.

    Args:
        backend: plays the program.
        tape: the body.
        carried: how many of its inputs are carried.
        rows: what every call has of its own, `[times, ...]` each.
        fixed: what all of them get.

    Returns:
        The program, from `rows` and `fixed` to what each call then has of its own; the rest of the body; and what the
        program gives for these.
    """
    first, rest = batched(tape, carried, len(rows))
    own = [number for number, place in enumerate(tape.inputs[carried : carried + len(rows)]) if place in rest.inputs]
    count = len(rows)  # the program is not to keep the rows themselves
    unchanged = lambda inputs: list(inputs[:count]), tape, rows
    if len(first.operations) <= len(first.outputs):  # a row is taken of every output, which costs an operation
        return unchanged
    for_all = torch.func.vmap(lambda *inputs: tuple(first.play(inputs)), (0,) * len(rows) + (None,) * len(fixed))

    def together(inputs: tree.Tree) -> tree.Tree:
        return _numbered([_aligned(x) for x in for_all(*tree.leaves(inputs))])

    inputs = _numbered([*rows, *fixed])
    try:
        outputs, recorded, _ = record(together, inputs)
    except Exception:  # such as a view that exists of the rows of one call, but not of all at once
        return unchanged
    drawn = list(tree.leaves(outputs))
    layouts = [tape.layouts[place] for place in first.outputs if isinstance(place, Place)]
    if [x[0].stride() for x in drawn] != [layout.strides for layout in layouts]:
        return unchanged
    program = _once(backend, without_idle(without_writes(recorded)), inputs, outputs).run
    return lambda inputs: [*(inputs[k] for k in own), *program(inputs)], rest, [*(rows[k] for k in own), *drawn]


def _numbered(tensors: Sequence[Tensor]) -> tree.Tree:
    """As a tree whose leaves are in this order."""
    return {f"{number:06}": x for number, x in enumerate(tensors)}


def _aligned(x: Tensor) -> Tensor:
    """A copy `[times, ...]` every row of which begins where torch would allocate it: bits of what is computed from it
    may depend on that."""
    row = x[0].numel()
    spare = -row % (ALIGNED // x.element_size())
    padded = torch.nn.functional.pad(x.reshape(len(x), row), (0, spare))
    return padded.narrow(1, 0, row).view(x.shape) if x.dim() > 1 else padded.select(1, 0)
