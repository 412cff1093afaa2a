"""Planning in tabular MDPs: published numbers, identities, finite differences, loops over learners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tabular

torch.set_printoptions(precision=8)


def close(actual: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def reasonable() -> tuple[Tensor, Tensor, Tensor]:
    """P, state reward and start of `ReasonablePOMDP` in the tests of the package imitation."""
    up = [[0, 0, 0, 0.05, 0.95], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    P = [
        [[0, 0.9, 0.1, 0, 0], [0, 0, 0, 1, 0], [0, 0.1, 0.9, 0, 0]],
        up,
        up,
        [[0, 0, 0, 0, 1]] * 3,
        [[1, 0, 0, 0, 0]] * 3,
    ]
    reward, start = [1, 2, 2, -20, 3], [0.5, 0, 0, 0, 0.5]
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (P, reward, start))


def grid5() -> tuple[Tensor, Tensor]:
    """A 5x5 grid: north, east, south, west, a random move with probability 0.3; state 24 is absorbing and pays 1."""
    P = torch.zeros(25, 4, 25, dtype=torch.float64)
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))
    for s in range(25):
        for b, (down, right) in enumerate(moves):
            to = min(max(s // 5 + down, 0), 4) * 5 + min(max(s % 5 + right, 0), 4)
            P[s, :, to] += 0.3 / 4
            P[s, b, to] += 0.7
    P[24] = torch.eye(25, dtype=torch.float64)[24]
    return P, torch.eye(25, dtype=torch.float64)[24]


def random_mdp(learners: tuple[int, ...], states: int, actions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    P = draw(*learners, states, actions, states) ** 3
    return P / P.sum(-1, keepdim=True), draw(*learners, states, actions) * 2 - 1, draw(states).softmax(0)


@pytest.mark.parametrize(
    ("gamma", "value", "first", "second", "visits", "total"),
    [
        (1.0, [53.2983, 54.836443, 54.836443, 33.649463, 54.744662], [0.5, 0, 0.5], [0.248431, 0, 0.751569],
         [6.998829, 3.397594, 3.397594, 0.405233, 6.800749], 21.0),
        (0.9, [22.943354, 24.039469, 24.039469, 2.818985, 24.430549], None, None, None, 8.905810),
    ],
)  # fmt: skip
def test_values_and_occupancy_of_the_reasonable_pomdp(gamma, value, first, second, visits, total):
    P, reward, start = reasonable()
    plan = tabular.soft_plan(P, reward[:, None], 20, gamma)
    close(plan.value[0], value)
    occupancy = tabular.occupancy(P, start, plan.log_policy.exp(), gamma).sum(0)
    close(occupancy.sum(), total)
    close(occupancy.sum(), 21 if gamma == 1 else (1 - gamma**21) / (1 - gamma))
    if first is not None:
        close(plan.log_policy[0, 0].exp(), first)
        close(plan.log_policy[0, 1].exp(), second)
        close(occupancy, visits)


def test_published_numbers_of_the_grid():
    P, reward = grid5()
    soft = tabular.soft_plan_discounted(P, reward[:, None], 0.9)
    close(soft.value[[0, 12, 23, 24]], [14.666306, 16.405238, 20.775048, 23.862944])
    close(soft.log_policy[0].exp(), [0.236221, 0.263779, 0.263779, 0.236221])
    hard = tabular.optimal_plan(P, reward[:, None], 0.9)
    close(hard.value[[0, 12, 23, 24]], [3.283437, 5.549022, 8.544637, 10])
    plan = tabular.soft_plan(P, reward[:, None], 15)
    visits = tabular.occupancy(P, torch.eye(25, dtype=torch.float64)[0], plan.log_policy.exp())
    close(plan.value[0, 0], 21.034467)
    close(visits[15, 24], 0.130316)
    close(visits.sum(0)[24], 0.697448)


def test_a_bandit_of_one_step_has_the_softmax_of_its_rewards():
    reward = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    plan = tabular.soft_plan(torch.ones(1, 3, 1, dtype=torch.float64), reward, 1)
    torch.testing.assert_close(plan.log_policy[0], reward.log_softmax(-1))


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_gradient_of_the_likelihood_is_the_difference_of_occupancies(gamma):
    P, reward, start = random_mdp((), 6, 3)
    demonstrator = tabular.soft_plan(P, reward[:, :1], 8, gamma).log_policy.exp()
    visits = tabular.occupancy(P, start, demonstrator)[:-1].unsqueeze(-1) * demonstrator
    other = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def likelihood(reward: Tensor) -> Tensor:
        plan = tabular.soft_plan(P, reward[:, None], 8, gamma)
        return tabular.causal_log_likelihood(visits, plan.log_policy, gamma)

    policy = tabular.soft_plan(P, other[:, None], 8, gamma).log_policy.exp()
    difference = [tabular.occupancy(P, start, pi, gamma)[:-1].sum(0) for pi in (demonstrator, policy)]
    numeric = torch.stack(
        [
            (likelihood(other + 1e-5 * direction) - likelihood(other - 1e-5 * direction)) / 2e-5
            for direction in torch.eye(6).double()
        ]
    )
    torch.testing.assert_close(difference[0] - difference[1], numeric, rtol=0, atol=1e-8)
    leaf = other.clone().requires_grad_()
    (exact,) = torch.autograd.grad(likelihood(leaf), leaf)
    torch.testing.assert_close(difference[0] - difference[1], exact, rtol=0, atol=1e-12)


def test_shaping_leaves_soft_policies_and_moves_q_by_the_potential():
    P, reward, _ = random_mdp((), 6, 3)
    potential = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    shaped = reward + tabular.expected_reward(P, 0.95 * potential - potential[:, None, None])
    for planner in (tabular.soft_plan_discounted, tabular.optimal_plan):
        plain, other = planner(P, reward, 0.95), planner(P, shaped, 0.95)
        torch.testing.assert_close(other.q, plain.q - potential[:, None], rtol=0, atol=1e-10)
        torch.testing.assert_close(other.log_policy, plain.log_policy, rtol=0, atol=1e-10)


def test_occupancy_and_value_agree_without_a_horizon_and_with_a_long_one():
    P, reward, start = random_mdp((), 5, 2)
    policy = tabular.soft_plan_discounted(P, reward, 0.7).log_policy.exp()
    visits = tabular.occupancy_discounted(P, start, policy, 0.7)
    long = tabular.occupancy(P, start, policy.expand(200, 5, 2), 0.7).sum(0)
    torch.testing.assert_close(visits, long, rtol=0, atol=1e-12)
    value = tabular.policy_value(P, reward, policy, 0.7)
    torch.testing.assert_close(start @ value, (visits[:, None] * policy * reward).sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(value, tabular.policy_value_horizon(P, reward, policy.expand(200, 5, 2), 0.7))
    optimum = tabular.optimal_plan(P, reward, 0.7)
    greedy = tabular.policy_value(P, reward, optimum.log_policy.exp(), 0.7)
    torch.testing.assert_close(greedy, optimum.value)
    assert (greedy >= value).all()


def test_rows_that_sum_to_less_than_one_end_the_episode_at_value_zero():
    P, reward, start = random_mdp((), 4, 2)
    absorbing = torch.zeros(5, 2, 5, dtype=torch.float64)
    absorbing[:4, :, :4], absorbing[:4, :, 4], absorbing[4, :, 4] = P * 0.8, 0.2, 1.0
    policy = torch.full((4, 2), 0.5, dtype=torch.float64)
    whole = tabular.occupancy_discounted(
        absorbing, torch.cat((start, start.new_zeros(1))), torch.full((5, 2), 0.5, dtype=torch.float64), 0.9
    )
    torch.testing.assert_close(tabular.occupancy_discounted(P * 0.8, start, policy, 0.9), whole[:4])
    padded = torch.cat((reward, reward.new_zeros(1, 2)))
    torch.testing.assert_close(
        tabular.policy_value(P * 0.8, reward, policy, 0.9),
        tabular.policy_value(absorbing, padded, torch.full((5, 2), 0.5, dtype=torch.float64), 0.9)[:4],
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("learners", "states", "actions", "horizon"), [((2, 3), 4, 2, 5), ((3,), 3, 3, 3)])
def test_batched_equals_looped(learners, states, actions, horizon, shared):
    P, reward, start = random_mdp(learners, states, actions)
    P = P.flatten(0, len(learners) - 1)[0] if shared else P
    plan = tabular.soft_plan(P, reward, horizon, 0.9)
    endless = tabular.soft_plan_discounted(P, reward, 0.9)
    best = tabular.optimal_plan(P, reward, 0.9)
    visits = tabular.occupancy(P, start, plan.log_policy.exp(), 0.9)
    forever = tabular.occupancy_discounted(P, start, endless.log_policy.exp(), 0.9)
    value = tabular.policy_value_horizon(P, reward, plan.log_policy.exp(), 0.9)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in learners)).reshape(-1, len(learners)).tolist():
        i = tuple(index)
        dynamics = P if shared else P[i]
        alone = tabular.soft_plan(dynamics, reward[i], horizon, 0.9)
        torch.testing.assert_close(plan.value[i], alone.value)
        torch.testing.assert_close(plan.log_policy[i], alone.log_policy)
        torch.testing.assert_close(endless.value[i], tabular.soft_plan_discounted(dynamics, reward[i], 0.9).value)
        torch.testing.assert_close(best.value[i], tabular.optimal_plan(dynamics, reward[i], 0.9).value)
        torch.testing.assert_close(visits[i], tabular.occupancy(dynamics, start, alone.log_policy.exp(), 0.9))
        alone_forever = tabular.occupancy_discounted(dynamics, start, endless.log_policy[i].exp(), 0.9)
        torch.testing.assert_close(forever[i], alone_forever)
        torch.testing.assert_close(
            value[i], tabular.policy_value_horizon(dynamics, reward[i], alone.log_policy.exp(), 0.9)
        )


def test_wrong_shapes_and_endless_iterations_are_refused():
    P, reward, _ = random_mdp((), 4, 2)
    with pytest.raises(SettingError, match=r"expected \[\*L, 4, 2\]"):
        tabular.soft_plan(P, reward.T, 3)
    with pytest.raises(SettingError, match="horizon is 0"):
        tabular.soft_plan(P, reward, 0)
    with pytest.raises(SettingError, match=r"gamma is 1\.0"):
        tabular.soft_plan_discounted(P, reward, 1.0, max_iterations=50)
    with pytest.raises(SettingError, match="states, actions, states"):
        tabular.soft_plan(P[:, :, :3], reward, 3)
