"""Parallel work on several cores, each with some of the learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from rlmeta.functional import tree
from rlmeta.functional.packed import Packed

FEW_ROWS = 1024
"""Acting in up to so many rows, a second core costs more than it gives."""


def in_parts(function: Callable[..., tree.Tree], *arguments: tree.Tree) -> tree.Tree:
    """`function(*arguments)`, a part of the learners on each core that torch may use, put together again.

    When instead every operation runs on all cores they wait for each other after each, which for small networks takes
    as long as the operation. Nothing is gained where most of the time is Python's, which runs on one core at a time.

    Args:
        function: from trees to a tree; no learner's result depends on another.
        arguments: every leaf starts with the same learner axes, one at least.
    """
    learners = next(tree.leaves(arguments[0])).shape[0]
    parts = min(torch.get_num_threads(), learners)
    if parts == 1:
        return function(*arguments)
    firsts = [learners * part // parts for part in range(parts + 1)]
    pieces = [[_piece(argument, first, end - first) for argument in arguments] for first, end in pairwise(firsts)]

    def work(piece: Sequence[tree.Tree]) -> tree.Tree:
        with one_core(True):
            return function(*piece)

    with one_core(True):  # a second core would spin for a while after every operation, in the way of the parts
        return _joined(list(_workers(parts).map(work, pieces)))


@contextmanager
def one_core(when: bool) -> Iterator[None]:
    """Within, the operations of this thread run on one core."""
    before = torch.get_num_threads()
    if not when or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "rlmeta-part")


def _piece(whole: tree.Tree, first: int, count: int) -> tree.Tree:
    """A copy of some of the learners.

    The bits of a matrix product depend on where its factors begin, and what is allocated begins at multiples of 64.
    """
    if isinstance(whole, Packed):
        return Packed.view(whole.flat.narrow(0, first, count).clone(), whole, whole.flat.dim() - 1)
    if isinstance(whole, dict):
        return {name: _piece(value, first, count) for name, value in whole.items()}
    return whole.narrow(0, first, count).clone()


def _joined(pieces: Sequence[Any]) -> tree.Tree:
    first = pieces[0]
    if isinstance(first, Packed):
        flat = torch.cat([piece.flat for piece in pieces])
        return Packed.view(flat, first, flat.dim() - 1)
    if isinstance(first, tuple):
        return tuple(_joined(column) for column in zip(*pieces))
    if isinstance(first, dict):
        return {name: _joined([piece[name] for piece in pieces]) for name in first}
    return torch.cat(list(pieces))
