"""Losses, targets and diagnostics of policies, values and predictions: `[*L, B]` in, `[*L]` out.

Further axes of a minibatch (the time of sequences) are flattened into B by the caller. `valid` is None or flags
`[*L, B]`, bool or integers 0 and 1: rows without it (an autoreset step, padding, an empty slot of a buffer) take no
part in any mean, and a learner with no valid row has loss 0. They must still be finite: the gradient of a row is 0
times what it holds, which is NaN for NaN and infinity. A setting is a number or a tensor `[*L]`, one per learner.

Nothing is detached here: detach targets and advantages where they are computed. Sum a loss over its learners only in
the call of `autograd.grad`; learners share no parameter, so each gets the gradient of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional.axes import align, masked_mean
from rlmeta.functional.shapes import flags, same_shape

# --- policies ---


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor, valid: Tensor | None = None) -> Tensor:
    """Policy gradient loss, the score-function surrogate -E[log π(a|s) A] (REINFORCE, Williams, 1992).

    Args:
        log_prob: `[*L, B]`, log π(a|s).
        advantage: `[*L, B]`, detached.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(log_prob=log_prob, advantage=advantage)
    return -masked_mean(log_prob * advantage, valid)


def twice_differentiable_policy_gradient_loss(
    log_prob: Tensor, advantage: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Policy gradient loss whose higher derivatives are right too, -E[exp(log π - stop(log π)) A] (DiCE).

    Its gradient is that of `policy_gradient_loss`, bit for bit. Differentiated again, the ratio, whose value is 1,
    accounts for π choosing the actions: E[(∇² log π + ∇ log π ∇ log πᵀ) A], where the plain surrogate loses the second
    term. A step of an episode thereby counts its own action (the low-variance curvature of Rothfuss et al., 2019); for
    episodes of one step it is exact (DiCE, Foerster et al., 2018).

    Args:
        log_prob: `[*L, B]`, log π(a|s).
        advantage: `[*L, B]`, detached.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(log_prob=log_prob, advantage=advantage)
    return -masked_mean(torch.exp(log_prob - log_prob.detach()) * advantage, valid)


def ppo_clip_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float | Tensor, valid: Tensor | None = None
) -> Tensor:
    """PPO's clipped surrogate -E[min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)] with ρ = π / π_old (Schulman et al., 2017).

    Args:
        log_prob: `[*L, B]`, log π(a|s).
        old_log_prob: `[*L, B]`, the same under the policy that acted; detached.
        advantage: `[*L, B]`, detached.
        clip: ε, a number or `[*L]`.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    ratio = torch.exp(log_prob - old_log_prob)
    clip = align(clip, ratio)
    surrogate = torch.minimum(ratio * advantage, _clip(ratio, 1 - clip, 1 + clip) * advantage)
    return -masked_mean(surrogate, valid)


def ppo_kl_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor,
    coefficient: float | Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """PPO's loss with a KL penalty, -E[ρ A - β KL(π_old, π)] with ρ = π / π_old (Schulman et al., 2017).

    Args:
        log_prob: `[*L, B]`, log π(a|s).
        old_log_prob: `[*L, B]`, the same under the policy that acted; detached.
        advantage: `[*L, B]`, detached.
        kl: `[*L, B]`, KL(π_old(.|s), π(.|s)) of every sample's state.
        coefficient: β, a number or `[*L]`.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, kl=kl)
    ratio = torch.exp(log_prob - old_log_prob)
    return -masked_mean(ratio * advantage - align(coefficient, kl) * kl, valid)


def entropy_loss(entropy: Tensor, valid: Tensor | None = None) -> Tensor:
    """Entropy bonus -E[H(π(.|s))], added to the policy's loss with a small factor (Mnih et al., 2016).

    Args:
        entropy: `[*L, B]`, in nats.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(entropy=entropy)
    return -masked_mean(entropy, valid)


def normalise_advantage(advantage: Tensor, valid: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Advantage normalisation: mean 0 and standard deviation 1 over each learner's valid rows.

    The standard deviation is the unbiased one, as torch's. A learner with fewer than two valid rows keeps its
    advantages: one sample has no spread.

    Args:
        advantage: `[*L, B]`.
        valid: None or `[*L, B]`; the other rows become 0.
        eps: added to the standard deviation.

    Returns:
        `[*L, B]`
    """
    same_shape(advantage=advantage, valid=valid)
    if valid is None:
        if advantage.shape[-1] < 2:
            return advantage
        deviation, mean = torch.std_mean(advantage, -1, keepdim=True)
        return (advantage - mean) / (deviation + eps)
    counted = flags(valid, "valid")
    count = counted.sum(-1, keepdim=True)
    advantage = advantage.where(counted, 0)
    centred = (advantage - advantage.sum(-1, keepdim=True) / count.clamp(min=1)).where(counted, 0)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = variance.where(variance > 0, 1).sqrt()  # the slope of sqrt at 0 would make gradients NaN
    return torch.where(count > 1, centred / (deviation + eps), advantage)


def approx_kl(log_prob: Tensor, old_log_prob: Tensor, valid: Tensor | None = None) -> Tensor:
    """Approximate KL(π_old, π) from the old policy's own actions, E[(ρ - 1) - log ρ] with ρ = π / π_old.

    Unbiased, never negative, of low variance: estimator k3 of Schulman, "Approximating KL divergence" (2020).

    Args:
        log_prob: `[*L, B]`, log π(a|s).
        old_log_prob: `[*L, B]`, the same under the policy that acted.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`, in nats.
    """
    same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    log_ratio = log_prob - old_log_prob
    return masked_mean(torch.expm1(log_ratio) - log_ratio, valid)


# --- values ---


def value_loss(value: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Value loss, the mean squared error E[(v - G)²] without a factor 1/2 (which CleanRL has, and SB3 has not).

    Args:
        value: `[*L, B]`.
        target: `[*L, B]`, detached.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(value=value, target=target)
    return masked_mean((value - target).square(), valid)


def clipped_value_loss(
    value: Tensor, target: Tensor, old_value: Tensor, clip: float | Tensor, valid: Tensor | None = None
) -> Tensor:
    """PPO's clipped value loss E[max((v - G)², (v_old + clip(v - v_old, -ε, ε) - G)²)].

    Nothing is gained by moving a value by more than ε. ε is in units of the return, so it depends on the scale of
    rewards. From OpenAI baselines' PPO2 (2017).

    Args:
        value: `[*L, B]`.
        target: `[*L, B]`, detached.
        old_value: `[*L, B]`, as it was when the rollout was collected; detached.
        clip: ε, a number or `[*L]`.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(value=value, target=target, old_value=old_value)
    clip = align(clip, value)
    near = old_value + _clip(value - old_value, -clip, clip)
    return masked_mean(torch.maximum((value - target).square(), (near - target).square()), valid)


def huber_error(prediction: Tensor, target: Tensor, delta: float | Tensor = 1.0) -> Tensor:
    """Huber error of every sample, q (|e| - q/2) with q = min(|e|, δ): quadratic up to δ, linear beyond (Huber, 1964).

    Args:
        prediction: `[*L, B]`.
        target: `[*L, B]`, detached.
        delta: δ > 0, a number or `[*L]`.

    Returns:
        `[*L, B]`
    """
    same_shape(prediction=prediction, target=target)
    error = (prediction - target).abs()
    quadratic = error.clamp(max=align(delta, error))
    return quadratic * (error - 0.5 * quadratic)  # the same, and finite for an infinite δ


def huber_loss(prediction: Tensor, target: Tensor, delta: float | Tensor = 1.0, valid: Tensor | None = None) -> Tensor:
    """Huber loss E[q (|e| - q/2)] with q = min(|e|, δ): the mean of `huber_error`.

    Args:
        prediction: `[*L, B]`.
        target: `[*L, B]`, detached.
        delta: δ > 0, a number or `[*L]`.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    return masked_mean(huber_error(prediction, target, delta), valid)


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """Temporal-difference target r + d V(s'), where d = γ (1 - terminated).

    Nothing follows a terminal state, so where d is 0 the next value is ignored, even if it is NaN or infinite (as is
    the maximum over actions of which none is allowed).

    Args:
        reward: `[*L, B]`.
        discount: `[*L, B]`.
        next_value: `[*L, B]`, of the true successor.

    Returns:
        `[*L, B]`
    """
    same_shape(reward=reward, discount=discount, next_value=next_value)
    return reward + discount * next_value.masked_fill(discount == 0, 0.0)


def q_target(reward: Tensor, discount: Tensor, next_q: Tensor) -> Tensor:
    """Q-learning target r + d max_a Q(s', a) (Watkins and Dayan, 1992; DQN, Mnih et al., 2015).

    Args:
        reward: `[*L, B]`.
        discount: `[*L, B]`.
        next_q: `[*L, B, A]`, the target network at the true successor; mask actions that are not allowed.

    Returns:
        `[*L, B]`
    """
    return td_target(reward, discount, next_q.amax(-1))


def double_q_target(reward: Tensor, discount: Tensor, next_q: Tensor, next_q_online: Tensor) -> Tensor:
    """Double Q-learning target r + d Q(s', argmax_a Q_online(s', a)) (van Hasselt, Guez and Silver, 2016).

    Args:
        reward: `[*L, B]`.
        discount: `[*L, B]`.
        next_q: `[*L, B, A]`, the target network at the true successor: it values the action.
        next_q_online: `[*L, B, A]`, the online network there: it chooses the action; mask actions that are not allowed.

    Returns:
        `[*L, B]`
    """
    same_shape(2, next_q=next_q, next_q_online=next_q_online)
    best = next_q_online.argmax(-1, keepdim=True)
    return td_target(reward, discount, next_q.gather(-1, best).squeeze(-1))


def soft_value(q: Tensor, log_prob: Tensor, temperature: float | Tensor) -> Tensor:
    """Soft value of a sampled action: Q(s, a) - alpha log pi(a | s), whose mean over actions is V(s).

    Args:
        q: value of the action, `[*L, B]`.
        log_prob: its log density, `[*L, B]`.
        temperature: alpha, the weight of entropy in nats; a number or `[*L]`.

    Returns:
        `[*L, B]`

    Source: Haarnoja et al., "Soft Actor-Critic", 2018, equation 3.
    """
    same_shape(q=q, log_prob=log_prob)
    return q - align(temperature, q) * log_prob


def expected_soft_value(q: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Soft value of a categorical policy, V(s) = sum over actions of pi(a | s) (Q(s, a) - alpha log pi(a | s)).

    Actions of probability 0, such as masked ones, whose value may be minus infinity, add nothing.

    Args:
        q: values of all actions, `[*L, B, A]`.
        logits: of the policy, `[*L, B, A]`.
        temperature: alpha, the weight of entropy in nats; a number or `[*L]`.

    Returns:
        `[*L, B]`

    Source: Christodoulou, "Soft actor-critic for discrete action settings", 2019, equation 3.
    """
    same_shape(2, q=q, logits=logits)
    log_prob = logits.log_softmax(-1)
    probability = log_prob.exp()
    possible = probability > 0
    soft = q.where(possible, 0) - align(temperature, q) * log_prob.where(possible, 0)
    return (probability * soft).sum(-1)


def explained_variance(value: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Explained variance of the targets by the values, 1 - Var[G - v] / Var[G].

    1 is perfect, 0 no better than a constant, negative worse than one; NaN where the targets do not vary.

    Args:
        value: `[*L, B]`.
        target: `[*L, B]`.
        valid: None or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(value=value, target=target)
    spread = _variance(target, valid)
    return torch.where(spread > 0, 1 - _variance(target - value, valid) / spread, torch.nan)


def _variance(x: Tensor, valid: Tensor | None) -> Tensor:
    """Biased variance over B, `[*L]`."""
    return masked_mean((x - masked_mean(x, valid).unsqueeze(-1)).square(), valid)


def _clip(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Clamp `x` between two numbers, or two tensors that broadcast against it."""
    return torch.clamp(x, low, high)  # type: ignore[arg-type]  # torch's stubs have no overload for a union


def cross_entropy_loss(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy loss, the mean of -log softmax(logits)[target] in nats.

    Args:
        logits: `[*L, B, C]`; minus infinity excludes a class.
        target: `[*L, B]` int64 in [0, C).
        valid: None, or `[*L, B]`.

    Returns:
        `[*L]`
    """
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}, expected {(*target.shape, 'C')} for these targets")
    chosen = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -masked_mean(chosen, valid)


def squared_loss(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error over samples and their components.

    Args:
        prediction: `[*L, B, D]`.
        target: `[*L, B, D]`.
        valid: None, or `[*L, B]`.

    Returns:
        `[*L]`
    """
    same_shape(2, prediction=prediction, target=target)
    return masked_mean((prediction - target).square().mean(-1), valid)
