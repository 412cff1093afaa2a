"""Validation of the results of lifelong methods' hooks: errors name the hook and the method.

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
from rlmeta.learning.method import Memory, Method
from rlmeta.learning.state import Params, State


def expect(method: Method, hook: str, value: Any, expected: str, holds: bool) -> None:
    """Raise an error for the value that a hook returned, unless `holds`."""
    if not holds:
        raise HookError(f"{method.name}: its hook {hook} gave {_described(value)}, expected {expected}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return "None (does it end with return?)" if value is None else type(value).__name__


def tensor_like(method: Method, hook: str, value: Any, like: Tensor) -> Tensor:
    """Validate a tensor: of the shape and dtype of another."""
    fits = isinstance(value, Tensor) and value.shape == like.shape and value.dtype == like.dtype
    if not fits:
        expect(method, hook, value, _described(like), holds=False)
    return value


def further_loss(method: Method, value: Any, like: Tensor) -> Tensor:
    """Validate a loss `[*L]`, which must depend on the weights."""
    value = tensor_like(method, "loss", value, like)
    expect(
        method, "loss", value, "one that depends on the weights in p (None where there is none)", value.requires_grad
    )
    return value


def mask(method: Method, value: Any, like: Tensor) -> Tensor | None:
    """Validate a mask `[*L, P]` of frozen weights, or None."""
    if value is not None:
        fits = isinstance(value, Tensor) and value.shape == like.shape and value.dtype == torch.bool
        expect(method, "frozen", value, f"torch.bool {tuple(like.shape)} or None", fits)
    return value


def own_batch(method: Method, value: Any) -> tree.Tree:
    """Validate the minibatch for the learner's own loss."""
    expect(method, "batch", value, "a minibatch, a dictionary of tensors", isinstance(value, dict))
    return value


def further_batches(method: Method, value: Any) -> Sequence[tuple[tree.Tree, float | Tensor]]:
    """Validate further minibatches: pairs of a minibatch and the weight of its loss."""
    fits = isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], dict) for pair in value
    )
    expect(method, "batches", value, "pairs (minibatch, weight), such as [(batch, 1.0)], or ()", fits)
    return value


def logits(method: Method, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Validate logits `[*L, B, C]`."""
    fits = isinstance(value, Tensor) and value.shape == shape
    expect(method, "predict", value, f"a tensor {shape} or None", fits)
    return value


def phases(method: Method, value: Any) -> Sequence[tuple[str, int]]:
    """Validate training phases: names and whole numbers of iterations."""
    fits = isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)
        for pair in value
    )
    fits = fits and all(count >= 1 for _, count in value)
    expect(method, "phases", value, 'pairs (name, iterations of at least 1), such as [("retrain", 10)], or ()', fits)
    return value


def memory(method: Method, hook: str, value: Any) -> Memory:
    """Validate a memory: a dictionary."""
    expect(method, hook, value, "the method's memory, a dictionary of tensors", isinstance(value, dict))
    return value


def init_memory(method: Method, value: Any, key: Tensor) -> Memory:
    """Validate an initial memory: every tensor starts with the learner axes of the key."""
    for name, leaf in tree.flatten(memory(method, "init", value)).items():
        fits = isinstance(leaf, Tensor) and leaf.shape[: key.dim()] == key.shape
        form = f"a tensor that starts with the learners {tuple(key.shape)}"
        expect(method, "init", leaf, f"{form} as {name!r} of the memory", fits)
    return value


def changed(method: Method, hook: str, value: Any, p: Params, m: Memory) -> tuple[Params, Memory]:
    """Validate parameters and memory from a hook of tasks and phases: names, shapes and dtypes stay.

    Args:
        method: whose hook.
        hook: its name.
        value: what it gave.
        p: the parameters before.
        m: the memory before.
    """
    expect(method, hook, value, "(p, m)", isinstance(value, list | tuple) and len(value) == 2)
    same_form(method, hook, value[0], p, "the parameters")
    same_form(method, hook, value[1], m, "the memory")
    return value[0], value[1]


def check_effective_params(learner: Any, state: State) -> None:
    """Validate the effective parameters: the result of every method's `params` hook."""
    params = state["params"]
    for method in learner.methods:
        value = method.params(learner, params, state["methods"][method.name], state["task"])
        expect(method, "params", value, "parameters", isinstance(value, dict) and "weights" in value)
        same_form(method, "params", value["weights"], params["weights"], "the weights")
        params = value


def same_form(method: Method, hook: str, value: Any, had: Any, what: str) -> None:
    """Check that a tree keeps its names, shapes and dtypes: shapes never change in a run."""
    expect(method, hook, value, f"{what}, a dictionary of tensors", isinstance(value, dict))
    leaves, expected = tree.flatten(value), tree.flatten(had)
    strange = sorted(leaves.keys() ^ expected.keys())
    if strange:
        change = "lacks" if strange[0] in expected else "has a new entry"
        raise HookError(f"{method.name}: its hook {hook} gave {what} that {change} {strange[0]!r}: keep its names")
    for name, leaf in expected.items():
        entry = leaves[name]
        fits = isinstance(entry, Tensor) and entry.shape == leaf.shape and entry.dtype == leaf.dtype
        expect(method, hook, entry, f"{_described(leaf)} as {name!r} of {what}", fits)
