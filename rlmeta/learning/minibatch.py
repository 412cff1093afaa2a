"""Minibatches of a rollout: every learner shuffles its samples by its own permutation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlmeta.functional import random, tree


def flatten_time(rollout: tree.Tree, learner_axes: int) -> tree.Tree:
    """Flatten time and environments, `[*L, T, N, ...]` -> `[*L, T * N, ...]`, leaf by leaf."""
    return tree.map(lambda x: x.flatten(learner_axes, learner_axes + 1), rollout)


def gather(batch: tree.Tree, index: Tensor) -> tree.Tree:
    """Gather the rows `index` `[*L, B]` of every leaf `[*L, M, ...]`, each learner its own: `[*L, B, ...]`."""
    axes = index.dim() - 1
    rows = {}

    def rows_of(x: Tensor) -> Tensor:
        size = x.shape[axes]
        if size not in rows:
            first = torch.arange(index[..., 0].numel(), device=index.device) * size
            rows[size] = (index.reshape(-1, index.shape[-1]) + first.unsqueeze(-1)).flatten()
        picked = x.reshape(-1, *x.shape[axes + 1 :]).index_select(0, rows[size])
        return picked.reshape(*index.shape, *x.shape[axes + 1 :])

    return tree.map(rows_of, batch)


@dataclass(frozen=True)
class Minibatches:
    """Iterator over minibatches `[*L, B, ...]` of a batch of samples."""

    batch: tree.Tree
    """Samples, every leaf `[*L, M, ...]`."""
    count: int
    """Number of minibatches."""
    order: Tensor | None
    """Indices of the samples of each minibatch, `[count, *L, B]`; None if each minibatch has all."""

    def __iter__(self) -> Iterator[tree.Tree]:
        for index in self.order if self.order is not None else [None] * self.count:
            yield pick(self.batch, index)


def pick(batch: tree.Tree, index: Tensor | None) -> tree.Tree:
    """Gather the rows of a minibatch; the whole batch if there is no index."""
    return batch if index is None else gather(batch, index)


def minibatches(key: Tensor, epoch: int | Tensor, batch: tree.Tree, batch_size: int, epochs: int = 1) -> Minibatches:
    """Shuffle samples `[*L, M, ...]` into minibatches `[*L, batch_size, ...]` for several epochs.

    A single minibatch keeps the samples' order: a mean does not depend on it.

    Args:
        key: `[*L]`.
        epoch: counts the epochs of the whole run, a number or `[*L]`; of the first of these.
        batch: every leaf `[*L, M, ...]`.
        batch_size: divides M.
        epochs: how many.
    """
    samples = next(tree.leaves(batch)).shape[key.dim()]
    if batch_size == samples:
        return Minibatches(batch, epochs, None)
    numbers = torch.arange(epochs, device=key.device).reshape(-1, *(1,) * key.dim()) + epoch
    order = random.permutation(key, "minibatch", numbers, samples)  # [epochs, *L, M]
    pieces = order.reshape(*order.shape[:-1], samples // batch_size, batch_size).movedim(-2, 1).flatten(0, 1)
    pieces = pieces.contiguous()  # of one epoch it is a view
    return Minibatches(batch, len(pieces), pieces if epochs else None)
