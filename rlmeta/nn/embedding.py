"""Embedding: a table of vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params, share_tensors
from rlmeta.nn.initialisers import parameter


class Embedding(Block):
    """Embedding: the rows of a table, `[*L, ...]` whole numbers -> `[*L, ..., D]`.

    The weight `[*L, n, D]` has torch's name and shape. The row of `padding` is zeros at first and has no gradient.
    """

    weight: nn.Parameter

    def __init__(self, count: int, features: int, padding: int | None = None) -> None:
        """Create the table with standard normal numbers.

        Args:
            count: n, the number of rows.
            features: D, the size of a row.
            padding: index of the row that is not trained, in [-n, n); None for none.

        Raises:
            SettingError: the table is empty, or `padding` is no row of it.
        """
        super().__init__()
        if count < 1 or features < 1 or (padding is not None and not -count <= padding < count):
            raise SettingError(
                f"an embedding of {count} rows of {features} numbers with the padding {padding}: expected 1 or more of "
                "each, and one of the rows"
            )
        self._padding = padding if padding is None else padding % count
        self.weight = parameter(count, features)
        with torch.no_grad():
            self.weight.normal_()
            if self._padding is not None:
                self.weight[self._padding] = 0.0

    @classmethod
    def from_torch(cls, module: nn.Embedding) -> Embedding:
        """Create a block that shares the table of torch's module.

        Raises:
            SettingError: its forward pass writes to its weights (`max_norm`), or its gradients are no plain ones.
        """
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise SettingError(
                "an embedding with max_norm writes to its weights in place, and with scale_grad_by_freq or sparse its "
                "gradients are none that all learners can share: leave these options out"
            )
        block = cls(1, 1)
        block._padding = module.padding_idx
        share_tensors(block, module)
        return block

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Look up the rows of `x`, whole numbers in [0, n): `[*L, ...]` -> `[*L, ..., D]`."""
        weight = params[f"{prefix}weight"]
        learners, (count, features) = weight.shape[:-2], weight.shape[-2:]
        axes = len(learners)
        if x.shape[:axes] != learners or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}, expected whole numbers with the learner axes "
                f"{tuple(learners)} in front"
            )
        index = x.long()
        if axes:  # one table of all learners' rows
            first = count * torch.arange(learners.numel(), device=x.device)
            index = index + first.reshape(*learners, *(1,) * (x.dim() - axes))
        out = F.embedding(index, weight.reshape(-1, features))
        return out if self._padding is None else torch.where((x == self._padding).unsqueeze(-1), out.detach(), out)
