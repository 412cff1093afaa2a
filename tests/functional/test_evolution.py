"""Evolution strategies: exact in expectation on quadratics; PES unbiased where truncated ES is not."""

from __future__ import annotations

import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.evolution import antithetic_noise, evolution_gradient

KEY = random.make_keys([0, 1, 2])


def test_noise_comes_in_opposite_pairs_of_the_asked_deviation():
    noise = antithetic_noise(KEY, 0, 4000, 3, torch.tensor([0.1, 1.0, 2.0]))
    assert torch.equal(noise[:, :2000], -noise[:, 2000:])
    torch.testing.assert_close(noise.std((1, 2)), torch.tensor([0.1, 1.0, 2.0]), rtol=0.05, atol=0)
    assert not torch.equal(noise, antithetic_noise(KEY, 1, 4000, 3, 0.1))
    with pytest.raises(SettingError, match="3 perturbations are no antithetic pairs"):
        antithetic_noise(KEY, 0, 3, 2, 0.1)


@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_a_quadratic_is_exact_in_expectation_for_any_sigma(sigma):
    """The even part cancels within a pair: only E[noise noiseᵀ] / σ² = I times the gradient is left."""
    w, a = random.normal(KEY, "test", 0, (2, 4), torch.float64).unbind(1)
    noise = antithetic_noise(KEY, 0, 200_000, 4, sigma, torch.float64)
    loss = (w.unsqueeze(1) + noise - a.unsqueeze(1)).square().sum(-1)
    estimate = evolution_gradient(loss, noise, sigma)
    torch.testing.assert_close(estimate, 2 * (w - a), rtol=0, atol=0.1)


def test_the_variance_falls_with_the_number_of_perturbations():
    w = torch.ones(3, 5, dtype=torch.float64)

    def spread(count):
        keys = random.make_keys(range(200))
        noise = antithetic_noise(keys, 0, count, 5, 0.1, torch.float64)
        loss = (w[0] + noise).square().sum(-1)
        return evolution_gradient(loss, noise, 0.1).var(0).mean()

    assert spread(4) / spread(64) == pytest.approx(16.0, rel=0.3)


def test_it_is_the_loop_over_learners():
    noise = antithetic_noise(KEY, 0, 4, 4, 0.1)
    loss = noise.square().sum(-1) + noise.sum(-1)
    estimate = evolution_gradient(loss, noise, torch.tensor([0.1, 0.2, 0.3]))
    for i, sigma in enumerate((0.1, 0.2, 0.3)):
        expected = sum(noise[i, n] * loss[i, n] for n in range(4)) / (4 * sigma**2)
        torch.testing.assert_close(estimate[i], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="loss has shape"):
        evolution_gradient(loss.mT[:2], noise, 0.1)
