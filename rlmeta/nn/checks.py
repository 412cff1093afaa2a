"""Checks of a user's network, by calling it: rows must be independent, and calls must not depend on earlier calls.

Learners and environments share the calls of a network. It mixes rows if it takes the batch axis for another (time, in a
recurrent layer without `batch_first`) or normalises over it; it has memory if it changes an attribute in a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.nn.block import Block, Context, NeedsKey, Params


@torch.no_grad()
def check_block(block: Block, x: tree.Tree, other: tree.Tree, *, rows: bool = True, key: Tensor | None = None) -> None:
    """Refuse a block whose features of a row are no function of that row alone.

    Args:
        block: from a batch to features `[B, D]`; runs on its own tensors.
        x: a batch of inputs `[B, ...]`, B at least 2.
        other: another one of the same shapes.
        rows: whether rows must be independent in evaluation; not with batch statistics instead of running ones.
        key: random key of the learner's training, None if it has none.

    Raises:
        SettingError: it writes to its input, mixes rows, keeps memory between calls, or draws random numbers without
            a key.
    """
    tensors = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    params = {name: value.detach() for name, value in tensors}
    _check_repeats(block, params, x, other, Context(learner_axes=0), "in evaluation")
    _check_repeats(block, params, x, other, Context(training=True, key=key, learner_axes=0), "in training")
    if rows:
        _check_rows(block, params, x, other)


def _check_repeats(block: Block, params: Params, x: tree.Tree, other: tree.Tree, ctx: Context, when: str) -> None:
    """Refuse a block that gives other features for the same batch after a call with another batch."""

    def features(x: tree.Tree) -> Tensor:
        fresh = Context(training=ctx.training, key=ctx.key, learner_axes=0)
        outputs: Tensor = block.run(params, x, fresh)
        return outputs

    kept = tree.map(torch.clone, x)
    try:
        first = features(x)
        if not all(torch.equal(now, before) for now, before in zip(tree.leaves(x), tree.leaves(kept))):
            raise SettingError(
                "it writes to its observations in place, which replay memories and records still need: begin with "
                "an operation that gives a new tensor, such as x.clamp(min=0) or ReLU(inplace=False)"
            )
        _, again = features(other), features(x)
    except NeedsKey:
        raise SettingError(
            f"it draws random numbers {when}, for which its learner has no key: leave dropout and noise out, or put "
            "them in eval() (Classifier and Regressor have a key in training)"
        ) from None
    if not _equal(first, again):
        raise SettingError(
            f"it gives other features when it is called {when} with the same observations again, so it keeps memory "
            "between calls or draws numbers outside of torch: its features may depend on the observations alone"
        )


def _check_rows(block: Block, params: Params, x: tree.Tree, other: tree.Tree) -> None:
    """Refuse a block in which changing the first or the last row changes the features of other rows."""

    def features(x: tree.Tree) -> Tensor:
        outputs: Tensor = block.run(params, x, Context(learner_axes=0))
        return outputs

    count, before = len(next(tree.leaves(x))), features(x)
    for row in range(count):
        for place, rest in ((0, slice(1, None)), (-1, slice(0, -1))):
            changed = features(_with_row(x, place, other, row))
            if not _equal(before[rest], changed[rest]):
                raise SettingError(
                    "it mixes the rows of its batch: with another observation in one row, the features of other rows "
                    "change, and every row is an environment, or a sample, of its own. A recurrent or attention layer "
                    "needs batch_first=True and an axis of time of its own, x.unsqueeze(1); a batch normalisation "
                    "needs running statistics (track_running_stats=True)"
                )


def _with_row(x: tree.Tree, place: int, other: tree.Tree, row: int) -> tree.Tree:
    """Copy a batch, with the row at `place` replaced by row `row` of another batch."""

    def put(a: Tensor, b: Tensor) -> Tensor:
        changed = a.clone()
        changed[place] = b[row]
        return changed

    return tree.map(put, x, other)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether features are equal up to rounding, relative to the largest."""
    a, b = a.double(), b.double()
    scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-6 * scale).all())
