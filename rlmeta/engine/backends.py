"""Backends: execution of a recorded tape of tensor operations, by TorchScript or by generated Python.

`torchscript` is the faster one where it was tested; `torch.jit` is deprecated, may be absent, and refuses some
operations. `python` is straight-line Python made from the tape: it needs nothing but the operations themselves. Both
call the same operations in the same order, so both give the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlmeta.engine.tape import NotRecordable, Operation, Place, Tape
from rlmeta.errors import SettingError

VARIABLE = "RLMETA_BACKEND"
"""Environment variable: `torchscript`, `python` or `none` instead of the first that works."""

Program = Callable[[list[Tensor]], list[Tensor]]
"""From the inputs of a tape to its outputs."""

Loop = Callable[[list[Tensor], list[Tensor], list[Tensor], int, int, int], list[Tensor]]
"""From carried tensors, what each call has of its own `[times, ...]`, fixed ones, the number of calls, how many outputs
of a call are rows, and the axis to stack rows along: to the carried tensors after the last call, and the rows."""


class Backend(Protocol):
    """A way to play tapes."""

    name: str

    def compile(self, tape: Tape, examples: Sequence[Tensor]) -> Program:
        """The tape as a program."""
        ...

    def loop(self, start: Program, body: Program) -> Loop:
        """Calls of `body` in a row: it gets the carried tensors, its own, the fixed ones, and what `start` computed."""
        ...


class TorchScript:
    """`torch.jit`: the loop runs without Python."""

    name = "torchscript"

    def compile(self, tape: Tape, examples: Sequence[Tensor]) -> Program:
        """Traced; the tracer refuses some operations."""
        return torch.jit.trace(tape.play, (list(examples),), check_trace=False)  # type: ignore[no-untyped-call]

    def loop(self, start: Any, body: Any) -> Loop:
        """Scripted: TorchScript reads the source below."""

        def loop(
            carried: list[Tensor], each: list[Tensor], fixed: list[Tensor], times: int, width: int, axis: int
        ) -> list[Tensor]:
            carried = [x.clone() for x in carried]
            known = start(carried + [x[0] for x in each] + fixed)
            rows: list[Tensor] = []
            for i in range(times):
                outputs = body(carried + [x[i] for x in each] + fixed + known)
                carried = outputs[: len(carried)]
                rows += outputs[len(carried) :]
            return carried + [torch.stack(rows[row::width], axis) for row in range(width)]

        try:
            return torch.jit.script(loop)
        except (OSError, torch.jit.frontend.FrontendError) as error:  # it reads the source, which may be late in a run
            reason = str(error).splitlines()[0]
            raise NotRecordable(f"rlmeta's own source has changed or is not there ({reason})") from error


class Python:
    """A generated Python function without a branch."""

    name = "python"

    def compile(self, tape: Tape, examples: Sequence[Tensor]) -> Program:
        """One line an operation; a tensor is let go after the last line that reads it."""
        source = _Source(tape)
        space = dict(source.constants)
        exec(compile("\n".join(source.lines), "<recorded operations>", "exec"), space)
        program: Program = space["play"]
        return program

    def loop(self, start: Program, body: Program) -> Loop:
        """A `for` loop."""

        def loop(
            carried: list[Tensor], each: list[Tensor], fixed: list[Tensor], times: int, width: int, axis: int
        ) -> list[Tensor]:
            carried = [x.clone() for x in carried]
            known, rows = start([*carried, *(x[0] for x in each), *fixed]), list[Tensor]()
            slices = [x.unbind(0) for x in each]
            for i in range(times):
                outputs = body([*carried, *(x[i] for x in slices), *fixed, *known])
                carried = outputs[: len(carried)]
                rows += outputs[len(carried) :]
            return carried + [torch.stack(rows[row::width], axis) for row in range(width)]

        return loop


class _Source:
    """Python source code generated from a recorded tape, and the constants that it names."""

    def __init__(self, tape: Tape) -> None:
        self.constants: dict[str, Any] = {"tensors": lambda outputs: [x for x in outputs if isinstance(x, Tensor)]}
        self.lines = ["def play(inputs):"]
        if tape.inputs:
            names = "".join(f"v{place.number}, " for place in tape.inputs)
            self.lines.append(f"    {names}= inputs[:{len(tape.inputs)}]")
        last: dict[Place, int] = {}
        for number, operation in enumerate(tape.operations):
            last.update((place, number) for place in operation.reads())
        kept = {*tape.inputs, *(x for x in tape.outputs if isinstance(x, Place))}
        for number, operation in enumerate(tape.operations):
            self.lines.append(f"    {self._call(number, operation)}")
            touched = {*operation.reads(), *operation.results} - kept
            dead = sorted(place.number for place in touched if last.get(place, number) == number)
            if dead:
                self.lines.append(f"    del {', '.join(f'v{number}' for number in dead)}")
        self.lines.append(f"    return [{', '.join(self._text(x) for x in tape.outputs)}]")

    def _call(self, number: int, operation: Operation) -> str:
        function = f"f{number}"
        self.constants[function] = getattr(operation.function, "_op", operation.function)
        named = [f"{name}={self._text(value)}" for name, value in operation.named.items()]
        call = f"{function}({', '.join([*map(self._text, operation.arguments), *named])})"
        returns = operation.function._schema.returns
        if len(returns) == 1 and str(returns[0].type) == "Tensor":
            return f"v{operation.results[0].number} = {call}"
        return f"{''.join(f'v{place.number}, ' for place in operation.results)}= tensors({call})"

    def _text(self, x: Any) -> str:
        """An argument in Python's words, or the name of a constant."""
        if isinstance(x, Place):
            return f"v{x.number}"
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._text(value) for value in x)}]"
        if x is None or isinstance(x, bool | int | str) or (isinstance(x, float) and math.isfinite(x)):
            return repr(x)
        name = f"k{len(self.constants)}"
        self.constants[name] = x
        return name


BACKENDS: tuple[Backend, ...] = (TorchScript(), Python())
"""In the order in which they are tried."""


def chosen() -> tuple[Backend, ...]:
    """The backends to try: all, or what the environment variable RLMETA_BACKEND names.

    Raises:
        SettingError: it names none.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        return BACKENDS
    if name != "none" and name not in (backend.name for backend in BACKENDS):
        names = ", ".join(backend.name for backend in BACKENDS)
        raise SettingError(f"{VARIABLE} is {name!r}, expected {names} or none")
    return tuple(backend for backend in BACKENDS if backend.name == name)
