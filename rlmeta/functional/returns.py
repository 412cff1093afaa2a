"""Returns and advantages of rollouts: discounted, Monte Carlo, n-step and λ-returns, GAE, V-trace and Retrace.

Row t of a rollout is one transition. All arguments are `[*L, T, N]` tensors of one shape:

    reward      rₜ      what the transition paid
    discount    dₜ      γ (1 - terminatedₜ): 0 where nothing follows; see `discounts`
    value       vₜ      V(sₜ) of the state that was acted in
    next_value  v'ₜ     V of the transition's *true* successor: where an episode ends this is its final observation, not
                        the first one of the next episode
    cut         cₜ      flag: row t + 1 does not continue row t. This is terminated | truncated; a row to be skipped
                        (an autoreset step) is cut off from its predecessor by the same flag

So a terminated row bootstraps from nothing, a truncated one from its final observation, one that is both counts as
terminated, and a rollout that stops in the middle of an episode bootstraps from v' of its last row.

Everything is differentiable in all its real arguments; detach what should not be. A setting such as λ is a number or a
tensor `[*L]`, one per learner. Flags are bool, or integers of which those that are not 0 are set; real numbers are
refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError, require_count
from rlmeta.functional.axes import align
from rlmeta.functional.shapes import flags, same_shape


def discounts(gamma: float | Tensor, terminated: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Discount of every transition, dₜ = γ (1 - terminatedₜ).

    Args:
        gamma: γ, a number or `[*L]`.
        terminated: `[*L, ...]` bool; truncated rows do not belong in it.
        dtype: that of the result.

    Returns:
        `[*L, ...]`
    """
    terminated = flags(terminated, "terminated")
    return (~terminated).to(dtype) * align(gamma, terminated)


def discounted_return(reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
    """Discounted return of a rollout without truncation: Gₜ = rₜ + dₜ Gₜ₊₁, with G_T = bootstrap.

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`; a 0 ends an episode. Truncated ones need `monte_carlo_return`.
        bootstrap: `[*L, N]`, the value of what follows the last row.

    Returns:
        `[*L, T, N]`
    """
    same_shape(2, reward=reward, discount=discount)
    _check_discount(discount)
    same_shape(1, bootstrap=bootstrap, row_of_reward=reward[..., 0, :])
    return _recurse_back(reward, discount, bootstrap)


def monte_carlo_return(reward: Tensor, discount: Tensor, next_value: Tensor | None, cut: Tensor) -> Tensor:
    """Monte Carlo return: discounted rewards to the end of the episode or rollout, then the bootstrap value.

    Gₜ = rₜ + dₜ (v'ₜ where row t is cut or the last, else Gₜ₊₁)

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        next_value: `[*L, T, N]`, read at cut rows and at the last; None adds nothing there (REINFORCE has no critic).
        cut: `[*L, T, N]` bool.

    Returns:
        `[*L, T, N]`
    """
    return lambda_return(reward, discount, torch.zeros_like(reward) if next_value is None else next_value, cut, 1.0)


def n_step_return(reward: Tensor, discount: Tensor, next_value: Tensor, cut: Tensor, n: int) -> Tensor:
    """n-step return: up to n discounted rewards, then the bootstrap value (Sutton and Barto, 2018, section 7.1).

    Gₜ = rₜ + dₜ rₜ₊₁ + ... + dₜ ... dₜ₊ₘ₋₁ v'ₜ₊ₘ₋₁, where m is n, or fewer if row t + m - 1 is cut or the last.

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        next_value: `[*L, T, N]`.
        cut: `[*L, T, N]` bool.
        n: largest number of rewards, at least 1.

    Returns:
        `[*L, T, N]`
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, discount=discount, next_value=next_value, cut=cut)
    require_count("n", n)
    _check_discount(discount)
    target = reward + discount * next_value
    for _ in range(min(n, reward.shape[-2]) - 1):
        following = torch.where(cut[..., :-1, :], next_value[..., :-1, :], target[..., 1:, :])
        target = reward + discount * torch.cat([following, next_value[..., -1:, :]], -2)
    return target


def lambda_return(
    reward: Tensor, discount: Tensor, next_value: Tensor, cut: Tensor, lambda_: float | Tensor = 1.0
) -> Tensor:
    """λ-return: an exponentially weighted mixture of all n-step returns (Sutton, 1988).

    Gₜ = rₜ + dₜ [(1 - λₜ) v'ₜ + λₜ Gₜ₊₁], with λₜ = λ (1 - cₜ), and 0 in the last row.

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        next_value: `[*L, T, N]`.
        cut: `[*L, T, N]` bool.
        lambda_: λ in [0, 1], a number or `[*L]`; 0 is the one-step target, 1 the Monte Carlo return.

    Returns:
        `[*L, T, N]`
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, discount=discount, next_value=next_value, cut=cut)
    _check_discount(discount)
    mixing = (~cut).to(discount.dtype) * align(lambda_, reward)
    # Past the last row G is v' itself, which is what λ = 0 there means.
    return _recurse_back(reward + discount * (1 - mixing) * next_value, discount * mixing, next_value[..., -1, :])


def generalized_advantage(
    reward: Tensor, discount: Tensor, value: Tensor, next_value: Tensor, cut: Tensor, lambda_: float | Tensor = 0.95
) -> Tensor:
    """Generalized advantage estimation (Schulman et al., 2016).

    δₜ = rₜ + dₜ v'ₜ - vₜ
    Aₜ = δₜ + dₜ λ (1 - cₜ) Aₜ₊₁, with A_T = 0

    The matching target of the value function is `advantage + value`, which is the λ-return wherever v'ₜ = vₜ₊₁.

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        value: `[*L, T, N]`.
        next_value: `[*L, T, N]`.
        cut: `[*L, T, N]` bool.
        lambda_: λ in [0, 1], a number or `[*L]`.

    Returns:
        `[*L, T, N]`
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, discount=discount, value=value, next_value=next_value, cut=cut)
    _check_discount(discount)
    delta = reward + discount * next_value - value
    decay = discount * align(lambda_, reward) * ~cut
    return _recurse_back(delta, decay, torch.zeros_like(delta[..., 0, :]))


def v_trace(
    reward: Tensor,
    discount: Tensor,
    value: Tensor,
    next_value: Tensor,
    cut: Tensor,
    log_ratio: Tensor,
    rho_clip: float | Tensor = 1.0,
    c_clip: float | Tensor = 1.0,
    lambda_: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: value targets and advantages of a policy π from the rollout of another, μ (Espeholt et al., 2018).

    With ρₜ = min(ρ̄, πₜ/μₜ) and cₜ = λ min(c̄, πₜ/μₜ):

    Gₜ = vₜ + ρₜ (rₜ + dₜ v'ₜ - vₜ) + dₜ cₜ (1 - cutₜ) (Gₜ₊₁ - vₜ₊₁), without the last term in the last row
    Aₜ = ρₜ (rₜ + dₜ G'ₜ - vₜ), where G'ₜ is Gₜ₊₁, or v'ₜ where row t is cut or the last

    G is the value function's target and A weighs ∇ log π(aₜ|sₜ). Where π is μ and λ is 1, G is the return to the end of
    the episode or rollout, bootstrapped from v'.

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        value: `[*L, T, N]`.
        next_value: `[*L, T, N]`; equal to the next row's value where the row is not cut.
        cut: `[*L, T, N]` bool.
        log_ratio: `[*L, T, N]`, log π(aₜ|sₜ) - log μ(aₜ|sₜ).
        rho_clip: ρ̄, on which the fixed point depends: between V of μ at 0 and V of π at infinity; a number or `[*L]`.
        c_clip: c̄, at most ρ̄; less of it is less variance and slower contraction.
        lambda_: λ in [0, 1], a number or `[*L]`.

    Returns:
        Targets G and advantages A, `[*L, T, N]`.
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, discount=discount, value=value, next_value=next_value, cut=cut, log_ratio=log_ratio)
    _check_discount(discount)
    ratio = log_ratio.exp()
    rho = torch.minimum(ratio, _as_limit(rho_clip, ratio))
    decay = discount * ~cut * align(lambda_, ratio) * torch.minimum(ratio, _as_limit(c_clip, ratio))
    correction = _recurse_back(
        rho * (reward + discount * next_value - value), decay, torch.zeros_like(value[..., 0, :])
    )
    target = value + correction
    following = torch.where(cut[..., :-1, :], next_value[..., :-1, :], target[..., 1:, :])
    after = torch.cat([following, next_value[..., -1:, :]], -2)
    return target, rho * (reward + discount * after - value)


def retrace(
    reward: Tensor,
    discount: Tensor,
    q: Tensor,
    next_value: Tensor,
    cut: Tensor,
    log_ratio: Tensor,
    lambda_: float | Tensor = 1.0,
) -> Tensor:
    """Retrace(λ): targets of a policy's Q-values from any other policy's rollout (Munos et al., 2016).

    Gₜ = rₜ + dₜ [v'ₜ + cₜ₊₁ (1 - cutₜ) (Gₜ₊₁ - qₜ₊₁)] with cₜ = λ min(1, πₜ/μₜ), and Gₜ = rₜ + dₜ v'ₜ in the last row

    Args:
        reward: `[*L, T, N]`.
        discount: `[*L, T, N]`.
        q: `[*L, T, N]`, Q(sₜ, aₜ) of the action taken.
        next_value: `[*L, T, N]`, the mean of Q(s', ·) over π at the true successor.
        cut: `[*L, T, N]` bool.
        log_ratio: `[*L, T, N]`, log π(aₜ|sₜ) - log μ(aₜ|sₜ).
        lambda_: λ in [0, 1], a number or `[*L]`.

    Returns:
        `[*L, T, N]`
    """
    cut = flags(cut, "cut")
    same_shape(2, reward=reward, discount=discount, q=q, next_value=next_value, cut=cut, log_ratio=log_ratio)
    _check_discount(discount)
    trace = align(lambda_, reward) * log_ratio.clamp(max=0.0).exp()
    last = torch.zeros_like(q[..., :1, :])
    next_trace, next_q = (torch.cat([x[..., 1:, :], last], -2) for x in (trace, q))
    decay = discount * ~cut * next_trace
    return _recurse_back(reward + discount * next_value - decay * next_q, decay, last.squeeze(-2))


def _as_limit(limit: float | Tensor, x: Tensor) -> Tensor:
    """A limit as a tensor that broadcasts against `x`."""
    limit = align(limit, x)
    return limit.to(x.dtype) if isinstance(limit, Tensor) else torch.full_like(x[..., :1, :1], limit)


def _check_discount(discount: Tensor) -> None:
    """Refuse empty rollouts, and flags in place of discounts, which would bootstrap exactly at terminal states."""
    if not discount.is_floating_point():
        kind = str(discount.dtype).removeprefix("torch.")
        raise SettingError(f"discount is {kind}, expected real numbers γ (1 - terminated): `discounts` computes them")
    if not discount.shape[-2]:
        raise SettingError(f"the rollout has shape {list(discount.shape)}, expected [*L, T, N] with at least one row")


def _recurse_back(x: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """Backward linear recurrence yₜ = xₜ + decayₜ yₜ₊₁ with y_T = last `[*L, N]`; one operation a row."""
    y, rows = last, []
    for x_t, decay_t in zip(reversed(x.unbind(-2)), reversed(decay.unbind(-2))):
        y = torch.addcmul(x_t, decay_t, y)
        rows.append(y)
    return torch.stack(rows[::-1], -2)
