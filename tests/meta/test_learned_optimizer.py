"""The learned optimizer as an optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from rlmeta.functional import random
from rlmeta.functional.optim import apply_updates
from rlmeta.meta.adapt import adapt, expand_tasks
from rlmeta.meta.learned_optimizer import CoordinateLSTM, TorchLearnedOptimizer, learned_optimizer, log_and_sign
from rlmeta.nn import stack

NET = CoordinateLSTM((5, 4))


def theta(seeds=3, net=NET):
    made = stack(lambda: CoordinateLSTM(net.hidden_sizes), random.make_keys(range(seeds)))
    return {name: value.double() for name, value in made.items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_log_and_sign_has_two_branches_that_meet():
    edge = math.exp(-10.0)
    g = torch.tensor([0.0, edge, -edge, edge * (1 - 1e-12), 1.0, -5.0, 1e-8], dtype=torch.float64)
    expected = [
        (-1, 0), (-1, 1), (-1, -1), (-1, 1), (0, 1), (math.log(5) / 10, -1), (-1, 1e-8 * math.exp(10)),
    ]  # fmt: skip
    torch.testing.assert_close(log_and_sign(g), torch.tensor(expected, dtype=torch.float64))
    leaf = torch.zeros(3, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(log_and_sign(leaf).sum(), leaf)[0]).all()


def test_it_is_coordinate_wise():
    """Permuting the weights permutes the updates; every coordinate has its own state."""
    optimizer, g, order = learned_optimizer(NET, theta(1)), normal(1, 7), torch.randperm(7)
    weights, state = {"w": normal(1, 7, seed=1)}, optimizer.init({"w": normal(1, 7)}, (1,))
    turned = optimizer.init({"w": normal(1, 7)}, (1,))
    for step in range(3):
        updates, state = optimizer.update({"w": g + step}, state, weights)
        other, turned = optimizer.update({"w": g[:, order] + step}, turned, weights)
        torch.testing.assert_close(updates["w"][:, order], other["w"])
    assert state["0"]["hidden"].shape == (1, 7, 5)
    assert len({round(float(x), 9) for x in state["1"]["cell"][0, :, 0]}) == 7


def test_a_zero_output_layer_moves_nothing():
    net = CoordinateLSTM((5,), zero=True)
    optimizer = learned_optimizer(net, {n: p.detach() for n, p in net.named_parameters()})
    weights = {"w": torch.randn(3, 2), "b": torch.randn(3)}
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
    assert all((update == 0).all() for update in updates.values())


def test_learners_and_problems_are_loops():
    """θ [S, ...] on weights [S, K, ...] is every learner on every problem; θ [S, K, ...] has one for each."""
    s = k = b = 3
    weights, grads = (
        {"w": normal(s, k, b, b), "b": normal(s, k, b, seed=1)},
        [{"w": normal(s, k, b, b, seed=i), "b": normal(s, k, b, seed=i + 9)} for i in range(2)],
    )
    meta = theta(s)

    def run(meta, pick, shape):
        optimizer = learned_optimizer(NET, meta)
        w, state = {n: pick(x) for n, x in weights.items()}, None
        for g in grads:
            state = optimizer.init(w, shape) if state is None else state
            updates, state = optimizer.update({n: pick(x) for n, x in g.items()}, state, w)
            w = apply_updates(w, updates)
        return w

    together = run(meta, lambda x: x, (s, k))
    each = run(expand_tasks(meta, 1, k), lambda x: x, (s, k))
    for i in range(s):
        for j in range(k):
            alone = run({n: v[i] for n, v in meta.items()}, lambda x, i=i, j=j: x[i, j], ())
            for name in weights:
                torch.testing.assert_close(together[name][i, j], alone[name])
                torch.testing.assert_close(each[name][i, j], alone[name])


def test_the_meta_gradient_equals_finite_differences():
    """Through LSTM states and sums of updates; the inner gradients count as constants, so along a linear loss."""
    slope = normal(2, 4, 3)

    def unroll(meta):
        started = {"w": torch.ones(2, 4, 3, dtype=torch.float64)}
        loss = lambda w, i: (w["w"] * slope * (i + 1)).sum(-1)  # noqa: E731
        found = adapt(loss, started, learned_optimizer(NET, meta), 4, order="first")
        return found.weights["w"].square().sum() + sum(value.sum() for value in found.losses)

    meta = theta(2)
    leaves = {n: v.clone().requires_grad_() for n, v in meta.items()}
    grads = dict(zip(leaves, torch.autograd.grad(unroll(leaves), list(leaves.values()))))
    for name, value in meta.items():
        index, eps = (1,) + (0,) * (value.dim() - 1), 1e-6
        ends = []
        for sign in (1, -1):
            moved = value.clone()
            moved[index] += sign * eps
            ends.append(unroll({**meta, name: moved}).item())
        assert grads[name][index].item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-5, abs=1e-8)


def test_in_torchs_form_it_is_the_same_optimizer_and_its_state_can_be_saved():
    meta = {name: value[0] for name, value in theta(1).items()}
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()
    started = {name: p.detach().clone() for name, p in module.named_parameters()}
    x, y = normal(5, 3), normal(5, 2, seed=1)
    make = lambda: TorchLearnedOptimizer(module.parameters(), NET, meta)  # noqa: E731
    optimizer = make()
    for i in range(4):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        if i == 1:
            saved = optimizer.state_dict()
            optimizer = make()
            optimizer.load_state_dict(saved)

    def loss(w, _):
        return (x @ w["weight"].mT + w["bias"] - y).square().mean()

    ours = adapt(loss, started, learned_optimizer(NET, meta), 4, order="none")
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), ours.weights[name])
