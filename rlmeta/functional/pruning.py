"""Magnitude pruning: which of the weights that are still free a task keeps."""

from __future__ import annotations

from torch import Tensor


def largest_free(size: Tensor, free: Tensor, count: Tensor) -> Tensor:
    """Select the `count` largest free entries, as a mask `[*L, P]`; of equal ones the first.

    Args:
        size: magnitude of each weight, 0 or more, `[*L, P]`.
        free: which entries may be chosen, `[*L, P]` bool.
        count: number of entries, at most the number of free ones, `[*L, 1]` int64.
    """
    order = size.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) < count
