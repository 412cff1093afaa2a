"""Reservoir sampling (Vitter, 1985, algorithm R): of a stream of any length every sample is kept with the same chance.

The n-th sample of a stream is taken while there is room; later it replaces a place drawn from n, if that is one of the
reservoir's. Here a minibatch is offered at once, with the result of a loop over its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reservoir_places(number: Tensor, drawn: Tensor, room: int) -> Tensor:
    """The place that each sample of a stream takes in its reservoir, `[..., B]`; `room` or more for none.

    Args:
        number: the sample's number n in its stream, from 1, `[..., B]` int64.
        drawn: a random integer in [0, n), `[..., B]` int64.
        room: how many places the reservoir has.
    """
    return torch.where(number <= room, number - 1, drawn)


def last_on_place(place: Tensor, places: int) -> Tensor:
    """The last sample of a minibatch that falls on each place, as in a loop, `[..., places]` int64; -1 for none.

    Args:
        place: where each sample falls, `[..., B]` int64 in [0, places]; `places` itself stands for none.
        places: how many there are.
    """
    order = torch.arange(place.shape[-1], device=place.device).expand(place.shape)
    winner = place.new_full((*place.shape[:-1], places + 1), -1).scatter_reduce(-1, place, order, "amax")
    return winner[..., :places]
