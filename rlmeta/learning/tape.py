"""A pure function of tensors as the list of its tensor operations, and what of that list can be spared.

`record` notes the operations, those of the backward pass as well. What follows are passes from one list to a shorter
or cheaper one that computes the same bits:

    without_writes      operations in place as ordinary ones, where nothing else sees what they write to
    without_idle        without operations whose results nobody uses
    split               what depends on some inputs only apart from the rest: it is computed once where the rest repeats
    written_over        elementwise operations in place, where nobody needs the argument any more
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlmeta.functional import tree

aten = torch.ops.aten


class LooksAtValues(Exception):
    """Python is about to depend on a tensor's value."""


class Place(NamedTuple):
    """Stands for a tensor that is an input or was computed."""

    number: int


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Operation:
    """One call of an operation of torch's."""

    function: Any
    arguments: Any
    named: dict[str, Any]
    results: tuple[Place, ...]

    def reads(self) -> list[Place]:
        """The places among its arguments."""
        found: list[Place] = []
        _each_place((self.arguments, self.named), found.append)
        return found

    def writes(self) -> bool:
        """Whether it changes an argument."""
        return bool(self.function._schema.is_mutable)

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
            found = operation.function(*arguments, **named)
            values.update(zip(operation.results, _tensors(found)))
        return [values[output] if isinstance(output, Place) else output for output in self.outputs]

    def with_constants(self, constants: Sequence[Tensor]) -> Tape:
        """With these tensors for as many of its last inputs."""
        count = len(self.inputs) - len(constants)
        known = dict(zip(self.inputs[count:], constants))
        operations = tuple(operation.renamed(known) for operation in self.operations)
        return replace(self, inputs=self.inputs[:count], operations=operations)


def _tensors(found: Any) -> list[Tensor]:
    """The tensors among what an operation gave; a derivative that nobody asked for is None."""
    return [x for x in (found if isinstance(found, list | tuple) else [found]) if isinstance(x, Tensor)]


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


def record(function: Callable[[tree.Tree], tree.Tree], inputs: tree.Tree) -> tuple[tree.Tree, Tape]:
    """What the function gives, and its operations.

    Raises:
        LooksAtValues: it depends on more than tensors.
    """
    inputs = tree.map(torch.clone, inputs)  # each in memory of its own
    recorder = _Recorder(tree.leaves(inputs))
    with recorder:
        found = function(inputs)
    return found, recorder.tape(tree.leaves(found))


class _Recorder(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Operation] = []
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets the id, or the memory, of one
        self._places: dict[int, Place] = {}
        self._inputs = tuple(self._new(tensor) for tensor in inputs)

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
        if func is aten._local_scalar_dense.default or func is aten.equal.default:
            raise LooksAtValues
        found = func(*args, **(kwargs or {}))
        if func is aten.detach.default:  # without autograd a copy of nothing
            place = self._places.get(id(args[0]))
            if place is not None:
                self._places[id(found)] = place
            self._tensors.append(found)
            return found
        results = _tensors(found)
        if results:
            noted, args, named = _with_tensors(func, args, kwargs or {})
            places = tuple(self._new(x) for x in results)
            self._operations.append(Operation(noted, self._place(args), self._place(named), places))
        return found

    def tape(self, outputs: Iterable[Tensor]) -> Tape:
        """What was noted."""
        layouts, memory = {}, {}
        for number, tensor in enumerate(self._tensors):
            layouts[Place(number)] = Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            memory[Place(number)] = tensor.untyped_storage()._cdata
        return Tape(self._inputs, tuple(self._operations), tuple(self._place(x) for x in outputs), layouts, memory)


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


# ---------------------------------------------------------------------- the passes


def _last_uses(tape: Tape, of: dict[Place, Any]) -> dict[Any, int]:
    """For what `of` says of a place the number of the last operation that reads it; for outputs, one past the end."""
    last: dict[Any, int] = {}
    for number, operation in enumerate(tape.operations):
        last.update((of[place], number) for place in operation.reads())
    last.update((of[place], len(tape.operations)) for place in tape.outputs if isinstance(place, Place))
    return last


def without_writes(tape: Tape) -> Tape:
    """Operations in place as ordinary ones; where something else sees what they write to, its memory is `pinned`."""
    last = _last_uses(tape, {place: place for place in tape.memory})
    sharing: dict[int, list[Place]] = {}
    for place, piece in tape.memory.items():
        sharing.setdefault(piece, []).append(place)
    layouts, memory = dict(tape.layouts), dict(tape.memory)
    names, moved = dict[Place, Place](), dict[int, int]()  # where a place, or a piece of memory, is now
    stuck, operations = set[int](), list[Operation]()
    for number, operation in enumerate(tape.operations):
        written = _written(operation)
        stuck |= {
            tape.memory[target]
            for target in written
            if _in_new_memory(operation) is None
            or any(last.get(other, -1) > number for other in sharing[tape.memory[target]] if other != target)
        }
        if written and tape.memory[written[0]] not in stuck:
            new, target = Place(len(layouts)), written[0]
            operations.append(replace(operation.renamed(names), function=_in_new_memory(operation), results=(new,)))
            layouts[new], memory[new] = layouts[target], -new.number
            names[target], moved[tape.memory[target]] = new, memory[new]
            continue
        for place in operation.results:
            memory[place] = moved.get(tape.memory[place], tape.memory[place])
        results = tuple(names.get(place, place) for place in operation.results)
        operations.append(replace(operation.renamed(names), results=results))
    outputs = tuple(names.get(x, x) if isinstance(x, Place) else x for x in tape.outputs)
    pinned = frozenset(moved.get(piece, piece) for piece in stuck)
    return Tape(tape.inputs, tuple(operations), outputs, layouts, memory, pinned)


def _written(operation: Operation) -> list[Place]:
    """The places that an operation changes."""
    arguments = operation.function._schema.arguments
    given = {**{x.name: value for x, value in zip(arguments, operation.arguments)}, **operation.named}
    changed = [given.get(x.name) for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    return [x for x in changed if isinstance(x, Place)]


def _in_new_memory(operation: Operation) -> Any:
    """The operation that gives a new tensor, for one that writes to its first argument; None where there is none."""
    name, overload = operation.function._schema.name.split("::")[1], operation.function._overloadname
    if not name.endswith("_") or not isinstance(operation.arguments[0], Place):
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)


def without_idle(tape: Tape) -> Tape:
    """Without operations whose results nobody uses."""
    used = {place for place in tape.outputs if isinstance(place, Place)}
    kept: list[Operation] = []
    for operation in reversed(tape.operations):
        if used.intersection(operation.results) or any(tape.memory[x] in tape.pinned for x in _written(operation)):
            kept.append(operation)
            used.update(operation.reads())
    return replace(tape, operations=tuple(reversed(kept)))


def split(tape: Tape, fixed: Iterable[Place], views_of: Iterable[Place] | None = None) -> tuple[Tape, Tape]:
    """What depends on the `fixed` inputs alone, and the rest, whose further inputs are what it needs of the former.

    Args:
        tape: without writes where memory is not pinned.
        fixed: some of its inputs.
        views_of: only take views of these inputs apart.
    """
    known, before, rest = set(fixed), list[Operation](), list[Operation]()
    only = None if views_of is None else {tape.memory[place] for place in views_of}
    handed_out = {tape.memory[place] for place in tape.outputs if isinstance(place, Place)}
    stays = tape.pinned | (handed_out - (only or set()))  # outputs are the caller's, so they are made anew
    for operation in tape.operations:
        operation = _of_shapes(operation, tape.layouts)
        reads, made = operation.reads(), {tape.memory[place] for place in operation.results}
        apart = known.issuperset(reads) and not _written(operation)
        apart = apart and not stays & made and not tape.pinned & {tape.memory[place] for place in reads}
        if apart and (only is None or made <= only):
            before.append(operation)
            known.update(operation.results)
        else:
            rest.append(operation)
    needed = {x for x in tape.outputs if isinstance(x, Place)}.union(*(operation.reads() for operation in rest))
    passed = tuple(place for operation in before for place in operation.results if place in needed)
    first = replace(tape, operations=tuple(before), outputs=passed)
    return without_idle(first), replace(tape, inputs=(*tape.inputs, *passed), operations=tuple(rest))


_FILLED = {
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.new_ones.default: 1,
    aten.new_zeros.default: 0,
}


def _of_shapes(operation: Operation, layouts: dict[Place, Layout]) -> Operation:
    """An operation that needs a shape alone, without the tensor whose shape it is."""
    if operation.function not in _FILLED:
        return operation
    layout = layouts[operation.results[0]]
    if layout.strides != torch.empty(layout.shape, device="meta").stride():
        return operation
    named = {"dtype": layout.dtype, "device": layout.device}
    arguments = [list(layout.shape), _FILLED[operation.function]]
    return replace(operation, function=aten.full.default, arguments=arguments, named=named)


_ELEMENTWISE = ["abs", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "clamp", "div", "exp", "expm1", "lerp"]
_ELEMENTWISE += ["log", "masked_fill", "mul", "neg", "pow", "relu", "reciprocal", "rsqrt", "sigmoid", "sqrt", "sub"]


def written_over(tape: Tape, spare: Iterable[Place] = ()) -> Tape:
    """Elementwise operations in place, where nobody needs their argument any more.

    Args:
        tape: any.
        spare: inputs that nobody needs afterwards.
    """
    memory, operations = dict(tape.memory), list[Operation]()
    last = _last_uses(tape, memory)
    kept = {memory[place] for place in tape.inputs} - {memory[place] for place in spare} | tape.pinned
    for number, operation in enumerate(tape.operations):
        for target, in_place in _in_place(operation):
            piece, result = memory[target], operation.results[0]
            sharing = [place for place in operation.reads() if memory[place] == piece and place != target]
            if piece in kept or last[piece] != number or sharing or tape.layouts[target] != tape.layouts[result]:
                continue
            operation, replaced = in_place, memory[result]
            last[piece] = last.get(replaced, number)
            memory.update((place, piece) for place, other in tape.memory.items() if other == tape.memory[result])
            break
        operations.append(operation)
    return replace(tape, operations=tuple(operations), memory=memory)


def _in_place(operation: Operation) -> Iterator[tuple[Place, Operation]]:
    """The arguments that an elementwise operation could write its result to, and the operation that does."""
    name, overload = operation.function._schema.name.split("::")[1], operation.function._overloadname
    arguments = operation.arguments
    if name == "tanh_backward":
        for place in arguments:
            yield place, replace(operation, function=aten.tanh_backward.grad_input, named={"grad_input": place})
        return
    if name not in _ELEMENTWISE:
        return
    if isinstance(arguments[0], Place) and hasattr(getattr(aten, name + "_", None), overload):
        yield arguments[0], replace(operation, function=getattr(getattr(aten, name + "_"), overload))
    if overload == "Tensor" and isinstance(arguments[1], Place) and name in ("add", "mul", "sub", "div"):
        out = getattr(aten, name).out
        yield arguments[1], replace(operation, function=out, named={**operation.named, "out": arguments[1]})
