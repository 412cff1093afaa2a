"""Flat parameters: named weights as views of one flat tensor, paired by name and never by position."""

from __future__ import annotations

import torch
from torch import Tensor


def in_order(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Order named weights as in `like`, which has the same names; weights in that order are returned as they are."""
    return weights if list(weights) == list(like) else {name: weights[name] for name in like}


class Packed(dict[str, Tensor]):
    """Flat parameters `[*L, P]` that are also a dictionary of named weights `[*L, ...]`, views of the flat tensor.

    Optimizers, clipping and masks are elementwise or norms, so they run once on `flat` where they would otherwise run
    once for every weight; for small networks that is most of the time of a step.

    In `flat` weights lie in the order of the names, and so do moments, gradients and masks `[*L, P]`. A run keeps the
    order in which it began: weights from elsewhere are put in that order by name (`in_order`).
    """

    flat: Tensor
    """`[*L, P]`."""
    shapes: list[torch.Size]
    """Shape of every weight, without learner axes."""

    @staticmethod
    def of(weights: dict[str, Tensor], learner_axes: int) -> Packed:
        """Pack named weights `[*L, ...]`, detached; weights that are packed already are returned as they are."""
        if isinstance(weights, Packed):
            return weights
        learner_shape = next(iter(weights.values())).shape[:learner_axes]
        flat = torch.cat([w.detach().reshape(*learner_shape, -1) for w in weights.values()], -1)
        return Packed.view(flat, weights, learner_axes)

    @staticmethod
    def like(weights: dict[str, Tensor], packed: dict[str, Tensor], learner_axes: int) -> Packed:
        """Pack named weights in the order of `packed`, which has the same names."""
        return Packed.of(in_order(weights, packed), learner_axes)

    @staticmethod
    def view(flat: Tensor, like: dict[str, Tensor], learner_axes: int) -> Packed:
        """View of a flat tensor under the names and shapes of `like`; gradients flow through.

        Args:
            flat: `[*L, P]`.
            like: named weights, whose learner axes may be others than those of `flat`.
            learner_axes: number of learner axes of the weights of `like`.
        """
        packed, learner_shape = Packed(), flat.shape[:-1]
        packed.flat = flat
        shapes = like.shapes if isinstance(like, Packed) else [w.shape[learner_axes:] for w in like.values()]
        packed.shapes = shapes
        pieces = torch.split(flat, [shape.numel() for shape in shapes], -1)
        for name, shape, piece in zip(like, shapes, pieces):
            packed[name] = piece.view(learner_shape + shape)
        return packed
