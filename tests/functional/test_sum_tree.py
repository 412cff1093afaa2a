"""Sum tree: what a cumulative sum finds, weights replaced, and the digits that single precision would lose."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import sum_tree, tree

S = 3


def weights(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(S, count, generator=g, dtype=torch.float64)
    return torch.where(torch.rand(S, count, generator=g) < 0.3, torch.zeros_like(w), w)


@pytest.mark.parametrize("count", [1, 2, 7, 27, 64, 100, 1001])
def test_finds_what_a_cumulative_sum_finds(count):
    w = weights(count)
    w[:, -1] = 0.25
    levels = sum_tree.build(w)
    share = torch.rand(S, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index, weight = sum_tree.find(levels, share)
    ends = w.cumsum(-1)
    expected = torch.searchsorted(ends, share * ends[:, -1:], right=True)
    assert torch.equal(index, expected)
    assert torch.equal(weight, w.gather(-1, index))
    torch.testing.assert_close(sum_tree.total(levels), w.sum(-1))
    assert torch.equal(sum_tree.weights_of(levels, count), w)


def test_weights_of_zero_are_never_found_whatever_the_rounding():
    w = torch.zeros(S, 1000)
    w[:, 10] = w[:, 499] = 0.1
    levels = sum_tree.build(w)
    share = torch.cat([torch.linspace(0, 1, 999).double(), torch.tensor([1.0 - 2**-53])]).double().expand(S, -1)
    index, weight = sum_tree.find(levels, share)
    assert set(index.flatten().tolist()) == {10, 499} and bool((weight > 0).all())


def test_no_weights_and_no_numbers_are_found_without_an_error():
    w = weights(50)
    w[0], w[1, 7] = 0.0, torch.nan
    index, weight = sum_tree.find(sum_tree.build(w), torch.rand(S, 20).double())
    assert bool((index >= 0).all()) and bool((index < 64).all())
    assert bool((weight[0] == 0).all()) and bool((weight[2] > 0).all())


@pytest.mark.parametrize("count", [5, 100, 1001])
def test_a_changed_tree_is_that_of_the_changed_weights(count):
    w = weights(count)
    levels = first = sum_tree.build(w)
    kept = tree.map(torch.clone, first)
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        index = torch.randint(0, count, (S, 16), generator=g)
        index[:, 1] = index[:, 0]
        value = torch.rand(S, 16, generator=g)
        value[:, 1] = value[:, 0]
        for s in range(S):
            for b in range(16):
                w[s, index[s, b]] = value[s, b].double()
        last = {int(i): float(v) for i, v in zip(index[0], value[0])}
        value = w.gather(-1, index)  # of an index that is drawn twice the last value counts
        levels = sum_tree.replace(levels, index, value)
        assert float(sum_tree.weights_of(levels, count)[0, next(iter(last))]) == pytest.approx(last[next(iter(last))])
    expected = sum_tree.build(w)
    for name in ("leaves", "rows", "root"):
        assert torch.equal(levels[name], expected[name]), "sums are of the present weights, so errors do not pile up"
        assert torch.equal(first[name], kept[name])


def test_small_weights_among_a_hundred_thousand_large_ones_are_found():
    """In single precision they vanish beside the sum of those before them."""
    count = 100_000
    w = torch.where(torch.arange(count) % 2 == 0, 1.0, 1e-3).unsqueeze(0)
    ends = w.double().cumsum(-1)
    share = (ends - 0.5 * w.double()) / ends[:, -1:]
    index, weight = sum_tree.find(sum_tree.build(w), share)
    assert torch.equal(index[0], torch.arange(count)) and torch.equal(weight.float(), w)
    single = ends.float()
    lost = torch.searchsorted(single, share.float() * single[:, -1:], right=True)
    assert int((lost[0] != torch.arange(count)).sum()) > 10_000


def test_learners_do_not_share_weights():
    w = weights(100)
    levels = sum_tree.build(w)
    share = torch.rand(S, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    index, _ = sum_tree.find(levels, share)
    changed = sum_tree.replace(levels, index, torch.ones(S, 30))
    for s in range(S):
        alone = sum_tree.build(w[s])
        assert torch.equal(sum_tree.find(alone, share[s])[0], index[s])
        single = sum_tree.replace(alone, index[s], torch.ones(30))
        for name in single:
            assert torch.equal(single[name], changed[name][s])
