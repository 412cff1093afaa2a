"""Action distributions: log-probability, entropy, mode, sample and KL divergence as functions of the parameters.

Shapes: parameters are `[*L, ..., A]`, results per step are `[*L, ...]`. All parameters of a distribution have the same
shape: a state-independent `log_std` is expanded by its owner, since broadcasting from the right would pair learners
with environments. `*_sample` takes a key `[*L]` and draws from the stream "action", so a learner's actions depend on
its own key alone; the caller folds its step counter into the key. Every function is differentiable in its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.functional import random
from rlmeta.functional.shapes import flags

_LOG_2 = math.log(2.0)
_LOG_2_PI = math.log(2.0 * math.pi)


def _check_same_shape(expected: Tensor, name: str, *others: Tensor) -> None:
    for other in others:
        if other.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, expected {tuple(expected.shape)}: expand it to the full shape"
            )


def _noise_shape(key: Tensor, x: Tensor) -> torch.Size:
    """Shape of the noise that each learner draws for `x`; the key's learner axes must be a prefix of `x.shape`."""
    if x.shape[: key.dim()] != key.shape:
        raise ValueError(f"key has learner axes {tuple(key.shape)}, which are no prefix of the shape {tuple(x.shape)}")
    return x.shape[key.dim() :]


def _noise_dtype(x: Tensor) -> torch.dtype:
    """Float type of the noise: at least float32, since half precision rounds some uniform numbers to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------- categorical


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Invalid action masking: the logits of forbidden actions become the dtype's lowest finite number.

    A forbidden action then has probability 0 and gradient 0, and entropies have no NaN.

    A row that forbids everything becomes uniform (it is finite, and its mode is action 0).

    Args:
        logits: `[..., A]`.
        mask: `[..., A]` flags, set where the action is allowed: bool, or integers 0 and 1.

    Returns:
        `[..., A]`

    Source: Huang and Ontañón, "A Closer Look at Invalid Action Masking in Policy Gradient Algorithms", 2022.
    """
    _check_same_shape(logits, "mask", mask)
    return torch.where(flags(mask, "mask"), logits, torch.finfo(logits.dtype).min)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis, computed on the transpose: row by row, few actions are 3 times as slow."""
    return F.log_softmax(logits, -1) if logits.dim() < 2 else F.log_softmax(logits.mT, -2).mT


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of a categorical action, log π(a) = logits[a] − logsumexp(logits).

    Args:
        logits: `[..., A]`, unnormalised.
        action: `[...]`, integers in [0, A).

    Returns:
        `[...]`
    """
    if action.shape != logits.shape[:-1]:
        raise ValueError(f"action has shape {tuple(action.shape)}, expected {tuple(logits.shape[:-1])}")
    if action.is_floating_point():
        raise ValueError(f"action has dtype {action.dtype}, expected integers in [0, {logits.shape[-1]})")
    chosen = action.to(torch.int64).unsqueeze(-1)
    return _log_softmax(logits).gather(-1, chosen).squeeze(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy of a categorical distribution in nats, H = −Σ π log π, `[..., A]` -> `[...]`."""
    log_prob = _log_softmax(logits)
    return -(log_prob.exp() * log_prob).sum(-1)


def categorical_mode(logits: Tensor) -> Tensor:
    """Mode of a categorical distribution, the first of several most probable actions, `[..., A]` -> `[...]` int64."""
    return logits.argmax(-1)


def categorical_sample(logits: Tensor, key: Tensor) -> Tensor:
    """Sample of softmax(logits) by the Gumbel-max trick: argmax(logits + Gumbel noise).

    Args:
        logits: `[*L, ..., A]`, unnormalised.
        key: `[*L]`.

    Returns:
        `[*L, ...]` int64
    """
    return (logits + random.gumbel(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))).argmax(-1)


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL divergence of two categoricals in nats, KL(p ‖ q) = Σ p (log p − log q), `[..., A]` twice -> `[...]`."""
    _check_same_shape(logits_p, "logits_q", logits_q)
    log_p = _log_softmax(logits_p)
    return (log_p.exp() * (log_p - _log_softmax(logits_q))).sum(-1)


# ------------------------------------------------------------------------------------------------------ multi-discrete


def _split(logits: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if logits.shape[-1] != sum(sizes):
        raise ValueError(f"logits have {logits.shape[-1]} columns, expected {sum(sizes)}, the sum of {tuple(sizes)}")
    return torch.split(logits, list(sizes), -1)


def multi_discrete_log_prob(logits: Tensor, action: Tensor, sizes: Sequence[int]) -> Tensor:
    """Log-probability of independent categorical components, log π(a) = Σ_k log π_k(a_k).

    Args:
        logits: `[..., sum(sizes)]`, the components' logits concatenated.
        action: `[..., len(sizes)]`, integers.
        sizes: number of actions of each component.

    Returns:
        `[...]`
    """
    if action.shape != (*logits.shape[:-1], len(sizes)):
        raise ValueError(
            f"action has shape {tuple(action.shape)}, expected {(*logits.shape[:-1], len(sizes))} for sizes {sizes}"
        )
    groups = zip(_split(logits, sizes), action.unbind(-1))
    return torch.stack([categorical_log_prob(group, chosen) for group, chosen in groups], -1).sum(-1)


def multi_discrete_entropy(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Entropy of independent categorical components in nats, `[..., sum(sizes)]` -> `[...]`."""
    return torch.stack([categorical_entropy(group) for group in _split(logits, sizes)], -1).sum(-1)


def multi_discrete_mode(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mode of independent categorical components, `[..., sum(sizes)]` -> `[..., len(sizes)]` int64."""
    return torch.stack([group.argmax(-1) for group in _split(logits, sizes)], -1)


def multi_discrete_sample(logits: Tensor, sizes: Sequence[int], key: Tensor) -> Tensor:
    """Sample of independent categorical components by the Gumbel-max trick.

    Args:
        logits: `[*L, ..., sum(sizes)]`.
        sizes: number of actions of each component.
        key: `[*L]`.

    Returns:
        `[*L, ..., len(sizes)]` int64
    """
    noise = random.gumbel(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))
    return multi_discrete_mode(logits + noise, sizes)


def multi_discrete_kl(logits_p: Tensor, logits_q: Tensor, sizes: Sequence[int]) -> Tensor:
    """KL divergence KL(p ‖ q) of independent categorical components in nats, `[..., sum(sizes)]` twice -> `[...]`."""
    groups = zip(_split(logits_p, sizes), _split(logits_q, sizes))
    return torch.stack([categorical_kl(p, q) for p, q in groups], -1).sum(-1)


# ----------------------------------------------------------------------------------------------------------- bernoulli


def bernoulli_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of independent binary actions, log π(a) = Σ_k a_k log σ(l_k) + (1 − a_k) log σ(−l_k).

    Args:
        logits: `[..., A]`, log-odds of 1.
        action: `[..., A]`, zeros and ones of any type.

    Returns:
        `[...]`
    """
    _check_same_shape(logits, "action", action)
    return F.logsigmoid(torch.where(action.bool(), logits, -logits)).sum(-1)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy of independent binary actions in nats, `[..., A]` -> `[...]`."""
    return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits)).sum(-1)


def bernoulli_mode(logits: Tensor) -> Tensor:
    """Mode of independent binary actions, `[..., A]` -> `[..., A]` int64."""
    return (logits > 0).to(torch.int64)


def bernoulli_sample(logits: Tensor, key: Tensor) -> Tensor:
    """Sample of independent binary actions, zeros and ones.

    Args:
        logits: `[*L, ..., A]`, log-odds of 1.
        key: `[*L]`.

    Returns:
        `[*L, ..., A]` int64
    """
    noise = random.uniform(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))
    return (noise < logits.sigmoid()).to(torch.int64)


def bernoulli_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL divergence KL(p ‖ q) of independent binary actions in nats, `[..., A]` twice -> `[...]`."""
    _check_same_shape(logits_p, "logits_q", logits_q)
    ones = logits_p.sigmoid() * (F.logsigmoid(logits_p) - F.logsigmoid(logits_q))
    zeros = (-logits_p).sigmoid() * (F.logsigmoid(-logits_p) - F.logsigmoid(-logits_q))
    return (ones + zeros).sum(-1)


# ------------------------------------------------------------------------------------------------------------- normal


def normal_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, log π(a) = −½ Σ_k ((a_k − μ_k) / σ_k)² + 2 log σ_k + log 2π.

    Args:
        mean: `[..., A]`.
        log_std: `[..., A]`.
        action: `[..., A]`, as sampled: before any clipping to the action space.

    Returns:
        `[...]`
    """
    _check_same_shape(mean, "log_std", log_std)
    _check_same_shape(mean, "action", action)
    standard = (action - mean) * (-log_std).exp()
    return (-0.5 * standard.square() - log_std).sum(-1) - 0.5 * _LOG_2_PI * mean.shape[-1]


def normal_entropy(log_std: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian in nats, H = Σ_k log σ_k + ½ log 2πe, `[..., A]` -> `[...]`."""
    return log_std.sum(-1) + 0.5 * (1.0 + _LOG_2_PI) * log_std.shape[-1]


def normal_mode(mean: Tensor) -> Tensor:
    """Mode of a Gaussian, its mean, `[..., A]` -> `[..., A]`."""
    return mean


def normal_sample(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """Reparameterised Gaussian sample μ + σ ε with standard normal ε, differentiable in both parameters.

    Args:
        mean: `[*L, ..., A]`.
        log_std: `[*L, ..., A]`.
        key: `[*L]`.

    Returns:
        `[*L, ..., A]`
    """
    _check_same_shape(mean, "log_std", log_std)
    noise = random.normal(key, "action", 0, _noise_shape(key, mean), _noise_dtype(mean)).to(mean.dtype)
    return torch.addcmul(mean, log_std.exp(), noise)


def normal_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians in nats.

    KL(p ‖ q) = ½ Σ_k r² − 1 − log r² + ((μ_p − μ_q) / σ_q)² with r = σ_p / σ_q

    Args:
        mean_p: `[..., A]`, as are the other three.
        log_std_p: of p.
        mean_q: of q.
        log_std_q: of q.

    Returns:
        `[...]`
    """
    _check_same_shape(mean_p, "a parameter", log_std_p, mean_q, log_std_q)
    log_ratio = 2.0 * (log_std_p - log_std_q)
    standard = (mean_p - mean_q) * (-log_std_q).exp()
    return 0.5 * (log_ratio.expm1() - log_ratio + standard.square()).sum(-1)


# -------------------------------------------------------------------------------------------------------- tanh normal


def _log_tanh_derivative(pre_tanh: Tensor) -> Tensor:
    """Log-derivative of tanh, log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)).

    It stays exact where tanh u rounds to ±1.
    softplus(−2u) is written −logsigmoid(2u): torch's softplus drops the 2e-9 that is left beyond its threshold.
    """
    return 2.0 * (_LOG_2 - pre_tanh + F.logsigmoid(2.0 * pre_tanh))


def tanh_normal_log_prob_pre_tanh(mean: Tensor, log_std: Tensor, pre_tanh: Tensor) -> Tensor:
    """Log-density of a squashed Gaussian at tanh u, exact however saturated the action is.

    log π(tanh u) = log N(u; μ, σ) − Σ_k log(1 − tanh² u_k)

    Args:
        mean: `[..., A]`.
        log_std: `[..., A]`.
        pre_tanh: u, the action before the tanh, `[..., A]`.

    Returns:
        `[...]`

    Source: Haarnoja et al., "Soft Actor-Critic", 2018, appendix C.
    """
    return normal_log_prob(mean, log_std, pre_tanh) - _log_tanh_derivative(pre_tanh).sum(-1)


def tanh_normal_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density of a squashed Gaussian at an action in [−1, 1] whose value before the tanh was not kept.

    The inverse tanh of an action that rounded to ±1 is infinite, so actions are pulled inside by the dtype's
    resolution; where that matters, keep u and call `tanh_normal_log_prob_pre_tanh`.

    Args:
        mean: `[..., A]`.
        log_std: `[..., A]`.
        action: `[..., A]`.

    Returns:
        `[...]`
    """
    limit = 1.0 - torch.finfo(action.dtype).eps
    return tanh_normal_log_prob_pre_tanh(mean, log_std, action.clamp(-limit, limit).atanh())


def tanh_normal_mode(mean: Tensor) -> Tensor:
    """Deterministic action of a squashed Gaussian: its median tanh μ, by convention, `[..., A]` -> `[..., A]`."""
    return mean.tanh()


def tanh_normal_sample(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """Reparameterised sample of a squashed Gaussian, tanh(μ + σ ε); arguments as for `normal_sample`."""
    return normal_sample(mean, log_std, key).tanh()


def tanh_normal_sample_log_prob(mean: Tensor, log_std: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Sample of a squashed Gaussian and its exact log-density, both differentiable in the parameters.

    Args:
        mean: `[*L, ..., A]`.
        log_std: `[*L, ..., A]`.
        key: `[*L]`.

    Returns:
        the action of `tanh_normal_sample` `[*L, ..., A]` and its log-density `[*L, ...]`
    """
    pre_tanh = normal_sample(mean, log_std, key)
    return pre_tanh.tanh(), tanh_normal_log_prob_pre_tanh(mean, log_std, pre_tanh)


def tanh_normal_entropy(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """Entropy of a squashed Gaussian in nats, an unbiased estimate: there is no closed form.

    H = H[N(μ, σ)] + Σ_k E log(1 − tanh² u_k): the first term is exact, the second taken at one reparameterised sample
    (stream "entropy").

    Args:
        mean: `[*L, ..., A]`.
        log_std: `[*L, ..., A]`.
        key: `[*L]`.

    Returns:
        `[*L, ...]`
    """
    pre_tanh = normal_sample(mean, log_std, random.fold(key, "entropy"))
    return normal_entropy(log_std) + _log_tanh_derivative(pre_tanh).sum(-1)


def tanh_normal_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL divergence of two squashed Gaussians in nats: that of the Gaussians, since tanh is a bijection."""
    return normal_kl(mean_p, log_std_p, mean_q, log_std_q)
