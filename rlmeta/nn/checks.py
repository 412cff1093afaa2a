"""What a user's network must not do, since learners and environments share its calls: found by calling it.

A network mixes rows where it takes the batch for something else (time, in a recurrent layer without `batch_first`), or
normalises over it; it remembers where it keeps an attribute from one call to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.nn.block import Block, Context, NeedsKey, Params


@torch.no_grad()
def check_block(block: Block, x: tree.Tree, other: tree.Tree, *, rows: bool = True, key: Tensor | None = None) -> None:
    """Refuse a block that is no function of its rows.

    Args:
        block: from a batch to features `[B, D]`; runs on its own tensors.
        x: a batch of inputs `[B, ...]`, B at least 2.
        other: another one of the same shapes.
        rows: whether a row's features must depend on that row alone, as in evaluation everywhere but where a batch's
            own statistics are asked for.
        key: what its learner's training draws from, None if it has nothing.

    Raises:
        SettingError: it writes to its input, mixes rows, remembers a call in the next one, or draws random numbers
            without a key.
    """
    tensors = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    params = {name: value.detach() for name, value in tensors}
    _check_repeats(block, params, x, other, Context(learner_axes=0), "in evaluation")
    _check_repeats(block, params, x, other, Context(training=True, key=key, learner_axes=0), "in training")
    if rows:
        _check_rows(block, params, x, other)


def _check_repeats(block: Block, params: Params, x: tree.Tree, other: tree.Tree, ctx: Context, when: str) -> None:
    """One batch, another, and the first again."""

    def features(x: tree.Tree) -> Tensor:
        fresh = Context(training=ctx.training, key=ctx.key, learner_axes=0)
        found: Tensor = block.run(params, x, fresh)
        return found

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
    """Change the first row, then the last, and look at the others."""

    def features(x: tree.Tree) -> Tensor:
        found: Tensor = block.run(params, x, Context(learner_axes=0))
        return found

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
    """A copy of the batch in which the row at `place` is that of another batch."""

    def put(a: Tensor, b: Tensor) -> Tensor:
        changed = a.clone()
        changed[place] = b[row]
        return changed

    return tree.map(put, x, other)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether features are the same up to rounding, of their largest."""
    a, b = a.double(), b.double()
    scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-6 * scale).all())
