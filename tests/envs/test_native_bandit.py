"""Bandits: the distribution of every arm, and arms that differ by row."""

from __future__ import annotations

import pytest
import torch

from rlmeta.envs.native import Bandit, NativeWorld
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional.random import make_keys


def pulls(env: Bandit, count: int = 5_000, **physics: torch.Tensor) -> torch.Tensor:
    """Rewards `[arms, count]`, with a learner per arm."""
    arms = len(env.mean)
    world = NativeWorld(env, (arms,), count, physics or None)
    _, transition = world.step(world.reset(make_keys(range(arms))), torch.arange(arms)[:, None].expand(arms, count))
    assert transition.terminated.all() and transition.memory_reset.all() and not transition.truncated.any()
    assert (transition.observation == 0).all()
    return transition.reward


def test_bernoulli_arms_pay_with_their_probability() -> None:
    reward = pulls(Bandit(mean=(0.0, 0.25, 0.9, 1.0)))
    assert set(reward.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(reward.mean(1), torch.tensor([0.0, 0.25, 0.9, 1.0]), atol=0.031, rtol=0)  # 5 sigma
    assert (reward[0] == 0).all() and (reward[3] == 1).all()


def test_gaussian_arms_have_their_mean_and_deviation() -> None:
    reward = pulls(Bandit(mean=(-1.0, 2.0), reward="gaussian", std=0.5))
    torch.testing.assert_close(reward.mean(1), torch.tensor([-1.0, 2.0]), atol=0.035, rtol=0)
    torch.testing.assert_close(reward.std(1), torch.tensor([0.5, 0.5]), atol=0.025, rtol=0)
    share = (reward[1] < 2.0 + 0.5).double().mean()
    assert share.item() == pytest.approx(0.8413, abs=0.026)


def test_arms_may_differ_by_row() -> None:
    mean = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    world = NativeWorld(Bandit(mean=(0.5, 0.5)), (2,), 2, {"mean": mean})
    state = world.reset(make_keys([0, 1]))
    for arm in (0, 1):
        state, transition = world.step(state, torch.full((2, 2), arm))
        assert torch.equal(transition.reward, mean[..., arm])
    wide = pulls(Bandit(mean=(0.0, 0.0), reward="gaussian"), std=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(wide.std(1), torch.tensor([1.0, 3.0]), rtol=0.05, atol=0)


def test_mistakes_are_named() -> None:
    with pytest.raises(SettingError, match="expected 'bernoulli' or 'gaussian'"):
        Bandit(reward="poisson")
    with pytest.raises(SettingError, match=r"mean=\(0.5, 1.5\)"):
        Bandit(mean=(0.5, 1.5))
    with pytest.raises(SettingError, match="one number an arm"):
        Bandit(mean=())
    with pytest.raises(UnknownNameError, match="std"):
        NativeWorld(Bandit(), (), 1, {"std": 1.0})
