"""A pure function of tensors, recorded once and replayed without Python.

For small networks most of a gradient step is Python and autograd's bookkeeping. What is recorded is the very sequence
of tensor operations, so a replay gives the same bits; that is checked before the first one is used.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rlmeta.functional import tree

Function = Callable[[tree.Tree], tree.Tree]
"""From a nested dictionary of tensors to one. It may depend on nothing else that changes, and not on their values."""

WARM_UP = 200
"""Calls before a function is recorded: recording takes about a second."""


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
        leaves = list(tree.leaves(inputs))
        key = (name, *[(leaf.shape, leaf.dtype) for leaf in leaves])
        if key in self._replays:
            replay = self._replays[key]
            return function(inputs) if replay is None else replay(leaves)
        self._calls[key] += 1
        if self._calls[key] < self._warm_up:
            return function(inputs)
        expected = function(inputs)
        self._replays[key] = _record(function, inputs, leaves, expected)
        return expected


class _Replay:
    """A recorded sequence of operations."""

    def __init__(self, program: Any, outputs: tree.Tree) -> None:
        self._program, self._outputs = program, tree.map(lambda _: None, outputs)

    def __call__(self, leaves: list[Tensor]) -> tree.Tree:
        with torch.no_grad():
            found = iter(self._program(*leaves))
        return tree.map(lambda _: next(found), self._outputs)


def _record(function: Function, inputs: tree.Tree, leaves: list[Tensor], expected: tree.Tree) -> _Replay | None:
    """The function as a program, or None where it can't be one or gives other bits."""

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return tuple(tree.leaves(function(tree.map(lambda _: next(given), inputs))))

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracers about themselves
            graph = make_fx(flat)(*leaves)
            _drop_detach(graph)
            replay = _Replay(torch.jit.trace(graph, tuple(leaves), check_trace=False), expected)  # type: ignore[no-untyped-call]
    except RuntimeError:  # it looks at values, or has an operation that can't be recorded
        return None
    for _ in range(3):  # the program is optimised after its first runs
        pairs = zip(tree.leaves(replay(leaves)), tree.leaves(expected))
        if not all(torch.equal(a, b) for a, b in pairs):
            return None
    return replay


def _drop_detach(graph: nn.Module) -> None:
    """Without autograd a `detach` is a copy of nothing."""
    nodes: Any = graph.graph
    for node in list(nodes.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)
    nodes.eliminate_dead_code()
    graph.recompile()  # type: ignore[operator]
