"""Tape: a pure function of tensors as the list of its tensor operations, those of the backward pass as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlmeta.functional import tree

aten = torch.ops.aten


class NotRecordable(Exception):
    """Why a function can't be recorded, for instance because Python is about to depend on a tensor's value."""


class Place(NamedTuple):
    """Stands for a tensor that is an input or was computed."""

    number: int


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> Layout:
        """The layout with strides of 0 for axes of size 1, whose strides reach no element."""
        return self._replace(strides=tuple(0 if size == 1 else n for size, n in zip(self.shape, self.strides)))


@dataclass(frozen=True)
class Operation:
    """One call of an operation of torch's."""

    function: Any
    arguments: Any
    named: dict[str, Any]
    results: tuple[Place, ...]

    def reads(self) -> list[Place]:
        """The places among its arguments."""
        places: list[Place] = []
        _each_place((self.arguments, self.named), places.append)
        return places

    def writes(self) -> list[Place]:
        """The places that it changes."""
        arguments = self.function._schema.arguments
        values = {**{x.name: value for x, value in zip(arguments, self.arguments)}, **self.named}
        changed = [values.get(x.name) for x in arguments if x.alias_info is not None and x.alias_info.is_write]
        return [x for x in changed if isinstance(x, Place)]

    def renamed(self, names: dict[Place, Any]) -> Operation:
        """With other places, or constants, for some of those that it reads."""
        if not names:
            return self
        arguments, named = _map((self.arguments, self.named), lambda place: names.get(place, place))
        return replace(self, arguments=arguments, named=named)


@dataclass(frozen=True)
class Tape:
    """Operations in turn.

    Attributes:
        inputs: places of the inputs.
        operations: in the order of their calls.
        outputs: places of the outputs; a tensor where one is a constant.
        layouts: of every place.
        memory: a number for the piece of memory that a place lies in; views share it.
        pinned: pieces of memory that are written to while several places see them.
    """

    inputs: tuple[Place, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Place | Tensor, ...]
    layouts: dict[Place, Layout]
    memory: dict[Place, int]
    pinned: frozenset[int] = frozenset()

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The operations once more, on other tensors."""
        values = dict(zip(self.inputs, inputs))
        for operation in self.operations:
            arguments, named = _map((operation.arguments, operation.named), values.get)
            outputs = operation.function(*arguments, **named)
            values.update(zip(operation.results, _tensors(outputs)))
        return [values[output] if isinstance(output, Place) else output for output in self.outputs]

    def with_constants(self, constants: Sequence[Tensor]) -> Tape:
        """With these tensors for as many of its last inputs."""
        count = len(self.inputs) - len(constants)
        known = dict(zip(self.inputs[count:], constants))
        operations = tuple(operation.renamed(known) for operation in self.operations)
        return replace(self, inputs=self.inputs[:count], operations=operations)


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors among an operation's outputs; a derivative that nobody asked for is None."""
    return [x for x in (outputs if isinstance(outputs, list | tuple) else [outputs]) if isinstance(x, Tensor)]


def _map(x: Any, function: Callable[[Place], Any]) -> Any:
    """`function` of every place in nested lists, tuples and dictionaries."""
    if isinstance(x, Place):
        return function(x)
    if isinstance(x, dict):
        return {name: _map(value, function) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_map(value, function) for value in x]
    return x


def _each_place(x: Any, function: Callable[[Place], None]) -> None:
    if isinstance(x, Place):
        function(x)
    elif isinstance(x, dict):
        for value in x.values():
            _each_place(value, function)
    elif isinstance(x, list | tuple):
        for value in x:
            _each_place(value, function)


# ---------------------------------------------------------------------- the recording


Guard = bool | int | float
"""A number in a tensor that Python looked at while a function was recorded: for another it may go another way."""

GUARD_AXES = 4
"""A guarded number is an output `[1, 1, 1, 1]`: rows of it can be stacked along the axes of learners, too."""


def record(function: Callable[[tree.Tree], tree.Tree], inputs: tree.Tree) -> tuple[tree.Tree, Tape, list[Guard]]:
    """What the function gives, its operations, and its guards.

    The tape's last outputs are the numbers in tensors that Python looked at, as in `if x.sum() > 0`; it stands for the
    function wherever they equal the guards.

    Raises:
        NotRecordable: it depends on more than tensors.
    """
    inputs = tree.map(own_memory, inputs)
    recorder = _Recorder(tree.leaves(inputs))
    with _NoHiddenReads(recorder), recorder:
        outputs = function(inputs)
    return outputs, recorder.tape(tree.leaves(outputs)), recorder.guards


class _NoHiddenReads(TorchFunctionMode):
    """Refuses what hands the numbers in a tensor to Python without an operation that shows it."""

    _HIDDEN = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage)
    _MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new, torch.sparse_coo_tensor)
    """They read the tensors in a list, as in `torch.tensor([x.sum()])`."""
    _NUMBERS = (Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__, Tensor.__complex__, Tensor.item)
    """They call an operation that is seen, but not within `torch.Tensor([x.sum()])`."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._HIDDEN or (func in self._MAKERS and _lists_tensors((*args, *(kwargs or {}).values()))):
            raise NotRecordable(LOOKED_AT)
        seen = self._recorder.reads
        outputs = func(*args, **(kwargs or {}))
        if func in self._NUMBERS and self._recorder.reads == seen:
            raise NotRecordable(LOOKED_AT)
        return outputs


def _lists_tensors(arguments: Sequence[Any]) -> bool:
    """Whether there is a tensor in a list or tuple among the arguments, however deep."""
    nested = [x for x in arguments if isinstance(x, list | tuple)]
    return any(any(isinstance(x, Tensor) for x in items) or _lists_tensors(items) for items in nested)


LOOKED_AT = "Python looks at the numbers in a tensor, as in `if x.sum() > 0` or `x.item()`"
SHAPED_BY = "the shape of a tensor depends on numbers in another, as in `x[x > 0]` or `x.nonzero()`: use torch.where"
WRITES = "it writes to a tensor that it was given, as in `x[0] = 1` or `x.add_(1)`: write to a copy"


def own_memory(x: Tensor) -> Tensor:
    """A copy that lies in memory of its own just as the tensor does: which operations are called, and on some
    processors their bits, depend on strides and on where memory begins."""
    if x.numel() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    ahead = x.storage_offset() % (ALIGNED // x.element_size())
    span = x.detach().as_strided((ahead + last + 1,), (1,), x.storage_offset() - ahead)
    # no view of `span`: the tracer takes no view among its inputs that is written to
    return torch.empty_like(span[:0]).set_(span.clone().untyped_storage(), ahead, x.shape, x.stride())


ALIGNED = 64
"""Bytes: torch allocates memory at multiples of them."""


class _Recorder(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Operation] = []
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets the id, or the memory, of one
        self._places: dict[int, Place] = {}
        self._inputs = tuple(self._new(tensor) for tensor in inputs)
        self._guarded: list[Place] = []
        self.guards: list[Guard] = []
        """The numbers that Python looked at."""
        self.reads = 0
        """How often Python looked at a number, of a constant as well."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not needed here, and to import it would take seconds."""
        return False

    def _new(self, tensor: Tensor) -> Place:
        place = self._places.get(id(tensor))
        if place is None:
            place = self._places[id(tensor)] = Place(len(self._tensors))
            self._tensors.append(tensor)
        return place

    def _place(self, x: Any) -> Any:
        """Where a tensor comes from; one that nothing was seen to compute is a constant."""
        if isinstance(x, Tensor):
            return self._places.get(id(x), x)
        if isinstance(x, dict):
            return {name: self._place(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return [self._place(value) for value in x]
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        _check(func, args)
        outputs = func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            self.reads += 1
            self._guard(args[0], outputs)
            return outputs
        if func is aten.detach.default:  # without autograd a copy of nothing
            place = self._places.get(id(args[0]))
            if place is not None:
                self._places[id(outputs)] = place
            self._tensors.append(outputs)
            return outputs
        if func is aten.lift_fresh.default:  # what Python has just made of numbers: the same in every call, and new
            func, args = aten.clone.default, [outputs.clone()]
        results = _tensors(outputs)
        if results:
            noted, args, named = _with_tensors(func, args, kwargs or {})
            places = tuple(self._new(x) for x in results)
            self._operations.append(Operation(noted, self._place(args), self._place(named), places))
        return outputs

    def _guard(self, number: Tensor, value: Guard) -> None:
        """Note that Python looked at a number: a copy of it, for it may be written to later."""
        place = self._places.get(id(number))
        if place is None:
            return  # a constant
        shape = [1] * GUARD_AXES
        copied = self._new(aten.view_copy.default(number, shape))
        self._operations.append(Operation(aten.view_copy.default, [place, shape], {}, (copied,)))
        self._guarded.append(copied)
        self.guards.append(value)

    def tape(self, outputs: Iterable[Tensor]) -> Tape:
        """What was noted; the guarded numbers come after the outputs."""
        layouts, memory = {}, {}
        for number, tensor in enumerate(self._tensors):
            layouts[Place(number)] = Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            memory[Place(number)] = tensor.untyped_storage()._cdata
        given = {memory[place] for place in self._inputs}
        if any(memory[place] in given for operation in self._operations for place in operation.writes()):
            raise NotRecordable(WRITES)
        places = (*(self._place(x) for x in outputs), *self._guarded)
        return Tape(self._inputs, tuple(self._operations), places, layouts, memory)


def _check(function: Any, args: Sequence[Any]) -> None:
    """Refuse an operation that no replay can repeat.

    Raises:
        NotRecordable: it gives Python a number, a tensor whose shape depends on numbers, or only writes.
    """
    if torch.Tag.data_dependent_output in function.tags and function is not aten._local_scalar_dense.default:
        raise NotRecordable(LOOKED_AT)
    if torch.Tag.dynamic_output_shape in function.tags:
        indices = args[1] if function is aten.index.Tensor else None
        if indices is None or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            raise NotRecordable(SHAPED_BY)
    schema = function._schema
    if not schema.returns and schema.is_mutable:
        raise NotRecordable(f"{schema.name} only writes to its arguments")


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
