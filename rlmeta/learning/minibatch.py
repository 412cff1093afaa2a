"""Cut a rollout into minibatches, each learner by its own permutation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlmeta.functional import random, tree


def flatten_time(rollout: tree.Tree, learner_axes: int) -> tree.Tree:
    """`[*L, T, N, ...]` as `[*L, T * N, ...]`, leaf by leaf."""
    return tree.map(lambda x: x.flatten(learner_axes, learner_axes + 1), rollout)


def gather(batch: tree.Tree, index: Tensor) -> tree.Tree:
    """Rows `index` `[*L, B]` of every leaf `[*L, M, ...]`, each learner its own: `[*L, B, ...]`."""
    axes = index.dim() - 1
    rows = {}

    def pick(x: Tensor) -> Tensor:
        size = x.shape[axes]
        if size not in rows:
            first = torch.arange(index[..., 0].numel(), device=index.device) * size
            rows[size] = (index.reshape(-1, index.shape[-1]) + first.unsqueeze(-1)).flatten()
        picked = x.reshape(-1, *x.shape[axes + 1 :]).index_select(0, rows[size])
        return picked.reshape(*index.shape, *x.shape[axes + 1 :])

    return tree.map(pick, batch)


def minibatches(key: Tensor, epoch: int | Tensor, batch: tree.Tree, batch_size: int) -> Iterator[tree.Tree]:
    """One epoch over the samples `[*L, M, ...]` in minibatches `[*L, batch_size, ...]`.

    A single minibatch keeps the samples' order: a mean does not depend on it.

    Args:
        key: `[*L]`.
        epoch: counts the epochs of the whole run, a number or `[*L]`.
        batch: every leaf `[*L, M, ...]`.
        batch_size: divides M.
    """
    axes = key.dim()
    samples = next(tree.leaves(batch)).shape[axes]
    if batch_size == samples:
        yield batch
        return
    order = random.permutation(key, "minibatch", epoch, samples)
    for index in torch.split(order, batch_size, -1):
        yield gather(batch, index)
