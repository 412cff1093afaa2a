"""Tabular Markov decision processes with known dynamics: value iteration, soft policies, state occupancy.

Letters: S states, A actions, H horizon. `P` is `[S, A, S]` or `[*L, S, A, S]`, the probability of each next state; a
row that sums to less than 1 ends the episode with the missing probability, at value 0. `reward` is `[*L, S, A]`, or
`[*L, S, 1]` where it depends on the state alone; it is paid for acting in s. Everything is differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.errors import SettingError


class Plan(NamedTuple):
    """Solution of a Markov decision process, values and policy; `[*L, H, ...]` with a horizon, `[*L, ...]` without."""

    value: Tensor
    """V, `[*L, (H,) S]`."""
    q: Tensor
    """Q, `[*L, (H,) S, A]`."""
    log_policy: Tensor
    """log pi(a | s) = Q - V, `[*L, (H,) S, A]`."""


def expected_reward(P: Tensor, reward: Tensor) -> Tensor:
    """Expected reward E[r(s, a, s') | s, a], `[*L, S, A]`, of a reward `[*L, S, A, S]` of the next state too."""
    return (P * reward).sum(-1)


def soft_plan(P: Tensor, reward: Tensor, horizon: int, gamma: float = 1.0) -> Plan:
    """Soft value iteration over H steps: the maximum causal entropy policy (Ziebart, 2010).

    Q_t = r + gamma P V_{t+1}, V_t = log sum_a exp Q_t, pi_t = exp(Q_t - V_t), with V_H = 0.

    Args:
        P: see above.
        reward: see above.
        horizon: H, the number of steps.
        gamma: discount factor.

    Raises:
        SettingError: the horizon is less than 1, or the shapes disagree.
    """
    if horizon < 1:
        raise SettingError(f"horizon is {horizon}, expected at least one step")
    reward = _expand(P, reward)
    value = torch.zeros_like(reward[..., 0])
    values, qs = [], []
    for _ in range(horizon):
        q = reward + gamma * _expectation(P, value)
        value = q.logsumexp(-1)
        values.append(value)
        qs.append(q)
    value, q = torch.stack(values[::-1], -2), torch.stack(qs[::-1], -3)
    return Plan(value, q, q - value.unsqueeze(-1))


def soft_plan_discounted(
    P: Tensor, reward: Tensor, gamma: float, tolerance: float = 1e-12, max_iterations: int = 100_000
) -> Plan:
    """Soft value iteration without a horizon: the fixed point of V = log sum_a exp(r + gamma P V).

    Args:
        P: see above.
        reward: see above.
        gamma: discount factor, below 1 unless every episode ends.
        tolerance: the largest change of a value in the last iteration.
        max_iterations: limit on iterations.

    Raises:
        SettingError: the iteration has not converged by then.
    """
    reward = _expand(P, reward)
    value = torch.zeros_like(reward[..., 0])
    for _ in range(max_iterations):
        new = (reward + gamma * _expectation(P, value)).logsumexp(-1)
        change, value = (new - value).detach().abs().max(), new
        if change <= tolerance:
            q = reward + gamma * _expectation(P, value)
            return Plan(q.logsumexp(-1), q, q.log_softmax(-1))
    raise SettingError(f"soft values still move after {max_iterations} iterations: gamma is {gamma}, expected below 1")


def optimal_plan(
    P: Tensor, reward: Tensor, gamma: float, tolerance: float = 1e-12, max_iterations: int = 100_000
) -> Plan:
    """Value iteration, V = max_a (r + gamma P V); the policy is uniform over the actions that are best to 1e-9.

    Args and errors as for `soft_plan_discounted`.
    """
    reward = _expand(P, reward)
    value = torch.zeros_like(reward[..., 0])
    for _ in range(max_iterations):
        q = reward + gamma * _expectation(P, value)
        new = q.amax(-1)
        change, value = (new - value).detach().abs().max(), new
        if change <= tolerance:
            best = (q >= new.unsqueeze(-1) - 1e-9).to(q.dtype)
            return Plan(new, q, (best / best.sum(-1, keepdim=True)).log())
    raise SettingError(f"values still move after {max_iterations} iterations: gamma is {gamma}, expected below 1")


def occupancy(P: Tensor, start: Tensor, policy: Tensor, gamma: float = 1.0) -> Tensor:
    """State occupancy at each time step, D_t(s) = gamma^t P(s_t = s) for t = 0 ... H.

    Args:
        P: see above.
        start: `[S]` or `[*L, S]`, the probability of each first state.
        policy: `[*L, H, S, A]`, a policy for each step.
        gamma: discount factor.

    Returns:
        `[*L, H + 1, S]`
    """
    visits = [torch.broadcast_to(start, (*policy.shape[:-3], start.shape[-1]))]
    for pi in policy.unbind(-3):
        visits.append(gamma * _move(P, visits[-1].unsqueeze(-1) * pi))
    return torch.stack(visits, -2)


def occupancy_discounted(P: Tensor, start: Tensor, policy: Tensor, gamma: float) -> Tensor:
    """Discounted state occupancy sum_t gamma^t P(s_t = s) without a horizon: d = start + gamma P_pi^T d.

    Args:
        P: see above.
        start: `[S]` or `[*L, S]`.
        policy: `[*L, S, A]`.
        gamma: discount factor, below 1 unless every episode ends.

    Returns:
        `[*L, S]`
    """
    moves = torch.einsum("...sa,...saz->...zs", policy, P)
    system = torch.eye(moves.shape[-1], dtype=moves.dtype, device=moves.device) - gamma * moves
    return torch.linalg.solve(system, torch.broadcast_to(start, moves.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def policy_value(P: Tensor, reward: Tensor, policy: Tensor, gamma: float) -> Tensor:
    """Policy evaluation without a horizon, V = r_pi + gamma P_pi V.

    Args:
        P: see above.
        reward: see above.
        policy: `[*L, S, A]`.
        gamma: discount factor, below 1 unless every episode ends.

    Returns:
        V, `[*L, S]`
    """
    moves = torch.einsum("...sa,...saz->...sz", policy, P)
    system = torch.eye(moves.shape[-1], dtype=moves.dtype, device=moves.device) - gamma * moves
    return torch.linalg.solve(system, (policy * reward).sum(-1).unsqueeze(-1)).squeeze(-1)


def policy_value_horizon(P: Tensor, reward: Tensor, policy: Tensor, gamma: float = 1.0) -> Tensor:
    """Policy evaluation over H steps.

    Args:
        P: see above.
        reward: see above.
        policy: `[*L, H, S, A]`, a policy for each step.
        gamma: discount factor.

    Returns:
        V at the first step, `[*L, S]`
    """
    value = torch.zeros_like(policy[..., 0, :, 0])
    for pi in policy.flip(-3).unbind(-3):
        value = (pi * (reward + gamma * _expectation(P, value))).sum(-1)
    return value


def causal_log_likelihood(policy_visits: Tensor, log_policy: Tensor, gamma: float = 1.0) -> Tensor:
    """Causal log-likelihood E[sum_t gamma^t log pi_t(a_t | s_t)] of demonstrations, the objective of MaxCausalEnt IRL.

    For a reward of the state alone its gradient with respect to the reward is D_demonstrations - D_pi, the difference
    of `occupancy` summed over the H steps that are acted.

    Args:
        policy_visits: `[*L, H, S, A]`, how often the demonstrations take a in s at t (undiscounted, per episode).
        log_policy: `[*L, H, S, A]`.
        gamma: discount factor.

    Returns:
        `[*L]`
    """
    steps = torch.arange(log_policy.shape[-3], dtype=log_policy.dtype, device=log_policy.device)
    return (gamma ** steps[:, None, None] * policy_visits * log_policy).sum((-3, -2, -1))


def _expand(P: Tensor, reward: Tensor) -> Tensor:
    """Expand a reward to `[*L, S, A]`, after a check of the shapes."""
    states, actions = P.shape[-3:-1]
    if P.dim() < 3 or P.shape[-1] != states:
        raise SettingError(f"P has shape {tuple(P.shape)}, expected [*L, states, actions, states]")
    if reward.dim() < 2 or reward.shape[-2] != states or reward.shape[-1] not in (1, actions):
        raise SettingError(
            f"reward has shape {tuple(reward.shape)}, expected [*L, {states}, {actions}], or [*L, {states}, 1] for a "
            "reward of the state alone"
        )
    return reward + torch.zeros_like(P[..., 0])


def _expectation(P: Tensor, value: Tensor) -> Tensor:
    """Expected next value E[V(s') | s, a], `[*L, S, A]`."""
    return torch.einsum("...saz,...z->...sa", P, value)


def _move(P: Tensor, visits: Tensor) -> Tensor:
    """State occupancy `[*L, S]` one step after the state-action occupancy `visits` `[*L, S, A]`."""
    return torch.einsum("...sa,...saz->...z", visits, P)
