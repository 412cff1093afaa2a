"""Quadratic penalties of EWC, summed to one quadratic."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional.quadratics import add_quadratic, quadratic_value, replace_quadratic, zero_quadratic

DOUBLE = torch.float64


def history(tasks: int, learners: tuple[int, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher informations, many of them 0, and anchors, `[T, *L, P]`."""
    generator = torch.Generator().manual_seed(0)
    fisher = torch.rand(tasks, *learners, size, generator=generator, dtype=DOUBLE).pow(4)
    fisher = torch.where(torch.rand(fisher.shape, generator=generator) < 0.5, 0.0, fisher)
    fisher[..., 0] = 0  # a weight that no task needs
    return fisher, torch.randn(fisher.shape, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("learners", [(), (3,), (3, 2)])
def test_one_quadratic_equals_the_sum_over_fifty_tasks(learners):
    fisher, anchors = history(50, learners, 7)
    q = zero_quadratic(anchors[0])
    for f, anchor in zip(fisher, anchors):
        q = add_quadratic(q, f, anchor)
    theta = torch.randn(*learners, 7, dtype=DOUBLE, requires_grad=True)
    expected = (fisher * (theta - anchors).square()).sum((0, -1))
    torch.testing.assert_close(quadratic_value(q, theta), expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(expected.sum(), theta)
    torch.testing.assert_close(2 * q["precision"] * (theta - q["centre"]), gradient, rtol=1e-10, atol=1e-12)
    assert (q["precision"][..., 0] == 0).all() and torch.isfinite(q["centre"]).all()


def test_online_with_decay_one_and_equal_anchors_is_the_sum_and_with_zero_the_last_task():
    fisher, anchors = history(5, (3,), 4)
    keep, forget = torch.ones(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    exact, online, last = (zero_quadratic(anchors[0]) for _ in range(3))
    for f in fisher:
        exact, online = add_quadratic(exact, f, anchors[0]), replace_quadratic(online, f, anchors[0], keep)
        last = replace_quadratic(last, f, anchors[0], forget)
    torch.testing.assert_close(online["precision"], exact["precision"])
    used = exact["precision"] > 0
    torch.testing.assert_close(online["centre"][used], exact["centre"][used])
    assert torch.equal(last["precision"], fisher[-1])
