"""Distributional reinforcement learning: targets and losses of categorical and quantile distributions of returns.

Shapes as in `losses`: samples are `[*L, B]`, distributions `[*L, B, K]`, losses `[*L]`. `valid` is None or flags
`[*L, B]` as there; `weight` is None or importance weights `[*L, B]`, real numbers of 0 or more, that multiply the
samples' losses and do not change what the mean is divided by. Detach targets where they are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.shapes import same_shape


def weighted_mean(error: Tensor, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Importance-weighted mean of the samples' losses, (1 / number of valid rows) Σ w e.

    Args:
        error: `[*L, B]`.
        valid: None or `[*L, B]`.
        weight: None or `[*L, B]`, detached.

    Returns:
        `[*L]`
    """
    same_shape(error=error, weight=weight)
    return masked_mean(error if weight is None else weight * error, valid)


# --- categorical distributions (C51) ---


def support(low: float | Tensor, high: float | Tensor, like: Tensor) -> Tensor:
    """Atoms of a categorical distribution, K returns at equal distances from `low` to `high`.

    Args:
        low: a number or `[*L]`.
        high: a number or `[*L]`.
        like: a distribution `[*L, ..., K]`, whose K, dtype and device are those of the atoms.

    Returns:
        The atoms, which broadcast against `like`.
    """
    low, high, last = align(low, like), align(high, like), like.shape[-1] - 1
    share = torch.arange(last + 1, dtype=like.dtype, device=like.device) / last
    return low * (1 - share) + high * share


def categorical_projection(
    probabilities: Tensor, reward: Tensor, discount: Tensor, low: float | Tensor, high: float | Tensor
) -> Tensor:
    """Categorical projection of the distribution of r + d Z onto the atoms of Z (Bellemare et al., 2017, equation 7).

    The atom z_j moves to min(max(r + d z_j, low), high), and its probability is divided between the two atoms beside
    that place, the nearer of which gets more. Every row keeps the sum of its probabilities.

    Args:
        probabilities: `[*L, B, K]`, of the atoms of the next state, K 2 or more.
        reward: `[*L, B]`.
        discount: `[*L, B]`, 0 after a terminal state.
        low: smallest atom, a number or `[*L]`.
        high: largest atom, a number or `[*L]`.

    Returns:
        `[*L, B, K]`

    Raises:
        ValueError: the shapes disagree.
    """
    same_shape(reward=reward, discount=discount, probabilities=probabilities[..., 0])
    last = probabilities.shape[-1] - 1
    atoms = support(low, high, probabilities)
    low, high = align(low, probabilities), align(high, probabilities)
    moved = reward.unsqueeze(-1) + discount.unsqueeze(-1) * atoms
    place = ((moved - low) * (last / (high - low))).clamp(0, last)
    left = place.nan_to_num(0.0).floor().clamp(max=last - 1)  # NaN is no index; the shares below keep it
    right_share, index = place - left, left.to(torch.int64)
    projected = torch.zeros_like(probabilities).scatter_add(-1, index, probabilities * (1 - right_share))
    return projected.scatter_add(-1, index + 1, probabilities * right_share)


def categorical_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Divergence of every sample's distribution from its target, KL(m ‖ softmax(logits)) in nats.

    It is the cross-entropy -Σ m log softmax(logits) without the entropy of the target, so that its gradient is that of
    the cross-entropy and 0 is the best.

    Args:
        logits: `[*L, B, K]`.
        target: m, probabilities `[*L, B, K]`, detached.

    Returns:
        `[*L, B]`
    """
    same_shape(2, logits=logits, target=target)
    return (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)


def categorical_loss(
    logits: Tensor, target: Tensor, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy loss of categorical distributions of returns, E[w KL(m ‖ softmax(logits))] (C51).

    Args:
        logits: `[*L, B, K]`.
        target: m, of `categorical_projection`, `[*L, B, K]`, detached.
        valid: None or `[*L, B]`.
        weight: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    return weighted_mean(categorical_divergence(logits, target), valid, weight)


# --- quantiles (QR-DQN) ---


def quantile_target(quantiles: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """Quantile target r + d θ_j; where d is 0 nothing follows, whatever θ is.

    Args:
        quantiles: θ of the next state, `[*L, B, K]`.
        reward: `[*L, B]`.
        discount: `[*L, B]`, 0 after a terminal state.

    Returns:
        `[*L, B, K]`
    """
    same_shape(reward=reward, discount=discount, quantiles=quantiles[..., 0])
    discount = discount.unsqueeze(-1)
    return reward.unsqueeze(-1) + discount * quantiles.masked_fill(discount == 0, 0.0)


def quantile_huber(quantiles: Tensor, target: Tensor, delta: float | Tensor = 1.0) -> Tensor:
    """Quantile Huber error of every sample, Σ_i mean_j |τ_i - [u_ij < 0]| h(u_ij) with u_ij = y_j - θ_i.

    h is the Huber loss, u² / 2 up to δ and δ (|u| - δ / 2) beyond, and τ_i = (2 i + 1) / (2 K) (Dabney et al., 2018,
    equations 9 and 10). It is not divided by δ, as it is in the paper on implicit quantiles.

    Args:
        quantiles: θ, `[*L, B, K]`.
        target: y, `[*L, B, K']`, detached.
        delta: δ > 0, a number or `[*L]`.

    Returns:
        `[*L, B]`
    """
    same_shape(quantiles=quantiles[..., 0], target=target[..., 0])
    count = quantiles.shape[-1]
    difference = target.unsqueeze(-2) - quantiles.unsqueeze(-1)
    error, bound = difference.abs(), align(delta, difference)
    quadratic = error.clamp(max=bound)
    middle = (torch.arange(count, dtype=quantiles.dtype, device=quantiles.device) + 0.5) / count
    share = (middle.unsqueeze(-1) - (difference < 0).to(quantiles.dtype)).abs()
    return (share * quadratic * (error - 0.5 * quadratic)).mean(-1).sum(-1)


def quantile_loss(
    quantiles: Tensor,
    target: Tensor,
    delta: float | Tensor = 1.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Quantile Huber loss E[w Σ_i mean_j |τ_i - [u_ij < 0]| h(u_ij)] (QR-DQN, Dabney et al., 2018).

    Args:
        quantiles: θ, `[*L, B, K]`.
        target: y, `[*L, B, K']`, detached.
        delta: δ > 0, a number or `[*L]`.
        valid: None or `[*L, B]`.
        weight: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    return weighted_mean(quantile_huber(quantiles, target, delta), valid, weight)
