"""Magnitude pruning: the largest of the free weights."""

from __future__ import annotations

import torch

from rlmeta.functional.pruning import largest_free


def test_the_largest_free_entries_of_every_learner_and_the_first_of_equal_ones() -> None:
    size = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 9.0]])
    free = torch.tensor([[False, True, True, True], [True, True, True, True]])
    chosen = largest_free(size, free, torch.tensor([[3], [2]]))
    assert chosen.tolist() == [[False, True, True, True], [True, False, False, True]]
    assert not largest_free(size, free, torch.zeros(2, 1, dtype=torch.int64)).any()
