from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional.returns import (
    discounted_return,
    discounts,
    generalized_advantage,
    lambda_return,
    monte_carlo_return,
    n_step_return,
)

GAMMA, LAMBDA = 0.9, 0.7
FUNCTIONS: list[tuple[Callable[..., Tensor], tuple[str, ...], dict[str, Any]]] = [
    (generalized_advantage, (), {}),
    (lambda_return, ("value",), {"lambda_": 0.9}),
    (monte_carlo_return, ("value",), {}),
    (n_step_return, ("value",), {"n": 4}),
]
"""Each with the arguments it does not have and with its settings."""


def rollout(*shape: int, seed: int = 0, gamma: float | Tensor = GAMMA) -> dict[str, Tensor]:
    """Random rollout, in which a third of the episode ends are terminated, a third truncated, a third both."""
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value, chance = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    chance = torch.special.ndtr(chance)
    terminated, truncated = chance < 0.2, (chance > 0.1) & (chance < 0.3)
    discount = discounts(gamma, terminated, torch.float64)
    cut = terminated | truncated
    return {"reward": reward, "discount": discount, "value": value, "next_value": next_value, "cut": cut,
            "terminated": terminated, "truncated": truncated}  # fmt: skip


def without(data: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in data.items() if name not in (*names, "terminated", "truncated")}


def columns(data: dict[str, Tensor]) -> list[dict[str, list[float]]]:
    """Rollout as a dictionary of plain lists for every environment."""
    flat = {name: tensor.movedim(-2, -1).reshape(-1, tensor.shape[-2]).tolist() for name, tensor in data.items()}
    return [{name: rows[i] for name, rows in flat.items()} for i in range(len(flat["reward"]))]


def by_column(result: Tensor) -> list[list[float]]:
    return result.movedim(-2, -1).reshape(-1, result.shape[-2]).tolist()


def brute_n_step(c: dict[str, list[float]], t: int, n: int, gamma: float) -> float:
    """n-step return by a loop over the rewards of an episode, without discounts and cuts."""
    total = 0.0
    for k in range(n):
        total += gamma**k * c["reward"][t + k]
        if c["terminated"][t + k]:
            return total
        if c["truncated"][t + k] or t + k + 1 == len(c["reward"]) or k + 1 == n:
            return total + gamma ** (k + 1) * c["next_value"][t + k]
    raise AssertionError


def brute_advantage(c: dict[str, list[float]], t: int, gamma: float, lambda_: float) -> float:
    total, factor = 0.0, 1.0
    for k in range(t, len(c["reward"])):
        following = 0.0 if c["terminated"][k] else c["next_value"][k]
        total += factor * (c["reward"][k] + gamma * following - c["value"][k])
        if c["terminated"][k] or c["truncated"][k]:
            break
        factor *= gamma * lambda_
    return total


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 3))
def test_advantage_is_that_of_every_episode_alone(seed: int, steps: int, envs: int) -> None:
    data = rollout(steps, envs, seed=seed)
    result = by_column(generalized_advantage(**without(data), lambda_=LAMBDA))
    for column, advantages in zip(columns(data), result):
        assert advantages == pytest.approx([brute_advantage(column, t, GAMMA, LAMBDA) for t in range(steps)])


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 11))
def test_n_step_and_monte_carlo_returns_are_those_of_every_episode_alone(seed: int, steps: int, n: int) -> None:
    data = rollout(steps, 2, seed=seed)
    result = by_column(n_step_return(**without(data, "value"), n=n))
    whole = by_column(monte_carlo_return(**without(data, "value")))
    for column, n_step, monte_carlo in zip(columns(data), result, whole):
        assert n_step == pytest.approx([brute_n_step(column, t, n, GAMMA) for t in range(steps)])
        assert monte_carlo == pytest.approx([brute_n_step(column, t, steps, GAMMA) for t in range(steps)])


@given(st.integers(0, 2**31), st.integers(1, 7))
def test_lambda_return_mixes_the_n_step_returns(seed: int, steps: int) -> None:
    """(1 - λ) Σₙ λⁿ⁻¹ G⁽ⁿ⁾ over the steps there are, the last one taking all the weight that is left."""
    data = without(rollout(steps, 2, seed=seed), "value")
    weights = [(1 - LAMBDA) * LAMBDA ** (n - 1) for n in range(1, steps)] + [LAMBDA ** (steps - 1)]
    expected = sum(w * n_step_return(**data, n=n) for n, w in enumerate(weights, start=1))
    torch.testing.assert_close(lambda_return(**data, lambda_=LAMBDA), expected, rtol=1e-12, atol=1e-12)


def test_literal_arrays() -> None:
    """γ = 1/2, λ = 1/2; row 1 truncated, row 3 terminated, row 4 terminated and truncated, row 5 the rollout's end."""
    reward = torch.tensor([1.0, 2, 4, 8, 16, 32]).unsqueeze(-1)
    value = torch.tensor([1.0, 1, 1, 1, 1, 1]).unsqueeze(-1)
    next_value = torch.tensor([1.0, 10, 1, 100, 100, 6]).unsqueeze(-1)
    terminated = torch.tensor([0, 0, 0, 1, 1, 0]).bool().unsqueeze(-1)
    cut = torch.tensor([0, 1, 0, 1, 1, 0]).bool().unsqueeze(-1)
    discount = discounts(0.5, terminated)
    assert discount.flatten().tolist() == [0.5, 0.5, 0.5, 0, 0, 0.5]
    # δ = 0.5, 6, 3.5, 7, 15, 34
    advantage = generalized_advantage(reward, discount, value, next_value, cut, 0.5)
    assert advantage.flatten().tolist() == [0.5 + 6 / 4, 6, 3.5 + 7 / 4, 7, 15, 34]
    expected = [1 + 7 / 2, 2 + 5, 4 + 8 / 2, 8, 16, 32 + 3]
    assert monte_carlo_return(reward, discount, next_value, cut).flatten().tolist() == expected
    expected = [1 + 2 / 2, 2, 4 + 8 / 2, 8, 16, 32]
    assert monte_carlo_return(reward, discount, None, cut).flatten().tolist() == expected
    two = n_step_return(reward, discount, next_value, cut, 2)
    assert two.flatten().tolist() == [1 + 1 + 10 / 4, 2 + 5, 4 + 4, 8, 16, 35]
    lambda_half = [1 + 0.5 * (0.5 * 1 + 0.5 * 7), 7, 4 + 0.5 * (0.5 * 1 + 0.5 * 8), 8, 16, 35]
    assert lambda_return(reward, discount, next_value, cut, 0.5).flatten().tolist() == lambda_half
    # No cut: d = 1/2, 1/2, 1/2, 0, 1/2, 1/2 and 40 after the last row.
    plain = discounted_return(reward, torch.tensor([0.5, 0.5, 0.5, 0, 0.5, 0.5]).unsqueeze(-1), torch.tensor([40.0]))
    assert plain.flatten().tolist() == [1 + 6 / 2, 2 + 8 / 2, 4 + 8 / 2, 8, 16 + 52 / 2, 32 + 40 / 2]


def test_identities() -> None:
    data = rollout(7, 3)
    credit, value = without(data, "value"), data["value"]
    one_step = data["reward"] + data["discount"] * data["next_value"]
    torch.testing.assert_close(generalized_advantage(**without(data), lambda_=0.0), one_step - value)
    torch.testing.assert_close(lambda_return(**credit, lambda_=0.0), one_step)
    torch.testing.assert_close(n_step_return(**credit, n=1), one_step)
    torch.testing.assert_close(n_step_return(**credit, n=99), monte_carlo_return(**credit))
    torch.testing.assert_close(lambda_return(**credit), monte_carlo_return(**credit))
    torch.testing.assert_close(
        generalized_advantage(**without(data), lambda_=0.95), generalized_advantage(**without(data))
    )
    uncut = credit | {"cut": torch.zeros_like(data["cut"])}
    plain = discounted_return(data["reward"], data["discount"], data["next_value"][-1])
    torch.testing.assert_close(monte_carlo_return(**uncut), plain)


def test_advantage_and_value_add_up_to_the_lambda_return() -> None:
    data = rollout(7, 3)
    following = torch.cat([data["value"][1:], data["next_value"][-1:]])
    data["next_value"] = torch.where(data["cut"], data["next_value"], following)
    advantage = generalized_advantage(**without(data), lambda_=LAMBDA)
    torch.testing.assert_close(advantage + data["value"], lambda_return(**without(data, "value"), lambda_=LAMBDA))


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_a_time_limit_does_not_change_the_value_of_an_endless_task(lambda_: float) -> None:
    """Reward 1 for ever, time limit 10: V = 1 / (1 - γ) is the fixed point, from any start and for any λ."""
    gamma, steps = 0.9, 35
    truncated = (torch.arange(steps) % 10 == 9).unsqueeze(-1)
    reward = torch.ones(steps, 1, dtype=torch.float64)
    discount = discounts(gamma, torch.zeros_like(truncated), torch.float64)
    value = torch.zeros(())
    for _ in range(400):
        value = lambda_return(reward, discount, value.expand(steps, 1).double(), truncated, lambda_).mean()
    assert value.item() == pytest.approx(1 / (1 - gamma), rel=1e-9)
    exact = torch.full_like(reward, 1 / (1 - gamma))
    advantage = generalized_advantage(reward, discount, exact, exact, truncated, lambda_)
    torch.testing.assert_close(advantage, torch.zeros_like(reward))
    # Taken for terminations, the same ends make the values wrong: the last step of an episode is worth 1, not 10.
    terminated = discounts(gamma, truncated, torch.float64)
    mistaken = generalized_advantage(reward, terminated, exact, exact, truncated, lambda_)
    assert mistaken[9].item() == pytest.approx(1 - 10)


def test_terminated_wins_where_both_flags_are_set() -> None:
    data = rollout(5, 5)
    both = data["terminated"] & data["truncated"]
    assert both.any()
    changed = data | {"next_value": torch.where(data["terminated"], 1e6, data["next_value"])}
    for function in (lambda_return, monte_carlo_return):
        assert torch.equal(function(**without(data, "value")), function(**without(changed, "value")))
    assert torch.equal(generalized_advantage(**without(data)), generalized_advantage(**without(changed)))
    assert torch.equal(n_step_return(**without(data, "value"), n=3), n_step_return(**without(changed, "value"), n=3))


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_nothing_leaks_from_the_next_episode(flag: str) -> None:
    data = rollout(6, 1)
    terminated, truncated = torch.zeros(2, 6, 1, dtype=torch.bool)
    (terminated if flag == "terminated" else truncated)[2] = True
    data |= {"discount": discounts(GAMMA, terminated, torch.float64), "cut": terminated | truncated}
    other = dict(data)
    for name in ("reward", "value", "next_value"):
        other[name] = torch.cat([data[name][:3], data[name][3:] + 100])
    for function, dropped, extra in FUNCTIONS:
        before, after = function(**without(data, *dropped), **extra), function(**without(other, *dropped), **extra)
        assert torch.equal(before[:3], after[:3])
        assert not torch.isclose(before[3:], after[3:]).any()


def test_autoreset_rows_do_not_change_the_others() -> None:
    """The same episodes without and with a row to be skipped after each end (gymnasium's SAME_STEP and NEXT_STEP)."""
    data = rollout(8, 1, seed=3)
    source, skipped = [], []
    for t, ended in enumerate(data["cut"].flatten().tolist()):
        source += [t, t] if ended else [t]
        skipped += [False, True] if ended else [False]
    assert 0 < sum(skipped) < len(skipped)
    skip = torch.tensor(skipped).unsqueeze(-1)
    longer = {name: tensor[source] for name, tensor in data.items()}
    for name, garbage in (("reward", 0.0), ("value", 77.0), ("next_value", -55.0), ("discount", GAMMA), ("cut", False)):
        longer[name] = torch.where(skip, garbage, longer[name]).to(longer[name].dtype)
    same = generalized_advantage(**without(data), lambda_=LAMBDA)
    following = generalized_advantage(**without(longer), lambda_=LAMBDA)
    assert torch.equal(following[~skip], same.flatten())


@pytest.mark.parametrize("learners", [(4,), (2, 4), (4, 4)])
def test_batched_learners_equal_a_loop(learners: tuple[int, ...]) -> None:
    """Settings of their own for every learner, at S = T = N, where a misplaced axis would broadcast."""
    gamma = torch.linspace(0.5, 0.99, learners[0], dtype=torch.float64)
    lambda_ = torch.linspace(0, 1, torch.Size(learners).numel(), dtype=torch.float64).reshape(learners)
    data = rollout(*learners, 4, 4, gamma=gamma)
    credit = without(data, "value")
    batched = {
        "advantage": generalized_advantage(**without(data), lambda_=lambda_),
        "lambda": lambda_return(**credit, lambda_=lambda_),
        "monte_carlo": monte_carlo_return(**credit),
        "n_step": n_step_return(**credit, n=3),
        "plain": discounted_return(data["reward"], data["discount"], data["value"][..., 0, :]),
    }
    for index in torch.cartesian_prod(*(torch.arange(n) for n in learners)).reshape(-1, len(learners)).tolist():
        single = {name: tensor[tuple(index)] for name, tensor in data.items()}
        single["discount"] = discounts(gamma[index[0]].item(), single["terminated"], torch.float64)
        setting = lambda_[tuple(index)].item()
        alone = {
            "advantage": generalized_advantage(**without(single), lambda_=setting),
            "lambda": lambda_return(**without(single, "value"), lambda_=setting),
            "monte_carlo": monte_carlo_return(**without(single, "value")),
            "n_step": n_step_return(**without(single, "value"), n=3),
            "plain": discounted_return(single["reward"], single["discount"], single["value"][0]),
        }
        for name, expected in alone.items():
            torch.testing.assert_close(batched[name][tuple(index)], expected)


def test_gradients_flow_through_every_real_argument() -> None:
    data = rollout(4, 2)
    names = ("reward", "discount", "value", "next_value")
    inputs = tuple(data[name].clone().requires_grad_() for name in names)
    lambda_ = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def advantage(*tensors: Tensor) -> Tensor:
        return generalized_advantage(*tensors[:4], data["cut"], tensors[4])

    assert torch.autograd.gradcheck(advantage, (*inputs, lambda_))
    assert torch.autograd.gradgradcheck(advantage, (*inputs, lambda_))


def test_the_data_type_is_kept() -> None:
    data = {name: t.float() if t.is_floating_point() else t for name, t in rollout(4, 2).items()}
    assert generalized_advantage(**without(data)).dtype == torch.float32
    assert lambda_return(**without(data, "value")).dtype == torch.float32
    assert discounts(torch.tensor([0.9, 0.5]), torch.zeros(2, 3, dtype=torch.bool)).dtype == torch.float32


@pytest.mark.parametrize("name", ["reward", "discount", "value", "next_value", "cut"])
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    data = without(rollout(3, 3))
    data[name] = data[name][..., :1]
    with pytest.raises(ValueError, match=rf"{name} \[3, 1\]"):
        generalized_advantage(**data)
    for function, dropped, extra in FUNCTIONS[1:] if name != "value" else []:
        with pytest.raises(ValueError, match=rf"{name} \[3, 1\]"):
            function(**without(data, *dropped), **extra)


def test_other_wrong_arguments_are_refused() -> None:
    data = rollout(3, 3)
    one_axis = {name: tensor[:, 0] for name, tensor in without(data).items()}
    for function, dropped, extra in FUNCTIONS:
        with pytest.raises(ValueError, match="at least 2 axes"):
            function(**without(one_axis, *dropped), **extra)
    with pytest.raises(ValueError, match="at least 2 axes"):
        discounted_return(one_axis["reward"], one_axis["discount"], torch.zeros(()))
    with pytest.raises(ValueError, match="bootstrap"):
        discounted_return(data["reward"], data["discount"], data["value"])
    with pytest.raises(ValueError, match="discount"):
        discounted_return(data["reward"], data["discount"][:1], data["value"][0])
    with pytest.raises(ValueError, match="at least 1"):
        n_step_return(**without(data, "value"), n=0)
    with pytest.raises(ValueError, match="not a prefix"):
        generalized_advantage(**without(data), lambda_=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_rewards_are_numbers_of_the_discounts_type(dtype: torch.dtype) -> None:
    """Independent of torch's default dtype."""
    reward, value = torch.tensor([[1], [2], [3]]), torch.ones(3, 1, dtype=torch.float32)
    discount, cut = torch.full((3, 1), 0.5, dtype=torch.float32), torch.tensor([[False], [False], [True]])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        actual = [
            lambda_return(reward, discount, value, cut, 0.9),
            generalized_advantage(reward, discount, value, value, cut, 0.9),
            monte_carlo_return(reward, discount, None, cut),
        ]
    finally:
        torch.set_default_dtype(before)
    real = reward.float()
    right = [
        lambda_return(real, discount, value, cut, 0.9),
        generalized_advantage(real, discount, value, value, cut, 0.9),
        monte_carlo_return(real, discount, None, cut),
    ]
    for result, other in zip(actual, right):
        assert result.dtype == torch.float32 and torch.equal(result, other)


@pytest.mark.parametrize("n", [0, 2.0, True, "3"])
def test_n_that_is_no_count_of_steps_is_refused(n: Any) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(SettingError, match=r"n is .*, expected a whole number, at least 1"):
        n_step_return(x, x, x, x.bool(), n)


def test_flags_in_the_place_of_the_discount_are_refused() -> None:
    """They are what `terminated` looks like, and would bootstrap exactly where nothing follows."""
    x, ended = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    for call in (
        lambda: discounted_return(x, ended, x[0]),
        lambda: n_step_return(x, ended, x, ended, 2),
        lambda: lambda_return(x, ended, x, ended),
        lambda: generalized_advantage(x, ended, x, x, ended),
    ):
        with pytest.raises(SettingError, match="discount is bool"):
            call()


def test_a_rollout_without_rows_is_refused() -> None:
    x = torch.zeros(0, 2)
    with pytest.raises(SettingError, match=r"\[0, 2\], expected \[\*L, T, N\] with at least one row"):
        generalized_advantage(x, x, x, x, x.bool())
