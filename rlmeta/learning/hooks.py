"""What the hooks of lifelong methods give back, checked: one line that names hook and method, not an error far from it.

In a gradient step only types and shapes are compared, which costs next to nothing; whole parameters and memories are
compared where a task, a phase or a run begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlmeta.errors import HookError
from rlmeta.functional import tree
from rlmeta.learning.method import Memory, Method, Task, seen
from rlmeta.learning.state import Params, State


def expect(method: Method, hook: str, found: Any, expected: str, holds: bool) -> None:
    """Refuse what a hook gave back unless it `holds`."""
    if not holds:
        raise HookError(f"{method.name}: its hook {hook} gave {_said(found)}, expected {expected}")


def _said(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"{found.dtype} {tuple(found.shape)}"
    return "None (does it end with return?)" if found is None else type(found).__name__


def tensor_like(method: Method, hook: str, found: Any, like: Tensor) -> Tensor:
    """What a hook gave, if it is a tensor of the shape and type of another."""
    fits = isinstance(found, Tensor) and found.shape == like.shape and found.dtype == like.dtype
    if not fits:
        expect(method, hook, found, _said(like), holds=False)
    return found


def further_loss(method: Method, found: Any, like: Tensor) -> Tensor:
    """What `loss` gave, if it is one `[*L]` that depends on the weights."""
    found = tensor_like(method, "loss", found, like)
    expect(
        method, "loss", found, "one that depends on the weights in p (None where there is none)", found.requires_grad
    )
    return found


def mask(method: Method, found: Any, like: Tensor) -> Tensor | None:
    """What `frozen` gave, if it is None or a mask `[*L, P]`."""
    if found is not None:
        fits = isinstance(found, Tensor) and found.shape == like.shape and found.dtype == torch.bool
        expect(method, "frozen", found, f"torch.bool {tuple(like.shape)} or None", fits)
    return found


def further_batches(method: Method, found: Any) -> Sequence[tuple[tree.Tree, float | Tensor]]:
    """What `batches` gave, if it is pairs of a minibatch and a weight."""
    fits = isinstance(found, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[0], dict) for one in found
    )
    expect(method, "batches", found, "pairs (minibatch, weight), such as [(batch, 1.0)], or ()", fits)
    return found


def logits(method: Method, found: Any, shape: tuple[int, ...]) -> Tensor:
    """What `predict` gave, if it is a tensor of this shape, `[*L, B, C]`."""
    fits = isinstance(found, Tensor) and found.shape == shape
    expect(method, "predict", found, f"a tensor {shape} or None", fits)
    return found


def phases(method: Method, found: Any) -> Sequence[tuple[str, int]]:
    """What `phases` gave, if it is names and whole numbers of iterations."""
    fits = isinstance(found, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], int)
        for one in found
    )
    fits = fits and all(count >= 1 for _, count in found)
    expect(method, "phases", found, 'pairs (name, iterations of at least 1), such as [("retrain", 10)], or ()', fits)
    return found


def memory(method: Method, hook: str, found: Any) -> Memory:
    """What a hook gave, if it can be a memory."""
    expect(method, hook, found, "the method's memory, a dictionary of tensors", isinstance(found, dict))
    return found


def first_memory(method: Method, found: Any, key: Tensor) -> Memory:
    """What `init` gave, if it is a memory in which every tensor starts with the learner axes of the key."""
    for name, leaf in tree.flatten(memory(method, "init", found)).items():
        fits = isinstance(leaf, Tensor) and leaf.shape[: key.dim()] == key.shape
        said = f"a tensor that starts with the learners {tuple(key.shape)}"
        expect(method, "init", leaf, f"{said} as {name!r} of the memory", fits)
    return found


def changed(method: Method, hook: str, found: Any, p: Params, m: Memory) -> tuple[Params, Memory]:
    """What a hook of tasks and phases gave, if it is parameters and a memory of the form they had.

    Args:
        method: whose hook.
        hook: its name.
        found: what it gave.
        p: the parameters before.
        m: the memory before.
    """
    expect(method, hook, found, "(p, m)", isinstance(found, list | tuple) and len(found) == 2)
    same_form(method, hook, found[0], p, "the parameters")
    same_form(method, hook, found[1], m, "the memory")
    return found[0], found[1]


def seen_parameters(methods: Sequence[Method], state: State, task: Task) -> None:
    """Check what `params` of every method gives for the parameters of now."""
    for i, method in enumerate(methods):
        before = seen(methods[:i], state, task)
        found = method.params(before, state["methods"][method.name], task)
        expect(method, "params", found, "parameters", isinstance(found, dict) and "weights" in found)
        same_form(method, "params", found["weights"], before["weights"], "the weights")


def same_form(method: Method, hook: str, found: Any, had: Any, what: str) -> None:
    """Refuse a tree of other names, shapes or types than it had: shapes never change in a run."""
    expect(method, hook, found, f"{what}, a dictionary of tensors", isinstance(found, dict))
    given, expected = tree.flatten(found), tree.flatten(had)
    strange = sorted(given.keys() ^ expected.keys())
    if strange:
        said = "lacks" if strange[0] in expected else "has a new entry"
        raise HookError(f"{method.name}: its hook {hook} gave {what} that {said} {strange[0]!r}: keep its names")
    for name, leaf in expected.items():
        value = given[name]
        fits = isinstance(value, Tensor) and value.shape == leaf.shape and value.dtype == leaf.dtype
        expect(method, hook, value, f"{_said(leaf)} as {name!r} of {what}", fits)
