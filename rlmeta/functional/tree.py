"""Trees: nested dictionaries of tensors, such as states, rollouts and observations.

Leaves are paired by name; the insertion order of a dictionary never matters.
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
        A tree with the names of `tree`, in its order.

    Raises:
        SettingError: the names of another tree differ.
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
    """Error of two trees whose names or nesting differ."""
    if not (isinstance(tree, dict) and isinstance(other, dict)):
        first, second = ("a dictionary" if isinstance(node, dict) else type(node).__name__ for node in (tree, other))
        return SettingError(f"trees of different form can't be paired: {first} against {second} at the same place")
    lacks, has = sorted(tree.keys() - other.keys()), sorted(other.keys() - tree.keys())
    differences = [f"the second lacks {', '.join(lacks)}"] if lacks else []
    differences += [f"the first lacks {', '.join(has)}"] if has else []
    return SettingError(f"trees with different names can't be paired: {'; '.join(differences)}")


def leaves(tree: Tree) -> Iterator[Tensor]:
    """Leaves of a tree, sorted by name at every level, so that equal trees give them in one order."""
    if isinstance(tree, dict):
        for name in sorted(tree):
            yield from leaves(tree[name])
    else:
        yield tree


def rebuild(like: Tree, leaf_iterator: Iterator[Any]) -> Tree:
    """Inverse of `leaves`: a tree with the names of `like`, in its order."""
    if isinstance(like, dict):
        parts = {name: rebuild(like[name], leaf_iterator) for name in sorted(like)}
        return {name: parts[name] for name in like}
    return next(leaf_iterator)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Flatten `{"a": {"b": t}}` to `{"a/b": t}`, sorted by name at every level; a bare tensor is named ''."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Tensor] = {}
    for name in sorted(tree):
        flat.update(flatten(tree[name], f"{prefix}/{name}" if prefix else name))
    return flat


def unflatten(flat: dict[str, Tensor]) -> Tree:
    """Inverse of `flatten` (empty dictionaries are lost)."""
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
