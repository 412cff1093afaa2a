"""Meta-gradient estimators on an unroll whose gradient is known."""

from __future__ import annotations

import torch

from rlmeta.functional import random
from rlmeta.meta.estimators import backpropagated, evolved

HORIZON, PIECE = 12, 3
THETA = {"a": torch.tensor([[0.3, -0.2]], dtype=torch.float64)}  # one learner, two meta-parameters


def unroll(steps):
    """x ← 0.9 x + θ₀ + x² θ₁ / 10, loss (x − 1)²: what θ did early goes on to the end."""

    def run(theta, carry):
        x, total = carry["x"], 0.0
        a = theta["a"] if theta["a"].dim() == 3 else theta["a"].unsqueeze(1)
        for _ in range(steps):
            x = 0.9 * x + a[..., 0] + 0.1 * x * x * a[..., 1]
            total = total + (x - 1.0).square()
        return total / steps, {"x": x}

    return run


def start(count):
    return {"x": torch.full((1, count), 2.0, dtype=torch.float64)}


def true_gradient():
    leaf = THETA["a"].clone().requires_grad_()
    loss, _ = backpropagated(unroll(HORIZON), {"a": leaf}, start(1))
    return torch.autograd.grad(loss.sum(), leaf)[0][0]


def truncated_gradient(piece):
    leaf, carry, total = THETA["a"].clone().requires_grad_(), start(1), 0.0
    for _ in range(HORIZON // piece):
        loss, carry = backpropagated(unroll(piece), {"a": leaf}, carry)
        total = total + torch.autograd.grad(loss.sum(), leaf)[0][0] / (HORIZON // piece)
    return total


def evolution_estimates(seeds, count, persistent, piece=PIECE, sigma=0.01):
    """Estimates of `seeds` independent learners, `[seeds, 2]`, each the mean over the pieces of one whole unroll."""
    keys = random.make_keys(range(seeds))
    theta = {"a": THETA["a"].expand(seeds, 2).clone()}
    carry = {"x": start(count)["x"].expand(seeds, count).clone()}
    accumulator = torch.zeros(seeds, count, 2, dtype=torch.float64) if persistent else None
    total = torch.zeros(seeds, 2, dtype=torch.float64)
    for i in range(HORIZON // piece):
        found = evolved(unroll(piece), theta, carry, keys, i, sigma, accumulator)
        carry, total = found.carry, total + found.gradient / (HORIZON // piece)
        accumulator = found.accumulator if persistent else None
    return total


def test_truncation_at_the_horizon_is_the_whole_gradient_and_below_it_is_biased():
    torch.testing.assert_close(truncated_gradient(HORIZON), true_gradient())
    gap = (truncated_gradient(PIECE) - true_gradient()).abs() / true_gradient().abs()
    assert (gap > 0.3).all()


def test_pes_is_unbiased_where_truncated_es_and_truncated_backpropagation_are_not():
    expected = true_gradient()
    for persistent in (True, False):
        found = evolution_estimates(4000, 8, persistent)
        error = found.std(0) / len(found) ** 0.5
        off = ((found.mean(0) - expected) / error).abs()
        assert (off < 3.5).all() if persistent else (off > 20).all()
        if not persistent:  # what ES on pieces does estimate is the truncated gradient
            torch.testing.assert_close(found.mean(0), truncated_gradient(PIECE), rtol=0.05, atol=0.05)


def test_pes_on_the_whole_unroll_is_es():
    pes, es = (evolution_estimates(3, 8, persistent, piece=HORIZON) for persistent in (True, False))
    assert torch.equal(pes, es)


def test_es_goes_to_the_true_gradient_as_sigma_goes_to_0():
    found = evolution_estimates(4000, 8, False, piece=HORIZON, sigma=1e-4)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - true_gradient()) / error).abs().max() < 3.5


def test_an_accumulator_of_zero_forgets_what_was_before():
    key, carry = random.make_keys([0]), start(4)
    kept = evolved(unroll(PIECE), THETA, carry, key, 0, 0.01, torch.zeros(1, 4, 2, dtype=torch.float64))
    again = evolved(unroll(PIECE), THETA, kept.carry, key, 1, 0.01, torch.zeros_like(kept.accumulator))
    es = evolved(unroll(PIECE), THETA, kept.carry, key, 1, 0.01, None)
    assert torch.equal(again.gradient, es.gradient)
    on = evolved(unroll(PIECE), THETA, kept.carry, key, 1, 0.01, kept.accumulator)
    assert not torch.allclose(on.gradient, es.gradient)
    torch.testing.assert_close(on.accumulator, kept.accumulator + es.accumulator)


def test_what_is_carried_on_has_no_graph():
    leaf = THETA["a"].clone().requires_grad_()
    _, carry = backpropagated(unroll(PIECE), {"a": leaf}, start(2))
    assert not carry["x"].requires_grad


def test_a_pieces_start_is_a_constant_and_losses_are_means_over_problems():
    theta, carry = THETA["a"].clone().requires_grad_(), {"x": start(2)["x"].clone().requires_grad_()}
    loss, after = backpropagated(unroll(PIECE), {"a": theta}, carry)
    found = torch.autograd.grad(loss.sum(), [theta, carry["x"]], allow_unused=True)
    assert found[0] is not None and found[1] is None and not after["x"].requires_grad
    keys, still = random.make_keys([0]), {"x": start(8)["x"]}
    estimate = evolved(unroll(PIECE), THETA, still, keys, 0, 1e-9, None)
    torch.testing.assert_close(estimate.loss, loss.detach(), rtol=1e-6, atol=0)
