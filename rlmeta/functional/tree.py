"""Nested dictionaries of tensors: what states, rollouts and observations are made of.

Leaves are paired by name: in which order a dictionary was filled never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

from rlmeta.errors import SettingError

Tree: TypeAlias = Any
"""A tensor, or a dictionary from names to trees."""


def map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:  # noqa: A001 - `tree.map` reads as it should
    """Apply `function` to every leaf of `tree` and the leaves of the same name in `others`.

    Returns:
        A tree of the names of `tree`, in its order.

    Raises:
        SettingError: one of the others has other names.
    """
    if isinstance(tree, dict):
        for other in others:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise _other_names(tree, other)
        return {name: map(function, value, *(other[name] for other in others)) for name, value in tree.items()}
    for other in others:
        if isinstance(other, dict):
            raise _other_names(tree, other)
    return function(tree, *others)


def _other_names(tree: Tree, other: Tree) -> SettingError:
    """What to say of two trees that can't be paired."""
    if not (isinstance(tree, dict) and isinstance(other, dict)):
        first, second = ("a dictionary" if isinstance(one, dict) else type(one).__name__ for one in (tree, other))
        return SettingError(f"trees of different form can't be paired: {first} against {second} at the same place")
    lacks, has = sorted(tree.keys() - other.keys()), sorted(other.keys() - tree.keys())
    said = [f"the second lacks {', '.join(lacks)}"] if lacks else []
    said += [f"the first lacks {', '.join(has)}"] if has else []
    return SettingError(f"trees with different names can't be paired: {'; '.join(said)}")


def leaves(tree: Tree) -> Iterator[Tensor]:
    """Every tensor of the tree, sorted by name at every level: equal trees give their leaves in one order."""
    if isinstance(tree, dict):
        for name in sorted(tree):
            yield from leaves(tree[name])
    else:
        yield tree


def rebuild(like: Tree, found: Iterator[Any]) -> Tree:
    """The inverse of `leaves`: a tree of the names of `like`, in its order."""
    if isinstance(like, dict):
        parts = {name: rebuild(like[name], found) for name in sorted(like)}
        return {name: parts[name] for name in like}
    return next(found)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """`{"a": {"b": t}}` as `{"a/b": t}`, sorted by name at every level; a bare tensor is named ''."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Tensor] = {}
    for name in sorted(tree):
        flat.update(flatten(tree[name], f"{prefix}/{name}" if prefix else name))
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
