"""Evolution strategies (ES, PES): gradient estimates from function values at many perturbed parameters.

Perturbations are a learner axis: N of them are N learners. A truncated unroll carries its state from one truncation
to the next. ES on a truncation alone misses what earlier perturbations did to that state; PES counts it, by
multiplying the loss of a truncation by the *sum* of the perturbations since the unroll began.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import random


def antithetic_noise(
    key: Tensor,
    counter: int | Tensor,
    count: int,
    size: int,
    sigma: float | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Antithetic Gaussian perturbations, in pairs of opposite sign: the second half is minus the first.

    Args:
        key: `[*L]`.
        counter: a number or `[*L]`: how often noise was drawn before.
        count: N, even.
        size: P, the number of parameters.
        sigma: their standard deviation, a number or `[*L]`.
        dtype: of the result.

    Returns:
        `[*L, N, P]`

    Raises:
        SettingError: N is odd.
    """
    if count < 2 or count % 2:
        raise SettingError(f"{count} perturbations are no antithetic pairs: expected an even number")
    half = random.normal(key, "perturbation", counter, (count // 2, size), dtype)
    half = half * (sigma.to(dtype)[..., None, None] if isinstance(sigma, Tensor) else sigma)
    return torch.cat([half, -half], -2)


def evolution_gradient(loss: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Evolution-strategies gradient estimate, 1 / (N σ²) Σᵢ noiseᵢ lossᵢ.

    With `noise` the perturbations of this evaluation it is ES (Salimans et al., 2017); with `noise` the sums of all
    perturbations since the unroll began it is PES (Vicol, Metz and Sohl-Dickstein, 2021), whose estimates over the
    truncations of an unroll add up to an unbiased one of the whole. Both estimate the gradient of the loss smoothed by
    σ.

    Args:
        loss: `[*L, N]`, of each perturbation; for a truncated unroll, the sum or mean over the truncation.
        noise: `[*L, N, P]`.
        sigma: σ, a number or `[*L]`.

    Returns:
        `[*L, P]`

    Raises:
        ValueError: the shapes disagree.
    """
    if noise.shape[:-1] != loss.shape:
        raise ValueError(f"loss has shape {tuple(loss.shape)}, expected that of noise {tuple(noise.shape)} without P")
    variance = sigma.to(noise.dtype).square().unsqueeze(-1) if isinstance(sigma, Tensor) else sigma * sigma
    return (noise * loss.to(noise.dtype).unsqueeze(-1)).mean(-2) / variance
