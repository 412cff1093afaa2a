"""Nested dictionaries of tensors: what states, rollouts and observations are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

Tree: TypeAlias = Any
"""A tensor, or a dictionary from names to trees."""


def map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:  # noqa: A001 - `tree.map` reads as it should
    """Apply `function` to every leaf of `tree` and the leaves at the same place in `others`."""
    if isinstance(tree, dict):
        return {name: map(function, value, *(other[name] for other in others)) for name, value in tree.items()}
    return function(tree, *others)


def leaves(tree: Tree) -> Iterator[Tensor]:
    """Every tensor of the tree, in the order of its names."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    else:
        yield tree


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """`{"a": {"b": t}}` as `{"a/b": t}`; a bare tensor is named ''."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}/{name}" if prefix else name))
    return flat


def unflatten(flat: dict[str, Tensor]) -> Tree:
    """The inverse of `flatten` (empty dictionaries are lost)."""
    if set(flat) == {""}:
        return flat[""]
    tree: dict[str, Tree] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
