"""Running mean and variance, and normalisation of observations and rewards by them.

The statistics are a dictionary of float64 tensors that belongs to the learner's state and is saved with its
weights. Evaluation freezes them by not updating. `valid` is None or flags (bool, or integers 0 and 1): rows without
it are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlmeta.functional.axes import align
from rlmeta.functional.shapes import flags, same_shape

Statistics = dict[str, Tensor]


def running_init(
    learner_shape: Sequence[int] = (), shape: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Statistics:
    """Initial running statistics, which leave data unchanged: mean 0, variance 1, count 0.

    Args:
        learner_shape: the sizes of `*L`.
        shape: that of one sample, `()` for a scalar.
        device: where to keep them.

    Returns:
        `{"mean": [*L, *shape], "var": [*L, *shape], "count": [*L]}`, float64.
    """
    full = (*learner_shape, *shape)
    return {
        "mean": torch.zeros(full, dtype=torch.float64, device=device),
        "var": torch.ones(full, dtype=torch.float64, device=device),
        "count": torch.zeros(tuple(learner_shape), dtype=torch.float64, device=device),
    }


def running_update(stats: Statistics, x: Tensor, valid: Tensor | None = None) -> Statistics:
    """Running mean and (biased) variance with the samples of `x` added, by the rule of Chan et al. (1979).

    With w = m / (n + m) the new samples' share and Δ = mean(x) - mean:
        mean ← mean + w Δ
        var ← (1 - w) var + w var(x) + w (1 - w) Δ²

    A learner without valid samples keeps its statistics bit for bit.

    Args:
        stats: of `running_init`.
        x: `[*L, M, *shape]`, M samples a learner.
        valid: None or `[*L, M]` bool.

    Returns:
        New statistics; `stats` is not modified.

    Raises:
        ValueError: `x` or `valid` has another shape.
    """
    mean, var, count = stats["mean"], stats["var"], stats["count"]
    axis = count.dim()
    if x.dim() != mean.dim() + 1 or x.shape[:axis] + x.shape[axis + 1 :] != mean.shape:
        raise ValueError(f"x is {list(x.shape)}, expected {list(mean.shape)} with an axis of samples at {axis}")
    samples, x_mean, x_var = _moments(x.to(torch.float64), valid, axis)
    total = count + samples
    share = align(samples / total.clamp(min=1), mean)
    difference = x_mean - mean
    return {
        "mean": mean + share * difference,
        "var": (1 - share) * var + share * x_var + share * (1 - share) * difference.square(),
        "count": total,
    }


def _moments(x: Tensor, valid: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number `[*L]`, mean `[*L, *shape]` and biased variance `[*L, *shape]` of the valid samples along `axis`."""
    if valid is None:
        var, mean = torch.var_mean(x, axis, correction=0)
        return torch.full(x.shape[:axis], x.shape[axis], dtype=x.dtype, device=x.device), mean, var
    if valid.shape != x.shape[: axis + 1]:
        raise ValueError(f"valid is {list(valid.shape)}, expected {list(x.shape[: axis + 1])}")
    valid = flags(valid, "valid")
    counted = valid.reshape(valid.shape + (1,) * (x.dim() - valid.dim())).expand_as(x)
    samples = counted.sum(axis).clamp(min=1)
    mean = x.where(counted, 0).sum(axis) / samples
    var = (x - mean.unsqueeze(axis)).square().where(counted, 0).sum(axis) / samples
    return valid.sum(-1).to(x.dtype), mean, var


def normalise(x: Tensor, stats: Statistics, clip: float = 10.0, eps: float = 1e-8) -> Tensor:
    """Normalise data by running statistics: (x - mean) / sqrt(var + ε), clipped to [-clip, clip].

    Args:
        x: `[*L, ..., *shape]`; integers become float32, floats keep their type.
        stats: of `running_update`.
        clip: `math.inf` for none.
        eps: ε.

    Returns:
        `[*L, ..., *shape]`
    """
    dtype = x.dtype if x.is_floating_point() else torch.float32
    mean = _insert_axes(stats["mean"], stats, x)
    scale = _insert_axes((stats["var"] + eps).rsqrt(), stats, x)
    return ((x - mean.to(dtype)) * scale.to(dtype)).clamp(-clip, clip)


def reward_init(learner_shape: Sequence[int], num_envs: int, device: torch.device | str = "cpu") -> Statistics:
    """Initial state of reward normalisation: statistics of scalars, and the running return of each environment.

    Args:
        learner_shape: the sizes of `*L`.
        num_envs: N.
        device: where to keep them.

    Returns:
        `{"mean", "var", "count": [*L], "accumulator": [*L, N]}`, float64.
    """
    accumulator = torch.zeros((*learner_shape, num_envs), dtype=torch.float64, device=device)
    return running_init(learner_shape, (), device) | {"accumulator": accumulator}


def reward_update(
    stats: Statistics, reward: Tensor, cut: Tensor, gamma: float | Tensor, valid: Tensor | None = None
) -> Statistics:
    """Running statistics of discounted returns with a rollout's added, Rₜ = γ (1 - cₜ₋₁) Rₜ₋₁ + rₜ.

    As Engstrom et al. (2020) and OpenAI baselines do.

    Args:
        stats: of `reward_init`.
        reward: `[*L, T, N]`, as the environment pays it.
        cut: `[*L, T, N]` bool, terminated | truncated: the sum starts anew after it.
        gamma: the algorithm's own γ, a number or `[*L]`.
        valid: None or `[*L, T, N]` bool; a row without it leaves the sum as it is.

    Returns:
        New statistics.
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, cut=cut, valid=valid)
    total = stats["accumulator"]
    same_shape(1, accumulator=total, row_of_reward=reward[..., 0, :])
    counted = torch.ones_like(cut) if valid is None else flags(valid, "valid")
    gamma, returns = align(gamma, total), []
    for reward_t, cut_t, counted_t in zip(reward.unbind(-2), cut.unbind(-2), counted.unbind(-2)):
        total = torch.where(counted_t, gamma * total + reward_t, total)
        returns.append(total)
        total = total.where(~(cut_t & counted_t), 0)
    running = running_update(stats, torch.stack(returns, -2).flatten(-2), counted.flatten(-2))
    return running | {"accumulator": total}


def normalise_reward(reward: Tensor, stats: Statistics, clip: float = 10.0, eps: float = 1e-8) -> Tensor:
    """Scale rewards by the standard deviation of discounted returns: r / sqrt(var + ε), clipped, no mean subtracted.

    Args:
        reward: `[*L, ...]`; integers become float32, floats keep their type.
        stats: of `reward_update`.
        clip: `math.inf` for none.
        eps: ε.

    Returns:
        `[*L, ...]`
    """
    dtype = reward.dtype if reward.is_floating_point() else torch.float32
    scale = _insert_axes((stats["var"] + eps).rsqrt(), stats, reward)
    return (reward * scale.to(dtype)).clamp(-clip, clip)


def _insert_axes(statistic: Tensor, stats: Statistics, x: Tensor) -> Tensor:
    """Reshape `[*L, *shape]` to broadcast against `[*L, ..., *shape]`."""
    learners = stats["count"].shape
    shape = statistic.shape[len(learners) :]
    if x.dim() < statistic.dim() or x.shape[: len(learners)] != learners or x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(f"x is {list(x.shape)}, expected learner axes {list(learners)} first and {list(shape)} last")
    return statistic.reshape(learners + (1,) * (x.dim() - statistic.dim()) + shape)
