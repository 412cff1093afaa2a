from __future__ import annotations

import pytest
import torch

from rlmeta import nn
from rlmeta.errors import SettingError
from tests.nn.learners import keys


def drop(p: float, x: torch.Tensor, key: torch.Tensor, prefix: str = "") -> torch.Tensor:
    return nn.Dropout(p).run({}, x, nn.Context(training=True, key=key), prefix)


def test_share_and_scale() -> None:
    out = drop(0.2, torch.ones(3, 100_000), keys(3))
    assert torch.equal(out.unique(), torch.tensor([0.0, 1.25]))
    share = (out == 0).double().mean(1)
    assert ((share - 0.2).abs() < 4 * (0.2 * 0.8 / 100_000) ** 0.5).all()


def test_a_learners_mask_is_its_own() -> None:
    x = torch.ones(3, 3, 1000)
    out = drop(0.5, x, keys(3))
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out[1], drop(0.5, x[1], keys(3)[1]))
    assert torch.equal(out[[2, 0]], drop(0.5, x[:2], keys(3)[[2, 0]]))
    assert torch.equal(out, drop(0.5, x, keys(3)))
    assert not torch.equal(out, drop(0.5, x, keys(3, seed=3)))
    assert not torch.equal(out, drop(0.5, x, keys(3), "another."))


def test_places_in_a_sequence_have_their_own_masks() -> None:
    block = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    out = nn.apply(block, {}, torch.ones(100_000), nn.Context(training=True, key=keys()))
    assert abs((out == 0).double().mean() - 0.75) < 0.01


def test_gradient_is_the_mask() -> None:
    x = torch.ones(1000, requires_grad=True)
    out = drop(0.5, x, keys())
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_evaluation_and_extremes() -> None:
    x = torch.randn(3, 4)
    assert nn.apply(nn.Dropout(0.9), {}, x) is x
    assert drop(0.0, x, keys(3)) is x
    assert torch.equal(drop(1.0, x, keys(3)), torch.zeros(3, 4))


def test_refuses() -> None:
    with pytest.raises(SettingError, match="pass a key"):
        nn.apply(nn.Dropout(0.5), {}, torch.ones(3), nn.Context(training=True))
    with pytest.raises(SettingError, match=r"1.5, expected a number in \[0, 1\]"):
        nn.Dropout(1.5)
    with pytest.raises(ValueError, match="learner axes"):
        drop(0.5, torch.ones(2, 3), keys(3))
