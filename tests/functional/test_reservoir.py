"""Reservoir sampling: inserting a minibatch at once equals a loop over its samples."""

from __future__ import annotations

import torch

from rlmeta.functional.reservoir import last_on_place, reservoir_places


def test_places_and_their_last_samples_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for room in (1, 3, 8):
        kept, expected, met = torch.full((2, room), -1), [[-1] * room for _ in range(2)], 0
        for size in (1, 5, 2, 9, 4):
            number = met + torch.arange(1, size + 1).expand(2, size)
            drawn = (torch.rand(2, size, generator=generator) * number).long()
            for row in range(2):
                for n, place in zip(number[row].tolist(), drawn[row].tolist()):
                    if n <= room:
                        expected[row][n - 1] = n
                    elif place < room:
                        expected[row][place] = n
            last = last_on_place(reservoir_places(number, drawn, room).clamp(max=room), room)
            kept = torch.where(last >= 0, number.gather(-1, last.clamp(min=0)), kept)
            met += size
            assert kept.tolist() == expected
