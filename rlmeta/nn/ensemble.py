"""Ensembles: several copies of a block, as one more axis after the learner axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params, learner_axes


class Ensemble(Block):
    """Ensemble of n blocks with separate weights on the same input: `[*L, ..., D]` -> `[*L, n, ...]`.

    The weights are stacked, `[*L, n, ...]`, under the names of one member with the prefix `member.`, so that all
    members are computed at once, as learners are.
    """

    def __init__(self, make: Callable[[], Block], count: int) -> None:
        """Create the ensemble.

        Args:
            make: builds a member; called `count` times, so that initial weights differ.
            count: n.

        Raises:
            SettingError: `count` is below 1, or `make` returns the same block twice.
        """
        super().__init__()
        if count < 1:
            raise SettingError(f"an ensemble of {count} members, expected 1 or more")
        members = [make() for _ in range(count)]
        if len({id(member) for member in members}) < count:
            raise SettingError("an ensemble needs a function that returns a new block at every call")
        self.count = count
        parts = [list(member.modules()) for member in members]
        for same in zip(*parts, strict=True):
            _stack_tensors(same)
        self.member = members[0]

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """Outputs of all members for `x`, `[*L, n, ...]`."""
        axes = learner_axes(self, params, ctx, prefix)
        many = tree.map(lambda t: t.unsqueeze(axes).expand(*t.shape[:axes], self.count, *t.shape[axes:]), x)
        key = None if ctx.key is None else random.fold(ctx.key.unsqueeze(-1), torch.arange(self.count))
        return self.member.run(params, many, replace(ctx, key=key, learner_axes=axes + 1), f"{prefix}member.")


def _stack_tensors(same: tuple[nn.Module, ...]) -> None:
    """Stack the tensors of modules of the same form into the first of them, in place."""
    first = same[0]
    for name, value in first._parameters.items():
        if value is not None:
            stacked = torch.stack([module._parameters[name].detach() for module in same])  # type: ignore[union-attr]
            first._parameters[name] = nn.Parameter(stacked, value.requires_grad)
    for name, buffer in first._buffers.items():
        if buffer is not None:
            first._buffers[name] = torch.stack([module._buffers[name] for module in same])  # type: ignore[misc]
