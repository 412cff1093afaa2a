"""The inner loop, and the gradient through it: against finite differences, closed forms and loops, in float64."""

from __future__ import annotations

import gc

import pytest
import torch

from rlmeta.errors import SettingError
from rlmeta.functional import optim
from rlmeta.meta.adapt import adapt, expand_tasks
from rlmeta.nn import MLP, Context

S = K = N = B = 3  # a misaligned broadcast hides nowhere
RATE = 0.1


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NET = MLP(2, (4,), 1, activation="tanh")
WEIGHTS = {name: normal(S, *p.shape, seed=i) for i, (name, p) in enumerate(NET.named_parameters())}
SUPPORT = {"x": normal(S, K, B, 2, seed=10), "y": normal(S, K, B, 1, seed=11)}
QUERY = {"x": normal(S, K, B, 2, seed=12), "y": normal(S, K, B, 1, seed=13)}


def squared(weights, data):
    return (NET.run(weights, data["x"], Context()) - data["y"]).square().mean((-1, -2))


def outer(weights, support=SUPPORT, query=QUERY, steps=1, order="second", optimizer=None):
    """The loss of every task after adaptation, `[S, K]`."""
    axes = support["x"].dim() - 3
    started = expand_tasks(weights, axes, support["x"].shape[axes])
    inner = optimizer or optim.sgd(RATE)
    found = adapt(lambda w, _: squared(w, support), started, inner, steps, order=order)
    return squared(found.weights, query)


def gradient(function, weights):
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = function(leaves).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_meta_gradient_equals_finite_differences(steps):
    found = gradient(lambda w: outer(w, steps=steps), WEIGHTS)
    eps = 1e-5
    for name, weight in WEIGHTS.items():
        for index in [(0,) * weight.dim(), tuple(size - 1 for size in weight.shape)]:
            moved = weight.clone()
            moved[index] += eps
            up = outer({**WEIGHTS, name: moved}, steps=steps)[index[0]].sum()
            moved[index] -= 2 * eps
            down = outer({**WEIGHTS, name: moved}, steps=steps)[index[0]].sum()
            assert found[name][index] == pytest.approx((up - down).item() / (2 * eps), rel=1e-6, abs=1e-9)


def test_gradcheck():
    weights = [w[0].clone().requires_grad_() for w in WEIGHTS.values()]
    one = {name: value[0] for name, value in SUPPORT.items()}

    def function(*tensors):
        return outer(dict(zip(WEIGHTS, tensors)), one, {n: v[0] for n, v in QUERY.items()}, steps=2)

    assert torch.autograd.gradcheck(function, weights, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_closed_form_of_quadratics(steps):
    """k steps on ½ (w − a)ᵀH(w − a): the meta-gradient of ½ (w − b)ᵀG(w − b) is (I − lr H)ᵏ G (wₖ − b)."""
    half, other = normal(S, K, N, N, seed=1), normal(S, K, N, N, seed=2)
    h, g = half @ half.mT + torch.eye(N), other @ other.mT
    a, b, w = normal(S, K, N, seed=3), normal(S, K, N, seed=4), normal(S, N, seed=5)

    def quadratic(w, m, c):
        return 0.5 * ((w - c).unsqueeze(-2) @ m @ (w - c).unsqueeze(-1)).squeeze(-1).squeeze(-1)

    leaf = w.clone().requires_grad_()
    rate = 0.01
    found = adapt(lambda p, _: quadratic(p["w"], h, a), expand_tasks({"w": leaf}, 1, K), optim.sgd(rate), steps)
    (meta,) = torch.autograd.grad(quadratic(found.weights["w"], g, b).sum(), leaf)
    shrink = torch.linalg.matrix_power(torch.eye(N, dtype=torch.float64) - rate * h, steps)
    end = a + (shrink @ (w.unsqueeze(1) - a).unsqueeze(-1)).squeeze(-1)
    expected = (shrink @ g @ (end - b).unsqueeze(-1)).squeeze(-1).sum(1)
    torch.testing.assert_close(found.weights["w"], end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(meta, expected, rtol=1e-10, atol=1e-10)


def test_without_a_step_it_is_plain_training_on_the_queries():
    """Rate 0 or no step: second order, first order and the multi-task gradient are one."""
    plain = gradient(lambda w: squared(expand_tasks(w, 1, K), QUERY), WEIGHTS)
    for order in ("second", "first"):
        assert_close(gradient(lambda w, o=order: outer(w, steps=3, order=o, optimizer=optim.sgd(0.0)), WEIGHTS), plain)
        assert_close(gradient(lambda w, o=order: outer(w, steps=0, order=o), WEIGHTS), plain)


def test_first_order_is_the_gradient_at_the_detached_adapted_weights():
    started = expand_tasks(WEIGHTS, 1, K)
    found = adapt(lambda w, _: squared(w, SUPPORT), started, optim.sgd(RATE), 2, order="none")
    at_end = gradient(lambda w: squared(w, QUERY), found.weights)
    first = gradient(lambda w: outer(w, steps=2, order="first"), WEIGHTS)
    assert_close(first, {name: value.sum(1) for name, value in at_end.items()})
    second = gradient(lambda w: outer(w, steps=2), WEIGHTS)
    assert not torch.allclose(first["0.weight"], second["0.weight"], rtol=1e-3)


def test_orders_agree_where_the_loss_is_linear():
    c, leaf = normal(S, K, N), normal(S, N, seed=1).requires_grad_()
    grads = []
    for order in ("first", "second"):
        found = adapt(
            lambda w, _: (w["w"] * c).sum(-1), expand_tasks({"w": leaf}, 1, K), optim.sgd(RATE), 2, order=order
        )
        grads.append(torch.autograd.grad(found.weights["w"].square().sum(), leaf)[0])
    torch.testing.assert_close(*grads)


def test_the_orders_differ_by_the_hessian_times_the_rate():
    """d (second − first) / d rate at 0 is −H_support g_query."""
    rate = 1e-6
    second = gradient(lambda w: outer(w, optimizer=optim.sgd(rate)), WEIGHTS)
    first = gradient(lambda w: outer(w, order="first", optimizer=optim.sgd(rate)), WEIGHTS)

    leaves = {n: w.clone().requires_grad_() for n, w in expand_tasks(WEIGHTS, 1, K).items()}
    g_support = torch.autograd.grad(squared(leaves, SUPPORT).sum(), list(leaves.values()), create_graph=True)
    g_query = torch.autograd.grad(squared(leaves, QUERY).sum(), list(leaves.values()))
    dot = sum((a * b).sum() for a, b in zip(g_support, g_query))
    product = torch.autograd.grad(dot, list(leaves.values()))
    for name, hessian_term in zip(WEIGHTS, product):
        slope = (second[name] - first[name]) / rate
        torch.testing.assert_close(slope, -hessian_term.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["second", "first"])
def test_batched_equals_looped(steps, order):
    together = gradient(lambda w: outer(w, steps=steps, order=order), WEIGHTS)
    for s in range(S):
        one = {name: w[s] for name, w in WEIGHTS.items()}
        looped = {name: torch.zeros_like(w) for name, w in one.items()}
        for k in range(K):
            part = [{n: v[s, k : k + 1] for n, v in data.items()} for data in (SUPPORT, QUERY)]
            for name, g in gradient(lambda w, p=part: outer(w, *p, steps=steps, order=order), one).items():
                looped[name] += g
        assert_close({name: g[s] for name, g in together.items()}, looped, rtol=1e-9)


def test_order_of_tasks_is_irrelevant():
    turned = [{n: v.flip(1) for n, v in data.items()} for data in (SUPPORT, QUERY)]
    torch.testing.assert_close(outer(WEIGHTS, *turned, steps=2).flip(1), outer(WEIGHTS, steps=2))


@pytest.mark.parametrize(
    "make", [lambda r: optim.sgd(r, momentum=0.9), lambda r: optim.adam(r), lambda r: optim.rmsprop(r)]
)
def test_any_optimizer_and_its_rate_can_be_differentiated(make):
    """The rate's meta-gradient against finite differences; finite where an inner gradient is zero."""
    rate = torch.full((S, K), 0.01, dtype=torch.float64, requires_grad=True)
    weights = {**WEIGHTS, "unused": normal(S, 2, seed=9)}
    loss = outer(weights, steps=3, optimizer=make(rate))
    (found,) = torch.autograd.grad(loss.sum(), rate)
    eps = 1e-6
    up, down = (outer(weights, steps=3, optimizer=make(rate.detach() + e)) for e in (eps, -eps))
    torch.testing.assert_close(found, (up - down) / (2 * eps), rtol=1e-5, atol=1e-8)
    meta = gradient(lambda w: outer(w, steps=3, optimizer=make(0.01)), weights)
    assert all(torch.isfinite(g).all() for g in meta.values())


def test_a_rate_for_every_weight_has_the_elementwise_gradient():
    """One step: d query / d rate = −g_support · g_query."""
    rates = {name: torch.full_like(w, RATE).requires_grad_() for name, w in WEIGHTS.items()}
    started = expand_tasks(WEIGHTS, 1, K)

    def update(grads, state, params):
        return {n: -g * rates[n].unsqueeze(1) for n, g in grads.items()}, state

    per_weight = optim.Optimizer(lambda params, learner_shape=(): {"count": torch.zeros(learner_shape)}, update)
    found = adapt(lambda w, _: squared(w, SUPPORT), started, per_weight, 1)
    torch.testing.assert_close(squared(found.weights, QUERY), outer(WEIGHTS))
    grads = torch.autograd.grad(squared(found.weights, QUERY).sum(), list(rates.values()))
    support = gradient(lambda w: squared(w, SUPPORT), started)
    ends = adapt(lambda w, _: squared(w, SUPPORT), started, optim.sgd(RATE), 1, order="none").weights
    query = gradient(lambda w: squared(w, QUERY), ends)
    for name, g in zip(rates, grads):
        torch.testing.assert_close(g, -(support[name] * query[name]).sum(1))


def test_a_trajectory_is_that_of_torch():
    module = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    module.load_state_dict({name: w[0] for name, w in WEIGHTS.items()})
    torch_adam = torch.optim.Adam(module.parameters(), 0.05)
    data = {name: value[0, 0] for name, value in SUPPORT.items()}
    for _ in range(4):
        torch_adam.zero_grad()
        (module(data["x"]) - data["y"]).square().mean().backward()
        torch_adam.step()
    ours = adapt(
        lambda w, _: squared(w, data), {n: w[0] for n, w in WEIGHTS.items()}, optim.adam(0.05), 4, order="none"
    )
    for name, p in module.named_parameters():
        torch.testing.assert_close(ours.weights[name], p.detach())


def test_nothing_is_changed_and_nothing_is_drawn():
    before, generator = {n: w.clone() for n, w in WEIGHTS.items()}, torch.get_rng_state()
    adam = optim.adam(0.1)
    state = adam.init(expand_tasks(WEIGHTS, 1, K), (S, K))
    kept = {name: m.clone() for name, m in state["mean"].items()}
    for order in ("second", "first", "none"):
        adapt(lambda w, _: squared(w, SUPPORT), expand_tasks(WEIGHTS, 1, K), adam, 3, order=order, state=state)
    assert all(torch.equal(WEIGHTS[n], before[n]) for n in before)
    assert all(torch.equal(state["mean"][n], kept[n]) for n in kept)
    assert torch.equal(generator, torch.get_rng_state())


def test_an_adaptation_that_goes_on_is_the_longer_one():
    loss, started = (lambda w, _: squared(w, SUPPORT)), expand_tasks(WEIGHTS, 1, K)
    whole = adapt(loss, started, optim.adam(0.1), 5)
    first = adapt(loss, started, optim.adam(0.1), 2)
    second = adapt(loss, first.weights, optim.adam(0.1), 3, state=first.state)
    assert all(torch.equal(second.weights[n], whole.weights[n]) for n in whole.weights)
    assert all(torch.equal(a, b) for a, b in zip(first.losses + second.losses, whole.losses))


def test_order_none_keeps_no_graph():
    found = adapt(lambda w, _: squared(w, SUPPORT), expand_tasks(WEIGHTS, 1, K), optim.adam(0.1), 3, order="none")
    kept = [*found.weights.values(), *found.losses, *found.state["mean"].values()]
    assert not any(value.requires_grad for value in kept)


def tensors_alive():
    gc.collect()
    return sum(type(found) is torch.Tensor for found in gc.get_objects())


def test_a_thousand_adaptations_leave_nothing_behind():
    def measure(w):
        return outer(w, steps=1, order="none")

    weights = {name: w.clone() for name, w in WEIGHTS.items()}
    measure(weights)
    before = tensors_alive()
    for _ in range(1000):
        measure(weights)
    assert tensors_alive() <= before


def test_what_is_kept_for_the_meta_gradient_grows_by_the_same_with_every_step():
    """Bytes that the graph keeps, each storage once."""

    def kept(steps):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x
            return x

        leaves = {name: w.clone().requires_grad_() for name, w in WEIGHTS.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = outer(leaves, steps=steps)
        assert loss.requires_grad
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    two, four, eight = kept(2), kept(4), kept(8)
    assert 0 < eight - four <= 2.1 * (four - two)


def test_tasks_can_be_adapted_inside_vmap_as_a_researcher_may_do():
    one = {name: w[0] for name, w in WEIGHTS.items()}

    def loss(weights, x, y):
        return (NET.run(weights, x, Context()) - y).square().mean()

    def adapted(x, y):
        g = torch.func.grad(loss)(one, x, y)
        return {n: one[n] - RATE * g[n] for n in one}

    theirs = torch.func.vmap(adapted)(SUPPORT["x"][0], SUPPORT["y"][0])
    ours = adapt(
        lambda w, _: squared(w, {n: v[0] for n, v in SUPPORT.items()}), expand_tasks(one, 0, K), optim.sgd(RATE), 1
    )
    assert_close(ours.weights, theirs)


def test_a_loss_that_forgets_the_weights_is_refused():
    with pytest.raises(SettingError, match="does not depend on the weights"):
        adapt(lambda w, _: torch.ones(S, K), expand_tasks(WEIGHTS, 1, K), optim.sgd(RATE), 1)
    with pytest.raises(SettingError, match="steps is -1, expected a whole number, at least 0"):
        adapt(lambda w, _: squared(w, SUPPORT), expand_tasks(WEIGHTS, 1, K), optim.sgd(RATE), -1)


@pytest.mark.parametrize("order", ["second", "first", "none"])
def test_a_modules_frozen_parameters_reach_the_loss_and_stay(order):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    module[0].bias.requires_grad_(False)
    weights, x = dict(module.named_parameters()), normal(5, 2)

    def loss(w, step):
        return torch.func.functional_call(module, w, x).square().mean()

    found = adapt(loss, weights, optim.adam(0.1), 3, order=order).weights
    assert list(found) == list(weights)
    assert torch.equal(found["0.bias"], weights["0.bias"])
    assert all(not torch.equal(found[name], weights[name]) for name in weights if name != "0.bias")


@pytest.mark.parametrize("order", ["second", "first", "none"])
def test_it_adapts_where_nothing_is_recorded_and_lets_go_of_what_is(order):
    """Within `torch.no_grad()`; with order "none" also from weights that require gradients."""
    expected = adapt(lambda w, _: squared(w, SUPPORT), expand_tasks(WEIGHTS, 1, K), optim.sgd(RATE), 2, order=order)
    with torch.no_grad():
        found = adapt(lambda w, _: squared(w, SUPPORT), expand_tasks(WEIGHTS, 1, K), optim.sgd(RATE), 2, order=order)
    assert_close(found.weights, expected.weights, rtol=0, atol=0)
    leaves = {name: w.clone().requires_grad_() for name, w in expand_tasks(WEIGHTS, 1, K).items()}
    found = adapt(lambda w, _: squared(w, SUPPORT), leaves, optim.sgd(RATE), 2, order=order)
    recorded = [*found.weights.values(), *found.losses]
    assert all(value.requires_grad == (order != "none") for value in recorded)
