"""Ensembles: one more axis of weights, equal to a loop over the members."""

from __future__ import annotations

import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.nn import MLP, BatchNorm1d, Context, Dropout, Ensemble, Sequential, apply, stack

S = N = B = 3


def test_members_equal_a_loop_also_in_their_second_derivatives():
    params = stack(lambda: Ensemble(lambda: MLP(4, (5, 2)), N), random.make_keys(range(S)))
    params = {name: value.double().requires_grad_() for name, value in params.items()}
    x = torch.randn(S, B, 4, dtype=torch.float64)
    ensemble, member = Ensemble(lambda: MLP(4, (5, 2)), N), MLP(4, (5, 2))
    out = apply(ensemble, params, x)
    assert out.shape == (S, N, B, 2)
    looped = torch.stack(
        [
            torch.stack(
                [apply(member, {n.removeprefix("member."): p[s, i] for n, p in params.items()}, x[s]) for i in range(N)]
            )
            for s in range(S)
        ]
    )
    torch.testing.assert_close(out, looped)
    leaves = list(params.values())
    for result in (out, looped):
        first = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        result.grads = (*first, *second)
    for ours, theirs in zip(out.grads, looped.grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_initial_weights_differ_and_the_module_runs_alone():
    ensemble = Ensemble(lambda: MLP(4, (5, 2)), N)
    weights = dict(ensemble.named_parameters())
    assert all(value.shape[0] == N for value in weights.values())
    weight = next(value for name, value in weights.items() if name.endswith("weight"))
    assert not torch.equal(weight[0], weight[1])
    assert ensemble(torch.randn(B, 4)).shape == (N, B, 2)


def test_statistics_and_noise_are_each_members_own():
    def make():
        return Sequential(BatchNorm1d(4), Dropout(0.5), MLP(4, (2,)))

    params = stack(lambda: Ensemble(make, N), random.make_keys(range(S)))
    ctx = Context(training=True, key=random.make_keys(range(S)))
    out = apply(Ensemble(make, N), params, torch.ones(S, B, 4) + torch.arange(B).reshape(B, 1), ctx)
    assert out.shape == (S, N, B, 2)
    assert ctx.new_buffers.keys() == {n for n in params if "running" in n or "num_batches" in n}
    assert all(value.shape[:2] == (S, N) for value in ctx.new_buffers.values())
    assert not torch.equal(out[:, 0], out[:, 1])


def test_no_member_and_the_same_member_twice_are_refused():
    with pytest.raises(SettingError, match="0 members"):
        Ensemble(lambda: MLP(4, (2,)), 0)
    same = MLP(4, (2,))
    with pytest.raises(SettingError, match="new block"):
        Ensemble(lambda: same, 2)
