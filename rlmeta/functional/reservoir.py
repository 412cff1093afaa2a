"""Reservoir sampling (Vitter, 1985, algorithm R): of a stream of any length every sample is kept with the same chance.

The n-th sample of a stream is kept while there is room; later it replaces slot j, drawn uniformly from [0, n), if the
reservoir has that slot. A minibatch is inserted at once here, with the same result as a loop over its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reservoir_places(number: Tensor, drawn: Tensor, room: int) -> Tensor:
    """Slot of the reservoir that each sample of a stream takes, `[..., B]` int64; `room` or more for none.

    Args:
        number: the sample's number n in its stream, from 1, `[..., B]` int64.
        drawn: a random integer in [0, n), `[..., B]` int64.
        room: capacity of the reservoir.
    """
    return torch.where(number <= room, number - 1, drawn)


def last_on_place(place: Tensor, places: int) -> Tensor:
    """Index of the last sample of a minibatch that takes each slot, `[..., places]` int64; -1 for none.

    Args:
        place: slot that each sample takes, `[..., B]` int64 in [0, places]; `places` itself stands for none.
        places: number of slots.
    """
    order = torch.arange(place.shape[-1], device=place.device).expand(place.shape)
    winner = place.new_full((*place.shape[:-1], places + 1), -1).scatter_reduce(-1, place, order, "amax")
    return winner[..., :places]
