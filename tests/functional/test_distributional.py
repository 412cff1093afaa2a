"""Distributional targets and losses: against brute force, torch, closed forms and golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlmeta.functional import distributional
from rlmeta.functional.distributional import (
    categorical_divergence,
    categorical_loss,
    categorical_projection,
    quantile_huber,
    quantile_loss,
    quantile_target,
    support,
    weighted_mean,
)

S = B = K = 4


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_projection(p: Tensor, reward: float, discount: float, low: float, high: float) -> Tensor:
    """Each atom's probability, moved and divided between its neighbours, one at a time."""
    count = len(p)
    width = (high - low) / (count - 1)
    out = torch.zeros(count, dtype=p.dtype)
    for j in range(count):
        moved = min(max(reward + discount * (low + j * width), low), high)
        for i in range(count):
            out[i] += p[j] * max(0.0, 1.0 - abs(moved - (low + i * width)) / width)
    return out


@pytest.mark.parametrize("count", [2, 3, 51])
def test_projection_is_brute_forces(count: int) -> None:
    p, reward, discount = data(S, B, count).softmax(-1), 6 * data(S, B, seed=1), torch.rand(S, B).double()
    discount[:, 0] = 0.0
    low, high = torch.tensor([-10.0, -1.0, 0.0, 2.0]).double(), torch.tensor([10.0, 1.0, 5.0, 3.0]).double()
    projected = categorical_projection(p, reward, discount, low, high)
    for s in range(S):
        alone = categorical_projection(p[s], reward[s], discount[s], float(low[s]), float(high[s]))
        torch.testing.assert_close(projected[s], alone)
        for b in range(B):
            expected = brute_projection(p[s, b], *(float(x) for x in (reward[s, b], discount[s, b], low[s], high[s])))
            torch.testing.assert_close(projected[s, b], expected)
    torch.testing.assert_close(projected.sum(-1), torch.ones(S, B).double())


def test_golden_projections() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)

    def project(reward: float, discount: float) -> list[float]:
        r, d = (torch.tensor([x], dtype=torch.float64) for x in (reward, discount))
        return categorical_projection(p, r, d, 0.0, 3.0)[0].tolist()

    assert project(0.0, 1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4])  # every atom hits itself
    assert project(1.0, 1.0) == pytest.approx([0.0, 0.1, 0.2, 0.7])  # shifted by an atom, the last one clipped
    assert project(-1.0, 1.0) == pytest.approx([0.3, 0.3, 0.4, 0.0])
    assert project(0.5, 1.0) == pytest.approx([0.05, 0.15, 0.25, 0.55])
    assert project(1.25, 0.0) == pytest.approx([0.0, 0.75, 0.25, 0.0])  # terminal: the reward alone
    assert project(3.0, 0.0) == pytest.approx([0.0, 0.0, 0.0, 1.0])  # exactly the last atom
    assert project(0.0, 0.0) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert project(99.0, 1.0) == pytest.approx([0.0, 0.0, 0.0, 1.0])
    assert project(-99.0, 0.5) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert project(0.0, 0.5) == pytest.approx([0.2, 0.6, 0.2, 0.0])


def test_a_projection_keeps_the_mean_within_the_ends() -> None:
    p, reward, discount = data(S, B, 51).softmax(-1), 0.1 * data(S, B, seed=1), torch.full((S, B), 0.9).double()
    z = support(-10.0, 10.0, p)
    mean = (categorical_projection(p, reward, discount, -10.0, 10.0) * z).sum(-1)
    torch.testing.assert_close(mean, reward + 0.9 * (p * z).sum(-1))
    assert z.tolist() == pytest.approx([-10 + 0.4 * i for i in range(51)])


def test_what_is_no_number_stays_with_its_sample() -> None:
    p, reward, discount = data(S, B, K).softmax(-1), data(S, B, seed=1), torch.full((S, B), 0.9).double()
    clean = categorical_projection(p, reward, discount, -1.0, 1.0)
    reward[1, 2], reward[2, 0] = math.nan, math.inf
    projected = categorical_projection(p, reward, discount, -1.0, 1.0)
    assert bool(projected[1, 2].isnan().any())
    assert projected[2, 0].tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0])
    reward[1, 2] = reward[2, 0] = 0.0
    others = torch.ones(S, B, dtype=torch.bool)
    others[1, 2] = others[2, 0] = False
    assert torch.equal(projected[others], clean[others])


def test_divergence_has_the_gradient_of_the_cross_entropy_and_is_zero_at_best() -> None:
    logits, target = data(S, B, K).requires_grad_(), data(S, B, K, seed=1).softmax(-1)
    target[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    cross = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
    divergence = categorical_divergence(logits, target)
    entropy = -torch.xlogy(target, target).sum(-1)
    torch.testing.assert_close(divergence, cross.reshape(S, B) - entropy)
    ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (divergence, cross))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(categorical_divergence(target[1].log(), target[1]), torch.zeros(B).double())


def test_quantile_huber_is_a_loops() -> None:
    theta, target, delta = data(S, B, 3), 2 * data(S, B, 5, seed=1), torch.tensor([0.2, 1.0, 5.0, 0.7]).double()
    error = quantile_huber(theta, target, delta)
    for s in range(S):
        for b in range(B):
            expected = 0.0
            for i in range(3):
                tau = (2 * i + 1) / 6
                for j in range(5):
                    u, d = float(target[s, b, j] - theta[s, b, i]), float(delta[s])
                    huber = 0.5 * u * u if abs(u) <= d else d * (abs(u) - 0.5 * d)
                    expected += abs(tau - (u < 0)) * huber / 5
            assert float(error[s, b]) == pytest.approx(expected)


def test_quantiles_of_a_sample_are_where_the_loss_is_least() -> None:
    sample = data(2001).sort().values.reshape(1, 1, -1)
    best = torch.quantile(sample[0, 0], (torch.arange(4, dtype=torch.float64) + 0.5) / 4).reshape(1, 1, 4)
    small = 1e-3
    theta = best.clone().requires_grad_()
    slope = torch.autograd.grad(quantile_huber(theta, sample, small).sum(), theta)[0]
    assert float(slope.abs().max()) < 2e-3 * small / small
    for i in range(4):
        for step in (-0.2, 0.2):
            moved = best.clone()
            moved[0, 0, i] += step
            assert float(quantile_huber(moved, sample, small)) > float(quantile_huber(best, sample, small))


def test_quantile_targets_end_with_the_episode() -> None:
    theta = data(1, 2, K)
    theta[0, 1] = math.inf
    target = quantile_target(theta, torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.5, 0.0]]).double())
    torch.testing.assert_close(target[0, 0], 1 + 0.5 * theta[0, 0])
    assert target[0, 1].tolist() == [2.0] * K


def test_weights_multiply_losses_and_not_what_they_are_divided_by() -> None:
    logits, target = data(S, B, K), data(S, B, K, seed=1).softmax(-1)
    theta, weight = data(S, B, K, seed=2), torch.rand(S, B).double()
    valid = torch.tensor([[True, True, False, True]] * S)
    valid[3] = False
    for loss, error in (
        (categorical_loss(logits, target, valid, weight), categorical_divergence(logits, target)),
        (quantile_loss(theta, target, 0.5, valid, weight), quantile_huber(theta, target, 0.5)),
        (weighted_mean(theta[..., 0], valid, weight), theta[..., 0]),
    ):
        for s in range(S):
            rows = [float(weight[s, b] * error[s, b]) for b in range(B) if valid[s, b]]
            assert float(loss[s]) == pytest.approx(sum(rows) / max(len(rows), 1))
    torch.testing.assert_close(categorical_loss(logits, target), categorical_divergence(logits, target).mean(-1))


def test_shapes_are_checked() -> None:
    p, row = data(S, B, K).softmax(-1), data(S, B)
    for call in (
        lambda: categorical_projection(p, row, row[:, :2], 0.0, 1.0),
        lambda: categorical_projection(p, row.unsqueeze(-1), row.unsqueeze(-1), 0.0, 1.0),
        lambda: categorical_divergence(p, p[..., :2]),
        lambda: quantile_huber(p, p[:2]),
        lambda: quantile_target(p, row, row[:2]),
        lambda: weighted_mean(row, None, row[:, :1]),
    ):
        with pytest.raises(ValueError, match="expected one shape"):
            call()


def test_every_function_is_tested_here() -> None:
    own = {name for name, f in vars(distributional).items() if getattr(f, "__module__", "") == distributional.__name__}
    assert {name for name in own if not name.startswith("_")} <= set(globals())
