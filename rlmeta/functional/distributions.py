"""Action distributions as functions of their parameters.

Shapes: parameters are `[*L, ..., A]`, what is returned per step is `[*L, ...]`. Parameters of one distribution have one
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
    """What each learner draws to cover `x`, after checking that the key's learner axes are a prefix of its shape."""
    if x.shape[: key.dim()] != key.shape:
        raise ValueError(f"key has learner axes {tuple(key.shape)}, which are no prefix of the shape {tuple(x.shape)}")
    return x.shape[key.dim() :]


def _noise_dtype(x: Tensor) -> torch.dtype:
    """Half precision cannot hold uniform numbers without rounding some of them to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------- categorical


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with the forbidden actions at the lowest finite number: probability 0, gradient 0, no NaN in entropies.

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
    """Over the last axis; as the last but one it is vectorised, where a few actions row by row are 3 times as slow."""
    return F.log_softmax(logits, -1) if logits.dim() < 2 else F.log_softmax(logits.mT, -2).mT


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """log π(a) = logits[a] − logsumexp(logits).

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
    """H = −Σ π log π in nats, `[..., A]` -> `[...]`."""
    log_prob = _log_softmax(logits)
    return -(log_prob.exp() * log_prob).sum(-1)


def categorical_mode(logits: Tensor) -> Tensor:
    """The most probable action (the first of several), `[..., A]` -> `[...]` int64."""
    return logits.argmax(-1)


def categorical_sample(logits: Tensor, key: Tensor) -> Tensor:
    """argmax(logits + Gumbel noise), which is distributed as softmax(logits) (the Gumbel-max trick).

    Args:
        logits: `[*L, ..., A]`, unnormalised.
        key: `[*L]`.

    Returns:
        `[*L, ...]` int64
    """
    return (logits + random.gumbel(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))).argmax(-1)


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, `[..., A]` twice -> `[...]`."""
    _check_same_shape(logits_p, "logits_q", logits_q)
    log_p = _log_softmax(logits_p)
    return (log_p.exp() * (log_p - _log_softmax(logits_q))).sum(-1)


# ------------------------------------------------------------------------------------------------------ multi-discrete


def _split(logits: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if logits.shape[-1] != sum(sizes):
        raise ValueError(f"logits have {logits.shape[-1]} columns, expected {sum(sizes)}, the sum of {tuple(sizes)}")
    return torch.split(logits, list(sizes), -1)


def multi_discrete_log_prob(logits: Tensor, action: Tensor, sizes: Sequence[int]) -> Tensor:
    """log π(a) = Σ_k log π_k(a_k): independent categorical components, their logits concatenated.

    Args:
        logits: `[..., sum(sizes)]`.
        action: `[..., len(sizes)]`, integers.
        sizes: how many actions each component has.

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
    """Sum of the components' entropies in nats, `[..., sum(sizes)]` -> `[...]`."""
    return torch.stack([categorical_entropy(group) for group in _split(logits, sizes)], -1).sum(-1)


def multi_discrete_mode(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """The most probable action of each component, `[..., sum(sizes)]` -> `[..., len(sizes)]` int64."""
    return torch.stack([group.argmax(-1) for group in _split(logits, sizes)], -1)


def multi_discrete_sample(logits: Tensor, sizes: Sequence[int], key: Tensor) -> Tensor:
    """A sample of each component by the Gumbel-max trick.

    Args:
        logits: `[*L, ..., sum(sizes)]`.
        sizes: how many actions each component has.
        key: `[*L]`.

    Returns:
        `[*L, ..., len(sizes)]` int64
    """
    noise = random.gumbel(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))
    return multi_discrete_mode(logits + noise, sizes)


def multi_discrete_kl(logits_p: Tensor, logits_q: Tensor, sizes: Sequence[int]) -> Tensor:
    """KL(p ‖ q) in nats, the sum over the components, `[..., sum(sizes)]` twice -> `[...]`."""
    groups = zip(_split(logits_p, sizes), _split(logits_q, sizes))
    return torch.stack([categorical_kl(p, q) for p, q in groups], -1).sum(-1)


# ----------------------------------------------------------------------------------------------------------- bernoulli


def bernoulli_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """log π(a) = Σ_k a_k log σ(l_k) + (1 − a_k) log σ(−l_k), independent components.

    Args:
        logits: `[..., A]`, log-odds of 1.
        action: `[..., A]`, zeros and ones of any type.

    Returns:
        `[...]`
    """
    _check_same_shape(logits, "action", action)
    return F.logsigmoid(torch.where(action.bool(), logits, -logits)).sum(-1)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Sum of the components' entropies in nats, `[..., A]` -> `[...]`."""
    return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits)).sum(-1)


def bernoulli_mode(logits: Tensor) -> Tensor:
    """1 where it is the more probable value, else 0, `[..., A]` -> `[..., A]` int64."""
    return (logits > 0).to(torch.int64)


def bernoulli_sample(logits: Tensor, key: Tensor) -> Tensor:
    """Independent zeros and ones.

    Args:
        logits: `[*L, ..., A]`, log-odds of 1.
        key: `[*L]`.

    Returns:
        `[*L, ..., A]` int64
    """
    noise = random.uniform(key, "action", 0, _noise_shape(key, logits), _noise_dtype(logits))
    return (noise < logits.sigmoid()).to(torch.int64)


def bernoulli_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, the sum over the components, `[..., A]` twice -> `[...]`."""
    _check_same_shape(logits_p, "logits_q", logits_q)
    ones = logits_p.sigmoid() * (F.logsigmoid(logits_p) - F.logsigmoid(logits_q))
    zeros = (-logits_p).sigmoid() * (F.logsigmoid(-logits_p) - F.logsigmoid(-logits_q))
    return (ones + zeros).sum(-1)


# ------------------------------------------------------------------------------------------------------------- normal


def normal_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log π(a) = −½ Σ_k ((a_k − μ_k) / σ_k)² + 2 log σ_k + log 2π, diagonal covariance.

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
    """H = Σ_k log σ_k + ½ log 2πe in nats, `[..., A]` -> `[...]`."""
    return log_std.sum(-1) + 0.5 * (1.0 + _LOG_2_PI) * log_std.shape[-1]


def normal_mode(mean: Tensor) -> Tensor:
    """The mean, `[..., A]` -> `[..., A]`."""
    return mean


def normal_sample(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """μ + σ ε with standard normal ε, differentiable in both parameters.

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
    """KL(p ‖ q) = ½ Σ_k r² − 1 − log r² + ((μ_p − μ_q) / σ_q)² with r = σ_p / σ_q, in nats.

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
    """log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)), which stays exact where tanh u rounds to ±1.

    softplus(−2u) is written −logsigmoid(2u): torch's softplus drops the 2e-9 that is left beyond its threshold.
    """
    return 2.0 * (_LOG_2 - pre_tanh + F.logsigmoid(2.0 * pre_tanh))


def tanh_normal_log_prob_pre_tanh(mean: Tensor, log_std: Tensor, pre_tanh: Tensor) -> Tensor:
    """log π(tanh u) = log N(u; μ, σ) − Σ_k log(1 − tanh² u_k), exact however saturated the action is.

    Args:
        mean: `[..., A]`.
        log_std: `[..., A]`.
        pre_tanh: u, `[..., A]`.

    Returns:
        `[...]`

    Source: Haarnoja et al., "Soft Actor-Critic", 2018, appendix C.
    """
    return normal_log_prob(mean, log_std, pre_tanh) - _log_tanh_derivative(pre_tanh).sum(-1)


def tanh_normal_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log π(a) of an action in [−1, 1] whose value before the tanh was not kept.

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
    """tanh μ, `[..., A]` -> `[..., A]`: the median, by convention the deterministic action."""
    return mean.tanh()


def tanh_normal_sample(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """tanh(μ + σ ε), differentiable in both parameters; arguments as for `normal_sample`, which draws u."""
    return normal_sample(mean, log_std, key).tanh()


def tanh_normal_sample_log_prob(mean: Tensor, log_std: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The action of `tanh_normal_sample` and its exact log-probability, both differentiable in the parameters.

    Args:
        mean: `[*L, ..., A]`.
        log_std: `[*L, ..., A]`.
        key: `[*L]`.

    Returns:
        action `[*L, ..., A]` and log-probability `[*L, ...]`
    """
    pre_tanh = normal_sample(mean, log_std, key)
    return pre_tanh.tanh(), tanh_normal_log_prob_pre_tanh(mean, log_std, pre_tanh)


def tanh_normal_entropy(mean: Tensor, log_std: Tensor, key: Tensor) -> Tensor:
    """An unbiased estimate of H = H[N(μ, σ)] + Σ_k E log(1 − tanh² u_k) in nats, which has no closed form.

    The first term is exact; the second is taken at one reparameterised sample (stream "entropy").

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
    """KL(p ‖ q), equal to `normal_kl` of the same parameters: a bijection of the actions leaves it as it is."""
    return normal_kl(mean_p, log_std_p, mean_q, log_std_q)
