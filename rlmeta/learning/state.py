"""Everything a run is, in one explicit value: a nested dictionary of tensors whose leaves all start with `*L`.

Because every leaf carries the learner axes, an index forks, exports or drops learners (`take`), and a learner can be
put back where it was (`put`).

| entry | what it holds |
|---|---|
| `params` | what a forward pass needs: `weights`, `buffers` (frozen parameters, batch-norm statistics, target networks), `normalisers`, `hyper` (settings `[*L]`) |
| `optimizer` | the optimizer's moments |
| `key` | the learner's random key, `[*L]` int64 |
| `count` | iterations, steps of the world and of the environments, gradient steps so far, steps on the task, `[*L]` |
| `progress` | fraction of the budget that is spent, `[*L]` |
| `active` | False for a learner that is frozen (not finite, stopped early), `[*L]` |
| `world`, `memory`, `episode` | environments, the agent's memory, the running episodes, `[*L, N, ...]` |
| `replay`, `rewards` | transitions an agent learns from again, `[*L, C, N, ...]`; what its rewards remember |
| `methods`, `task` | the lifelong methods' memories; index, identity and progress of the task as methods are told them |
| `stage`, `identity`, `matrix` | of a run on a stream: how many stages have begun, which task the world is set to, `[*L]` each, and the scores on all tasks |
| `metrics`, `best` | sums since the last line of records; score and parameters of the best periodic evaluation |
"""  # noqa: E501

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlmeta.functional import tree

State: TypeAlias = dict[str, Any]
"""Nested dictionary of tensors; every leaf starts with the learner axes."""

Params: TypeAlias = dict[str, Any]
"""A state's `params`: what a forward pass needs and what a gradient changes."""


def take(state: State, index: Any) -> State:
    """The chosen learners of a state, copied: `index` is anything that indexes the first learner axis."""
    return tree.map(lambda leaf: leaf[index].clone(), state)


def put(state: State, index: Any, part: State) -> State:
    """A copy of `state` whose learners `index` are those of `part`."""

    def write(leaf: Tensor, value: Tensor) -> Tensor:
        leaf = leaf.clone()
        leaf[index] = value
        return leaf

    return tree.map(write, state, part)


def select(condition: Tensor, new: State, old: State) -> State:
    """`new` for the learners where `condition` `[*L]` is set, `old` for the others."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(condition.shape + (1,) * (a.dim() - condition.dim())), a, b)

    return tree.map(choose, new, old)


def in_order(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named weights in the order of others that have the same names; those that lie in it come back as they are."""
    return weights if list(weights) == list(like) else {name: weights[name] for name in like}


class Packed(dict[str, Tensor]):
    """Named weights `[*L, ...]` that are views of one flat tensor `[*L, P]`.

    Optimizers, clipping and masks are elementwise or norms, so they run once on `flat` where they would otherwise run
    once for every weight; for small networks that is most of the time of a step.

    In `flat` weights lie in the order of the names, and so do moments, gradients and masks `[*L, P]`. A run keeps the
    order in which it began: what comes back from elsewhere is put in it by name (`in_order`).
    """

    flat: Tensor
    shapes: list[torch.Size]
    """Of every weight of one learner."""

    @staticmethod
    def of(weights: dict[str, Tensor], learner_axes: int) -> Packed:
        """Pack named weights; those that are packed already come back as they are."""
        if isinstance(weights, Packed):
            return weights
        learner_shape = next(iter(weights.values())).shape[:learner_axes]
        flat = torch.cat([w.detach().reshape(*learner_shape, -1) for w in weights.values()], -1)
        return Packed.view(flat, weights, learner_axes)

    @staticmethod
    def like(weights: dict[str, Tensor], packed: dict[str, Tensor], learner_axes: int) -> Packed:
        """Pack named weights in the order of others that have the same names."""
        return Packed.of(in_order(weights, packed), learner_axes)

    @staticmethod
    def view(flat: Tensor, like: dict[str, Tensor], learner_axes: int) -> Packed:
        """The tensor `flat` seen under the names and shapes of `like`; gradients flow through.

        `like` may be of other learners than `flat`.
        """
        packed, learner_shape = Packed(), flat.shape[:-1]
        packed.flat = flat
        shapes = like.shapes if isinstance(like, Packed) else [w.shape[learner_axes:] for w in like.values()]
        packed.shapes = shapes
        pieces = torch.split(flat, [shape.numel() for shape in shapes], -1)
        for name, shape, piece in zip(like, shapes, pieces):
            packed[name] = piece.view(learner_shape + shape)
        return packed
