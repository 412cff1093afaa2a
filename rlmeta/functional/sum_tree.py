"""Sum tree: weights of which one can be changed, and one drawn in proportion, without a pass over all of them.

A tree of three levels with F children each: the leaves `[*L, M * F, F]`, their sums by rows `[*L, M, F]`, and those
sums' sums `[*L, 1, M]`. A draw looks at F numbers of each level, where a cumulative sum passes over all leaves.

Sums are float64 and always of the present children, never of differences: in single precision a weight of 0.001 behind
100,000 of 1 vanishes, and differences pile up errors.

Source: the trees of Schaul et al., "Prioritized Experience Replay", 2016, appendix B.2.1.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Levels: TypeAlias = dict[str, Tensor]
"""The levels of a tree: `leaves` `[*L, M * F, F]`, `rows` `[*L, M, F]` and `root` `[*L, 1, M]`, all float64."""

_BELOW_ONE = 1.0 - 2.0**-52
"""What a sum is multiplied by to get a number below it."""


def build(weights: Tensor) -> Levels:
    """Build the tree of weights.

    Args:
        weights: `[*L, n]`, 0 or more.

    Returns:
        The levels; leaves beyond n are 0.
    """
    count = weights.shape[-1]
    fan_out = math.ceil(round(count ** (1 / 3), 6))
    top = math.ceil(count / fan_out**2)
    padded = F.pad(weights.double(), (0, top * fan_out**2 - count))
    leaves = padded.reshape(*weights.shape[:-1], top * fan_out, fan_out)
    rows = leaves.sum(-1).reshape(*weights.shape[:-1], top, fan_out)
    return {"leaves": leaves, "rows": rows, "root": rows.sum(-1).unsqueeze(-2)}


def weights_of(levels: Levels, count: int) -> Tensor:
    """The first `count` weights of a tree, `[*L, count]` float64."""
    return levels["leaves"].flatten(-2)[..., :count]


def total(levels: Levels) -> Tensor:
    """Sum of all weights, `[*L]` float64."""
    return levels["root"].sum((-2, -1))


def find(levels: Levels, share: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the cumulative sum of the weights passes shares of its total: an inverse distribution function.

    Args:
        levels: of `build`.
        share: numbers in [0, 1), `[*L, B]` float64; of uniform ones a weight is found in proportion to it.

    Returns:
        The index of a weight and the weight, `[*L, B]` each. It is 0 only where all weights of a learner are, or are
        not numbers.
    """
    node, rest = torch.zeros_like(share, dtype=torch.int64), share * total(levels).unsqueeze(-1)
    for name in ("root", "rows", "leaves"):
        children = _gather(levels[name], node)
        ends = children.cumsum(-1)
        # rounding may leave more than there is: the last weight above 0 is found then, never one of 0 behind it
        rest = torch.minimum(rest, ends[..., -1] * _BELOW_ONE)
        passed = (ends <= rest.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=children.shape[-1] - 1)
        before = ends.gather(-1, (passed - 1).clamp(min=0))
        rest = (rest - torch.where(passed > 0, before, 0.0).squeeze(-1)).clamp(min=0.0)
        node = node * children.shape[-1] + passed.squeeze(-1)
    return node, children.gather(-1, passed).squeeze(-1)


def replace(levels: Levels, index: Tensor, weight: Tensor) -> Levels:
    """Replace weights; of one index that stands several times the weights must be equal.

    Args:
        levels: of `build`; not written to.
        index: `[*L, B]`.
        weight: `[*L, B]`.

    Returns:
        The levels of a new tree.
    """
    changed, node, value = {}, index, weight.double()
    for name in ("leaves", "rows", "root"):
        level = levels[name]
        width = level.shape[-1]
        new = changed[name] = level.flatten(-2).scatter(-1, node, value).reshape(level.shape)
        node = node.div(width, rounding_mode="floor")
        value = _gather(new, node).sum(-1)
    return changed


def _gather(level: Tensor, node: Tensor) -> Tensor:
    """Rows `node` `[*L, B]` of a level `[*L, n, F]`: `[*L, B, F]`."""
    learners, count = level.shape[:-2], level.shape[-2]
    first = torch.arange(learners.numel(), device=level.device).reshape(*learners, 1) * count
    return level.reshape(-1, level.shape[-1]).index_select(0, (node + first).flatten()).reshape(*node.shape, -1)
