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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlmeta.functional import tree

Function = Callable[[tree.Tree], tree.Tree]
"""From a nested dictionary of tensors to one. It may depend on nothing else that changes, and not on their values."""

WARM_UP = 30
"""Calls before a function is recorded: recording takes about as long as a few hundred of them."""

_CHECKS = 3
"""Calls that a recording must answer as the function does; it is optimised within them."""


_RECORDING = threading.Lock()
"""Recorders keep notes of their own, one for all threads."""


class Capture:
    """Calls functions, and replays those that were called often with tensors of the same names and shapes."""

    def __init__(self, warm_up: int | None = None) -> None:
        self._warm_up = WARM_UP if warm_up is None else warm_up
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, _Replay | None] = {}

    def __call__(self, name: Hashable, function: Function, inputs: tree.Tree) -> tree.Tree:
        """`function(inputs)`, without a graph of autograd's.

        Args:
            name: tells functions apart; calls under one name must be of the same function.
            function: see `Function`.
            inputs: the tensors it depends on.
        """
        leaves: list[Tensor] = []
        _gather_leaves(inputs, leaves)
        key = (name, *[(leaf.shape, leaf.dtype) for leaf in leaves])
        replay = self._replays.get(key)
        if replay is not None and replay.checks >= _CHECKS:
            return replay(leaves)
        if key in self._replays:
            expected = function(inputs)
            if replay is not None and not replay.check(leaves, expected):
                self._replays[key] = None
            return expected
        self._calls[key] += 1
        if self._calls[key] < self._warm_up:
            return function(inputs)
        with _RECORDING:
            expected, self._replays[key] = _record(function, inputs, leaves)
        return expected


def _gather_leaves(inputs: tree.Tree, found: list[Tensor]) -> None:
    """`tree.leaves`, in half the time."""
    for value in inputs.values():
        if isinstance(value, dict):
            _gather_leaves(value, found)
        else:
            found.append(value)


class _Replay:
    """A recorded sequence of operations."""

    def __init__(self, program: Any, outputs: tree.Tree) -> None:
        self._program, self._outputs = program, tree.map(lambda _: None, outputs)
        self.checks = 0
        """How often it gave what the function gave."""

    def __call__(self, leaves: Sequence[Tensor]) -> tree.Tree:
        with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):
            found = iter(self._program(*leaves))
        return tree.map(lambda _: next(found), self._outputs)

    def check(self, leaves: Sequence[Tensor], expected: tree.Tree) -> bool:
        """Whether it gives what the function gave, bit for bit."""
        self.checks += 1
        pairs = zip(tree.leaves(self(leaves)), tree.leaves(expected))
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
"""What need not be asked about every operation of a replay."""
for _key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
    _AUTOGRAD = _AUTOGRAD | torch._C.DispatchKeySet(_key)


def _record(function: Function, inputs: tree.Tree, leaves: Sequence[Tensor]) -> tuple[tree.Tree, _Replay | None]:
    """What the function gives, and the function as a program, or None where it can't be one."""
    tape = _Tape(leaves)
    try:
        with tape:
            expected = function(inputs)
    except _LooksAtValues:
        return function(inputs), None
    outputs = [tape.place(leaf) for leaf in tree.leaves(expected)]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer about itself
            program = torch.jit.trace(  # type: ignore[no-untyped-call]
                lambda *given: tape.play(given, outputs), tuple(leaves), check_trace=False
            )
    except RuntimeError:  # an operation that can't be recorded
        return expected, None
    return expected, _Replay(program, expected)


# ---------------------------------------------------------------------- the recording


class _LooksAtValues(Exception):
    """Python is about to depend on a tensor's value."""


class _Place(NamedTuple):
    """Stands for a tensor that is an input or was computed."""

    number: int


class _Operation(NamedTuple):
    function: Any
    arguments: Any
    named: dict[str, Any]
    results: list[_Place]


class _Tape(TorchDispatchMode):
    """Notes every operation, those of the backward pass as well."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[_Operation] = []
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets the id of one
        self._places: dict[int, _Place] = {}
        for leaf in leaves:
            self._new(leaf)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not needed here, and to import it would take seconds."""
        return False

    def _new(self, tensor: Tensor) -> _Place:
        self._tensors.append(tensor)
        return self._places.setdefault(id(tensor), _Place(len(self._tensors) - 1))

    def place(self, tensor: Tensor) -> _Place | Tensor:
        """Where a tensor comes from; one that nothing was seen to compute is a constant."""
        return self._places.get(id(tensor), tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        if func is aten._local_scalar_dense.default or func is aten.equal.default:
            raise _LooksAtValues
        found = func(*args, **(kwargs or {}))
        if func is aten.detach.default:  # without autograd a copy of nothing
            self._tensors.append(found)
            self._places[id(found)] = self._places.get(id(args[0])) or self._new(args[0])
            return found
        noted, args, named = _with_tensors(func, args, kwargs or {})
        results = [self._new(x) for x in (found if isinstance(found, list | tuple) else [found])]
        self._operations.append(_Operation(noted, _map(self.place, args), _map(self.place, named), results))
        return found

    def play(self, leaves: Sequence[Tensor], outputs: Sequence[_Place | Tensor]) -> tuple[Tensor, ...]:
        """The operations once more, on other tensors."""
        values: dict[int, Tensor] = dict(enumerate(leaves))

        def value(x: Any) -> Any:
            return values.get(x.number) if isinstance(x, _Place) else x

        for function, arguments, named, results in self._operations:
            found = function(*_map(value, arguments), **_map(value, named))
            for place, result in zip(results, found if isinstance(found, list | tuple) else [found]):
                values[place.number] = result
        return tuple(value(place) for place in outputs)


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of everything in nested lists, tuples and dictionaries that is a tensor or a place."""
    if isinstance(x, Tensor | _Place):
        return function(x)
    if isinstance(x, dict):
        return {name: _map(function, value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_map(function, value) for value in x]
    return x


aten = torch.ops.aten
_NAMES = ["add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "ge", "gt", "le", "lt", "eq", "ne"]
_NAMES += ["__rshift__", "bitwise_and", "bitwise_and_", "bitwise_xor", "bitwise_xor_", "bitwise_or", "bitwise_or_"]
_WITH_NUMBERS = {
    getattr(getattr(aten, name), overload): getattr(aten, name).Tensor
    for name in _NAMES
    for overload in ("Tensor", "Scalar")
}


def _with_tensors(function: Any, args: Sequence[Any], named: dict[str, Any]) -> tuple[Any, Sequence[Any], Any]:
    """The operation with a tensor of its type for a number: to make one of the number in every replay costs as much
    as the operation itself."""
    number = args[1] if len(args) > 1 else None
    exact = {float: (torch.float32, torch.float64), int: (torch.float32, torch.float64, torch.int64)}
    if not args or getattr(args[0], "dtype", None) not in exact.get(type(number), ()):
        return function, args, named  # no number, or the result would have another type than the tensor
    if function in _WITH_NUMBERS:
        tensor = torch.tensor(number, dtype=args[0].dtype, device=args[0].device)
        return _WITH_NUMBERS[function], [args[0], tensor, *args[2:]], named
    if function is aten.rsub.Scalar:
        tensor = torch.tensor(number, dtype=args[0].dtype, device=args[0].device)
        return aten.sub.Tensor, [tensor, args[0]], {"alpha": args[2] if len(args) > 2 else 1}
    return function, args, named
