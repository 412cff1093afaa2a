"""V-trace and Retrace: against the papers' sums, on policy, golden numbers, learner axes, episodes apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlmeta.functional.returns import discounts, lambda_return, monte_carlo_return, retrace, v_trace

GAMMA = 0.9


def rollout(*shape: int, seed: int = 0, gamma: float | Tensor = GAMMA) -> dict[str, Tensor]:
    """Random rollout in float64, of episodes that terminate, are truncated, or both; v' is the next v within them."""
    generator = torch.Generator().manual_seed(seed)
    reward, value, final, log_ratio = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    chance = torch.rand(*shape, generator=generator, dtype=torch.float64)
    terminated, cut = chance < 0.2, chance < 0.3
    following = torch.cat([value[..., 1:, :], final[..., -1:, :]], -2)
    return {"reward": reward, "discount": discounts(gamma, terminated, torch.float64), "value": value,
            "next_value": torch.where(cut, final, following), "cut": cut, "log_ratio": log_ratio}  # fmt: skip


def of_q(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {("q" if name == "value" else name): tensor for name, tensor in data.items()}


def brute_v_trace(
    data: dict[str, Tensor], n: int, rho_clip: float, c_clip: float, lambda_: float
) -> tuple[list[float], list[float]]:
    """Equation 1 of Espeholt et al. as a double loop: v(s) + sum of gamma^k (product of c) delta, to the end of the
    episode; then the advantage rho (r + gamma v(s') - V(s))."""
    column = {name: tensor[:, n].tolist() for name, tensor in data.items()}
    steps = len(column["reward"])
    ratio = [2.718281828459045**x for x in column["log_ratio"]]
    rho, c = [min(rho_clip, x) for x in ratio], [lambda_ * min(c_clip, x) for x in ratio]
    targets = []
    for s in range(steps):
        total, factor = column["value"][s], 1.0
        for t in range(s, steps):
            error = column["reward"][t] + column["discount"][t] * column["next_value"][t] - column["value"][t]
            total += factor * rho[t] * error
            if column["cut"][t]:
                break
            factor *= GAMMA * c[t]
        targets.append(total)
    advantages = []
    for s in range(steps):
        after = column["next_value"][s] if column["cut"][s] or s + 1 == steps else targets[s + 1]
        advantages.append(rho[s] * (column["reward"][s] + column["discount"][s] * after - column["value"][s]))
    return targets, advantages


def brute_retrace(data: dict[str, Tensor], n: int, lambda_: float) -> list[float]:
    """Equation 3 of Munos et al.: Q + sum of gamma^t (product of c from the second step on) of the TD errors."""
    column = {name: tensor[:, n].tolist() for name, tensor in data.items()}
    steps, targets = len(column["reward"]), []
    for s in range(steps):
        total, factor = column["value"][s], 1.0
        for t in range(s, steps):
            if t > s:
                factor *= GAMMA * lambda_ * min(1.0, 2.718281828459045 ** column["log_ratio"][t])
            error = column["reward"][t] + column["discount"][t] * column["next_value"][t] - column["value"][t]
            total += factor * error
            if column["cut"][t]:
                break
        targets.append(total)
    return targets


@pytest.mark.parametrize(("rho_clip", "c_clip", "lambda_"), [(1.0, 1.0, 1.0), (2.0, 0.7, 0.8), (torch.inf, 1.5, 0.5)])
def test_v_trace_is_the_papers_sum(rho_clip: float, c_clip: float, lambda_: float) -> None:
    data = rollout(9, 4)
    target, advantage = v_trace(**data, rho_clip=rho_clip, c_clip=c_clip, lambda_=lambda_)
    for n in range(4):
        targets, advantages = brute_v_trace(data, n, rho_clip, c_clip, lambda_)
        assert target[:, n].tolist() == pytest.approx(targets)
        assert advantage[:, n].tolist() == pytest.approx(advantages)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_retrace_is_the_papers_sum(lambda_: float) -> None:
    data = rollout(9, 4)
    found = retrace(**of_q(data), lambda_=lambda_)
    for n in range(4):
        assert found[:, n].tolist() == pytest.approx(brute_retrace(data, n, lambda_))


def test_golden_numbers() -> None:
    """gamma 1/2; ratios 2, 1/2, 1, 1/4; the third row is truncated, the rollout ends in the middle of an episode."""
    reward, value = torch.tensor([1.0, 2.0, 4.0, 8.0]).unsqueeze(-1), torch.tensor([2.0, 4.0, 2.0, 4.0]).unsqueeze(-1)
    next_value = torch.tensor([4.0, 2.0, 6.0, 8.0]).unsqueeze(-1)
    cut = torch.tensor([False, False, True, False]).unsqueeze(-1)
    data = {"reward": reward, "discount": torch.full((4, 1), 0.5), "value": value, "next_value": next_value,
            "cut": cut, "log_ratio": torch.tensor([2.0, 0.5, 1.0, 0.25]).log().unsqueeze(-1)}  # fmt: skip
    # TD errors 1, -1, 5, 8; times rho: 1, -1/2, 5, 2; from the end 2; 5; -1/2 + 1/4 * 5; 1 + 1/2 * 3/4
    target, advantage = v_trace(**data)
    assert target.flatten().tolist() == pytest.approx([2 + 1.375, 4 + 0.75, 2 + 5, 4 + 2])
    assert advantage.flatten().tolist() == pytest.approx([1 + 4.75 / 2 - 2, (2 + 7 / 2 - 4) / 2, 4 + 3 - 2, 2])
    # Retrace: 8; 5 + 2; (2 + 1/2 * 2) + 1/2 * (7 - 2); (1 + 1/2 * 4) + 1/2 * 1/2 * (5.5 - 4)
    found = retrace(**of_q(data))
    assert found.flatten().tolist() == pytest.approx([3 + 0.25 * 1.5, 3 + 0.5 * 5, 7, 12])


def test_on_policy_they_are_the_returns_of_the_rollout() -> None:
    data = rollout(7, 3)
    data["log_ratio"] = torch.zeros_like(data["reward"])
    credit = {name: data[name] for name in ("reward", "discount", "next_value", "cut")}
    target, advantage = v_trace(**data)
    torch.testing.assert_close(target, monte_carlo_return(**credit))
    torch.testing.assert_close(advantage, target - data["value"])
    torch.testing.assert_close(v_trace(**data, lambda_=0.7)[0], lambda_return(**credit, lambda_=0.7))
    torch.testing.assert_close(retrace(**of_q(data), lambda_=0.7), lambda_return(**credit, lambda_=0.7))


@pytest.mark.parametrize("function", ["v_trace", "retrace"])
def test_batched_learners_equal_a_loop(function: str) -> None:
    """Settings of their own for every learner, at S = T = N, where a misplaced axis would broadcast."""
    gamma = torch.linspace(0.5, 0.99, 4, dtype=torch.float64)
    data, limits = rollout(4, 4, 4, gamma=gamma), torch.linspace(0.2, 1.7, 4, dtype=torch.float64)
    lambda_ = torch.linspace(0.1, 1.0, 4, dtype=torch.float64)

    def results(
        data: dict[str, Tensor], limit: float | Tensor, other: float | Tensor, lambda_: float | Tensor
    ) -> Tensor:
        if function == "retrace":
            return retrace(**of_q(data), lambda_=lambda_)
        return torch.stack(v_trace(**data, rho_clip=limit, c_clip=other, lambda_=lambda_), -1)

    together = results(data, limits, limits.flip(0), lambda_)
    for i in range(4):
        one = {name: tensor[i] for name, tensor in data.items()}
        alone = results(one, limits[i].item(), limits[3 - i].item(), lambda_[i].item())
        torch.testing.assert_close(together[i], alone)


@pytest.mark.parametrize("cause", ["reward", "value", "log_ratio", "next_value"])
def test_nothing_leaks_from_the_next_episode(cause: str) -> None:
    data = rollout(6, 1)
    data["cut"] = torch.arange(6).unsqueeze(-1) == 2
    data["discount"] = torch.full_like(data["reward"], GAMMA)
    other = data | {cause: torch.cat([data[cause][:3], data[cause][3:] - 50])}
    for before, after in zip((*v_trace(**data), retrace(**of_q(data))), (*v_trace(**other), retrace(**of_q(other)))):
        assert torch.equal(before[:3], after[:3])
        assert not torch.isclose(before[3:], after[3:]).all()


def test_shapes_that_would_broadcast_are_refused() -> None:
    data = rollout(3, 3)
    for name in data:
        narrow = data | {name: data[name][..., :1]}
        with pytest.raises(ValueError, match=rf"{name} \[3, 1\]"):
            v_trace(**narrow)
    with pytest.raises(ValueError, match=r"q \[3, 1\]"):
        retrace(**of_q(data | {"value": data["value"][..., :1]}))
