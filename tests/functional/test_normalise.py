from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.functional.normalise import (
    Statistics,
    normalise,
    normalise_reward,
    reward_init,
    reward_update,
    running_init,
    running_update,
)


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 5


def assert_same(actual: Statistics, expected: Statistics) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


# --- running statistics ---


@given(st.integers(0, 2**31), st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_batches_of_any_sizes_give_the_moments_of_all_samples(seed: int, sizes: list[int]) -> None:
    x = batch(sum(sizes), 2, seed=seed)
    stats = running_init((), (2,))
    for part in x.split(sizes):
        stats = running_update(stats, part)
    assert stats["mean"].numpy() == pytest.approx(np.mean(x.numpy(), 0))
    assert stats["var"].numpy() == pytest.approx(np.var(x.numpy(), 0))
    assert stats["count"].item() == sum(sizes)


@given(st.integers(0, 2**31))
def test_rows_that_are_not_valid_count_for_nothing(seed: int) -> None:
    x = batch(3, 3, 3, seed=seed)
    valid = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    stats = running_update(running_init((3,), (3,)), batch(3, 2, 3, seed=seed + 1))
    garbage = torch.where(valid.unsqueeze(-1), x, torch.nan)
    result = running_update(stats, garbage, valid)
    for s in range(3):
        alone = {name: tensor[s] for name, tensor in stats.items()}
        if valid[s].any():
            alone = running_update(alone, x[s][valid[s]])
        assert_same({name: tensor[s] for name, tensor in result.items()}, alone)


@pytest.mark.parametrize("learners", [(3,), (3, 3)])
@pytest.mark.parametrize("shape", [(), (3,), (3, 3)])
def test_batched_learners_equal_a_loop(learners: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, later = batch(*learners, 3, *shape), batch(*learners, 3, 3, *shape, seed=1)
    stats = running_update(running_update(running_init(learners, shape), x), x.square())
    result = normalise(later, stats)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in learners)).reshape(-1, len(learners)).tolist():
        at = tuple(index)
        alone = running_update(running_update(running_init((), shape), x[at]), x[at].square())
        assert_same({name: tensor[at] for name, tensor in stats.items()}, alone)
        torch.testing.assert_close(result[at], normalise(later[at], alone))


def test_a_learner_without_samples_keeps_its_statistics_bit_by_bit() -> None:
    stats = running_update(running_init((2,), (3,)), batch(2, 7, 3))
    valid = torch.tensor([[True] * 5, [False] * 5])
    result = running_update(stats, batch(2, 5, 3, seed=1), valid)
    for name in stats:
        assert torch.equal(result[name][1], stats[name][1])
        assert not torch.equal(result[name][0], stats[name][0])


def test_the_statistics_given_are_left_as_they_were() -> None:
    stats = running_update(running_init((), (3,)), batch(7, 3))
    before = {name: tensor.clone() for name, tensor in stats.items()}
    running_update(stats, batch(7, 3, seed=1))
    assert all(torch.equal(stats[name], before[name]) for name in stats)


def test_precision_far_from_zero() -> None:
    """A clock of 1e9 s that varies by 1 s; sums of squares, or accumulators in float32, lose it."""
    x = batch(1000, 1) + 1e9
    stats = running_init((), (1,))
    for part in x.split(10):
        stats = running_update(stats, part)
    assert stats["var"].item() == pytest.approx(x.var(correction=0).item(), rel=1e-6)
    tiny = running_update(running_init((), (1,)), batch(1000, 1) * 1e-12)
    assert tiny["var"].item() == pytest.approx(batch(1000, 1).var(correction=0).item() * 1e-24, rel=1e-6)


def test_float32_samples_are_accumulated_in_float64() -> None:
    stats = running_update(running_init((), ()), torch.full((10,), 0.1))
    assert stats["mean"].item() == pytest.approx(torch.tensor(0.1).item(), rel=1e-15)
    assert {tensor.dtype for tensor in stats.values()} == {torch.float64}


def test_normalise_literal() -> None:
    stats = {"mean": torch.tensor([1.0, 0.0]), "var": torch.tensor([4.0, 0.01]), "count": torch.tensor(9.0)}
    x = torch.tensor([[3.0, 5.0], [-3.0, -5.0]])
    torch.testing.assert_close(normalise(x, stats), torch.tensor([[1.0, 10.0], [-2.0, -10.0]]))
    torch.testing.assert_close(normalise(x, stats, clip=1.5), torch.tensor([[1.0, 1.5], [-1.5, -1.5]]))
    torch.testing.assert_close(normalise(x, stats, clip=math.inf)[0], torch.tensor([1.0, 50.0]))
    torch.testing.assert_close(normalise(x, stats, eps=5.0)[0], torch.tensor([2 / 3, 5 / math.sqrt(5.01)]))
    assert normalise(torch.tensor([3, -3]), stats).tolist() == pytest.approx([1, -10])
    assert normalise(x, stats).dtype == torch.float32


def test_normalise_makes_mean_zero_and_variance_one() -> None:
    x = batch(500, 3)
    result = normalise(x, running_update(running_init((), (3,)), x))
    torch.testing.assert_close(result.mean(0), torch.zeros(3).double())
    torch.testing.assert_close(result.var(0, correction=0), torch.ones(3).double())


def test_without_samples_data_stay_as_they_are() -> None:
    x = batch(2, 4, 3).float()
    torch.testing.assert_close(normalise(x, running_init((2,), (3,)), clip=math.inf), x)
    constant = running_update(running_init((), (1,)), torch.full((5, 1), 7.0))
    assert normalise(torch.tensor([7.0]), constant).item() == 0


def test_wrong_shapes_are_refused() -> None:
    stats = running_init((3,), (3,))
    for shape in ((3, 3), (3, 3, 1), (3, 3, 3, 3), (1, 3, 3)):
        with pytest.raises(ValueError, match="expected"):
            running_update(stats, torch.zeros(shape))
    for valid in ((3, 1), (3,), (3, 3, 3)):
        with pytest.raises(ValueError, match=r"valid is .* expected \[3, 3\]"):
            running_update(stats, torch.zeros(3, 3, 3), torch.ones(valid))
    for shape in ((3,), (3, 1), (1, 3)):
        with pytest.raises(ValueError, match="expected learner axes"):
            normalise(torch.zeros(shape), stats)


# --- rewards ---


def flags(*shape: int, chance: float, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < chance


def test_reward_literal() -> None:
    """γ = 1/2, an end after row 1: returns 1, 2.5, 4, 10 and, in the next rollout, 5."""
    reward, cut = torch.tensor([[1.0], [2], [4], [8]]), torch.tensor([[False], [True], [False], [False]])
    stats = reward_update(reward_init((), 1), reward, cut, 0.5)
    assert stats["accumulator"].tolist() == [10]
    assert stats["mean"].item() == pytest.approx(np.mean([1, 2.5, 4, 10]))
    assert stats["var"].item() == pytest.approx(np.var([1, 2.5, 4, 10]))
    stats = reward_update(stats, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.5)
    assert stats["accumulator"].tolist() == [0]
    assert stats["var"].item() == pytest.approx(np.var([1, 2.5, 4, 10, 5]))
    expected = torch.tensor([-3.0, 0, 3]) / np.std([1, 2.5, 4, 10, 5])
    torch.testing.assert_close(normalise_reward(torch.tensor([-3.0, 0, 3]), stats), expected)
    assert normalise_reward(torch.tensor([-1e3, 1e3]), stats, clip=4.0).tolist() == [-4, 4]
    assert normalise_reward(torch.tensor([1.0]), stats, eps=1e6).item() == pytest.approx(1e-3, rel=1e-4)


@given(st.integers(0, 2**31))
def test_returns_are_those_of_every_episode_alone(seed: int) -> None:
    """By the definition, over two rollouts: Rₜ = Σ γᵏ rₜ₋ₖ back to the start of the episode, without skipped rows."""
    steps, envs, gamma = 12, 2, 0.9
    reward, cut = batch(steps, envs, seed=seed), flags(steps, envs, chance=0.3, seed=seed)
    valid = ~torch.cat([torch.zeros(1, envs, dtype=torch.bool), cut[:-1]])  # NEXT_STEP: the row after an end
    cut &= valid
    valid = ~torch.cat([torch.zeros(1, envs, dtype=torch.bool), cut[:-1]])
    returns = []
    for n in range(envs):
        episode: list[float] = []
        for t in range(steps):
            if valid[t, n]:
                episode.append(reward[t, n].item())
                returns.append(sum(gamma**k * r for k, r in enumerate(reversed(episode))))
            if cut[t, n]:
                episode = []
    stats = reward_init((), envs)
    for rows in (slice(0, 5), slice(5, None)):
        garbage = torch.where(valid, reward, torch.nan)
        stats = reward_update(stats, garbage[rows], cut[rows], gamma, valid[rows])
    assert stats["count"].item() == len(returns)
    assert stats["mean"].item() == pytest.approx(np.mean(returns))
    assert stats["var"].item() == pytest.approx(np.var(returns))


def test_reward_statistics_of_batched_learners_equal_a_loop() -> None:
    reward, cut = batch(3, 3, 3, 3), flags(3, 3, 3, 3, chance=0.3, seed=1)
    gamma = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    stats = reward_init((3, 3), 3)
    for t in range(2):
        stats = reward_update(stats, reward + t, cut, gamma)
    result = normalise_reward(reward, stats)
    for i in range(3):
        for j in range(3):
            alone = reward_init((), 3)
            for t in range(2):
                alone = reward_update(alone, reward[i, j] + t, cut[i, j], gamma[i].item())
            assert_same({name: tensor[i, j] for name, tensor in stats.items()}, alone)
            torch.testing.assert_close(result[i, j], normalise_reward(reward[i, j], alone))


def test_reward_statistics_are_stable_baselines3s() -> None:
    """Equal to Stable-Baselines3's VecNormalize, up to its prior of 1e-4 samples of mean 0 and variance 1."""
    running = pytest.importorskip("stable_baselines3.common.running_mean_std").RunningMeanStd(epsilon=1e-12, shape=())
    reward, cut = batch(20, 4), flags(20, 4, chance=0.2, seed=1)
    total = np.zeros(4)
    for t in range(20):
        total = total * 0.9 + reward[t].numpy()
        running.update(total)
        total[cut[t].numpy()] = 0
    stats = reward_update(reward_init((), 4), reward, cut, 0.9)
    assert stats["accumulator"].numpy() == pytest.approx(total)
    assert stats["mean"].item() == pytest.approx(running.mean)
    assert stats["var"].item() == pytest.approx(running.var)


def test_reward_shapes_that_would_broadcast_are_refused() -> None:
    stats, cut = reward_init((), 3), torch.zeros(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"cut \[3, 1\]"):
        reward_update(stats, torch.zeros(3, 3), cut[:, :1], 0.9)
    with pytest.raises(ValueError, match=r"valid \[3, 1\]"):
        reward_update(stats, torch.zeros(3, 3), cut, 0.9, cut[:, :1])
    with pytest.raises(ValueError, match="accumulator"):
        reward_update(stats, torch.zeros(3, 1), cut[:, :1], 0.9)
    with pytest.raises(ValueError, match="expected learner axes"):
        normalise_reward(torch.zeros(2, 3), reward_init((3,), 3))
