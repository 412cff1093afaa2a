"""Optimisation passes: from a tape to a shorter or cheaper one that computes the same bits.

without_writes      functionalisation: operations in place as ordinary ones, where nothing else sees what they write
without_idle        dead code elimination: without operations whose results nobody uses
direct_views        common views: views of views as views of the tensor itself, and each of them once
split               loop-invariant code: what depends on some inputs only, apart from the rest, to be computed once
batched             vectorisation of a loop: what needs nothing that is carried is computed for all calls at once
written_over        elementwise operations in place, where nobody needs the argument any more
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rlmeta.engine.tape import Layout, Operation, Place, Tape

aten = torch.ops.aten


def _last_uses(tape: Tape, of: dict[Place, Any]) -> dict[Any, int]:
    """For what `of` says of a place the number of the last operation that reads it; for outputs, one past the end."""
    last: dict[Any, int] = {}
    for number, operation in enumerate(tape.operations):
        last.update((of[place], number) for place in operation.reads())
    last.update((of[place], len(tape.operations)) for place in tape.outputs if isinstance(place, Place))
    return last


def without_writes(tape: Tape) -> Tape:
    """Functionalisation: operations in place as ordinary ones.

    Where something else sees what they write to they stay, and that memory is `pinned`.
    """
    last = _last_uses(tape, {place: place for place in tape.memory})
    sharing: dict[int, list[Place]] = {}  # the places so far of a piece of memory; later views see what was written
    for place in tape.inputs:
        sharing.setdefault(tape.memory[place], []).append(place)
    layouts, memory = dict(tape.layouts), dict(tape.memory)
    names, moved = dict[Place, Place](), dict[int, int]()  # where a place, or a piece of memory, is now
    stuck, operations = set[int](), list[Operation]()
    for number, operation in enumerate(tape.operations):
        written = operation.writes()
        stuck |= {
            tape.memory[target]
            for target in written
            if _in_new_memory(operation) is None
            or any(last.get(other, -1) > number for other in sharing[tape.memory[target]] if other != target)
        }
        for place in operation.results:
            sharing.setdefault(tape.memory[place], []).append(place)
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


def _in_new_memory(operation: Operation) -> Any:
    """The operation that gives a new tensor, for one that writes to its first argument; None where there is none."""
    name, overload = operation.function._schema.name.split("::")[1], operation.function._overloadname
    if not name.endswith("_") or not isinstance(operation.arguments[0], Place):
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)


def without_idle(tape: Tape) -> Tape:
    """Dead code elimination: the tape without operations whose results nobody uses."""
    used = {place for place in tape.outputs if isinstance(place, Place)}
    kept: list[Operation] = []
    for operation in reversed(tape.operations):
        if used.intersection(operation.results) or any(tape.memory[x] in tape.pinned for x in operation.writes()):
            kept.append(operation)
            used.update(operation.reads())
    return replace(tape, operations=tuple(reversed(kept)))


_SAME_START = ["view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t", "alias", "detach"]
"""Views that begin where the viewed tensor begins."""


def direct_views(tape: Tape) -> Tape:
    """Views of views as views of the tensor itself, each of them once, and none where it would be that tensor."""
    roots, names, equal = dict[Place, Place](), dict[Place, Place](), dict[tuple[Place, Layout], Place]()
    operations = list[Operation]()
    for operation in tape.operations:
        operation = operation.renamed(names)
        name = operation.function._schema.name.split("::")[1]
        if name not in _SAME_START or not isinstance(operation.arguments[0], Place):
            operations.append(operation)
            continue
        viewed, result = operation.arguments[0], operation.results[0]
        root, layout = roots.get(viewed, viewed), tape.layouts[result]
        same = equal.get((root, layout)) if layout != tape.layouts.get(root) else root
        if same is not None:
            names[result] = same
            continue
        roots[result], equal[root, layout] = root, result
        if root != viewed:
            arguments = [root, list(layout.shape), list(layout.strides)]
            operation = replace(operation, function=aten.as_strided.default, arguments=arguments, named={})
        operations.append(operation)
    outputs = tuple(names.get(x, x) if isinstance(x, Place) else x for x in tape.outputs)
    return without_idle(replace(tape, operations=tuple(operations), outputs=outputs))


def split(tape: Tape, fixed: Iterable[Place], views_of: Iterable[Place] | None = None) -> tuple[Tape, Tape]:
    """Loop-invariant operations, which depend on the `fixed` inputs alone, and the rest.

    The further inputs of the rest are what it needs of the former.

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
        reads, results = operation.reads(), {tape.memory[place] for place in operation.results}
        apart = known.issuperset(reads) and not operation.writes()
        apart = apart and not stays & results and not tape.pinned & {tape.memory[place] for place in reads}
        if apart and (only is None or results <= only):
            before.append(operation)
            known.update(operation.results)
        else:
            rest.append(operation)
    needed = {x for x in tape.outputs if isinstance(x, Place)}.union(*(operation.reads() for operation in rest))
    passed = tuple(place for operation in before for place in operation.results if place in needed)
    first = replace(tape, operations=tuple(before), outputs=passed)
    return without_idle(first), replace(tape, inputs=(*tape.inputs, *passed), operations=tuple(rest))


def batched(tape: Tape, carried: int, each: int) -> tuple[Tape, Tape]:
    """Vectorisation of a loop: operations of its body that can be computed for all calls at once, and the rest.

    Only operations whose result is exact are taken: of others, such as a logarithm, the bits may depend on how many
    elements there are. Keys of random numbers are made of exact ones alone.

    Args:
        tape: the body, without writes where memory is not pinned.
        carried: how many of its inputs, the first ones, a call gets from the one before.
        each: how many, those after them, every call has of its own; the rest are the same for all calls.

    Returns:
        The first tape, from what each call has of its own and what is the same for all; and the body without those
        operations, whose inputs are the carried ones, each call's own ones as far as it still needs them, the outputs
        of the first, and the fixed ones.
    """
    own, fixed = tape.inputs[carried : carried + each], tape.inputs[carried + each :]
    known, early = set(fixed), set(own)
    before, taken, rest = list[Operation](), list[Operation](), list[Operation]()
    stays = tape.pinned | {tape.memory[place] for place in tape.outputs if isinstance(place, Place)}
    for operation in tape.operations:
        reads, results = set(operation.reads()), operation.results
        apart = not operation.writes() and not stays & {tape.memory[place] for place in (*reads, *results)}
        if apart and known.issuperset(reads):
            before.append(operation)
            known.update(results)
        elif apart and (known | early).issuperset(reads) and _is_exact(operation):
            taken.append(operation)
            early.update(results)
            continue
        rest.append(operation)
    needed = {x for x in tape.outputs if isinstance(x, Place)}.union(*(operation.reads() for operation in rest))
    passed = tuple(place for operation in taken for place in operation.results if place in needed)
    first = replace(tape, inputs=(*own, *fixed), operations=(*before, *taken), outputs=passed)
    inputs = (*tape.inputs[:carried], *(place for place in own if place in needed), *passed, *fixed)
    return without_idle(first), replace(tape, inputs=inputs, operations=tuple(rest))


_EXACT = ["abs", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "div", "eq", "floor", "ge", "gt", "le", "lt", "mul"]
_EXACT += ["ne", "neg", "sub", "where", "__rshift__", "_to_copy", "clone", "select", "slice", *_SAME_START]


def _is_exact(operation: Operation) -> bool:
    """Whether each element of the result is a copy, or one correctly rounded operation on elements."""
    name = operation.function._schema.name.split("::")[1]
    return name in _EXACT and operation.named.get("alpha", 1) == 1


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
_ELEMENTWISE += ["scatter"]  # each element is the argument's own or a new one; a large one is not copied for a few


def written_over(tape: Tape, spare: Iterable[Place] = ()) -> Tape:
    """In-place operations: elementwise ones write over an argument that nobody needs any more.

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
