"""The gradient step: equal to torch's, per learner, with frozen entries and hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlmeta.engine.capture import Capture
from rlmeta.functional import optim, random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.method import Gradients, Method, StepInfo
from rlmeta.learning.minibatch import minibatches
from rlmeta.learning.state import put, select, take
from rlmeta.learning.step import step, steps
from tests.learning.toy import LinearRegression, data

S, F, B = 4, 4, 4


def run(state, batch, optimizer, steps=3, **more):
    for _ in range(steps):
        state, info = step(LinearRegression(), state, batch, optimizer, **more)
    return state, info


def fresh(keys=None, optimizer=None):
    keys = random.make_keys(range(S)) if keys is None else keys
    optimizer = optimizer or optim.adam(0.1)
    return LinearRegression().init(keys, F, optimizer), data(keys, B, F), optimizer


def test_equals_torch_optimizer_with_clipping_learner_by_learner():
    state, batch, optimizer = fresh()
    start = tree.map(torch.clone, state["params"]["weights"])
    state, _ = run(state, batch, optimizer, max_grad_norm=0.5)
    for s in range(S):
        w, b = start["net.weight"][s].clone().requires_grad_(), start["net.bias"][s].clone().requires_grad_()
        adam = torch.optim.Adam([w, b], lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            ((batch["x"][s] @ w + b - batch["y"][s]) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_([w, b], 0.5)
            adam.step()
        torch.testing.assert_close(state["params"]["weights"]["net.weight"][s], w.detach())
        torch.testing.assert_close(state["params"]["weights"]["net.bias"][s], b.detach())


def test_per_learner_learning_rates_equal_separate_runs():
    rates = torch.tensor([0.1, 0.01, 0.3, 0.05], dtype=torch.float64)
    state, batch, optimizer = fresh(optimizer=optim.adam(rates))
    state, _ = run(state, batch, optimizer)
    for s in range(S):
        alone, alone_batch, one = fresh(random.make_keys([s]), optim.adam(float(rates[s])))
        alone, _ = run(alone, alone_batch, one)
        torch.testing.assert_close(
            state["params"]["weights"]["net.weight"][s], alone["params"]["weights"]["net.weight"][0]
        )


def test_a_learner_with_a_nan_is_frozen_and_the_others_never_notice():
    state, batch, optimizer = fresh()
    clean, _ = run(tree.map(torch.clone, state), batch, optimizer)
    poisoned = {**batch, "y": batch["y"].clone()}
    poisoned["y"][1, 0] = torch.nan
    before = state["params"]["weights"]["net.weight"][1].clone()
    state, _ = run(state, poisoned, optimizer)
    assert state["active"].tolist() == [True, False, True, True]
    assert torch.equal(state["params"]["weights"]["net.weight"][1], before)
    assert torch.isfinite(state["optimizer"]["all"]["mean"]["weights"]).all()
    for s in (0, 2, 3):
        for a, b in zip(tree.leaves(take(state, s)["params"]), tree.leaves(take(clean, s)["params"])):
            assert torch.equal(a, b)


def test_weights_that_would_overflow_are_never_applied():
    rates = torch.tensor([0.1, 1e308, 0.1, 0.1], dtype=torch.float64)
    state, batch, optimizer = fresh(optimizer=optim.sgd(rates))
    state, _ = run(state, batch, optimizer, steps=5)
    assert not state["active"][1]
    assert all(torch.isfinite(w).all() for w in state["params"]["weights"].values())


def test_inactive_learners_stay_bit_identical():
    state, batch, optimizer = fresh()
    old = tree.map(torch.clone, {name: state[name] for name in ("params", "optimizer")})
    active = torch.tensor([True, False, True, False])
    state, _ = run(state, batch, optimizer, active=active)
    for s, is_active in enumerate(active.tolist()):
        same = torch.equal(state["params"]["weights"]["net.weight"][s], old["params"]["weights"]["net.weight"][s])
        assert same is not is_active
        assert (
            torch.equal(state["optimizer"]["all"]["mean"]["weights"][s], old["optimizer"]["all"]["mean"]["weights"][s])
            is not is_active
        )


class Mask(Method):
    """PackNet's stand-in: the first two weights belong to an old task."""

    name = "mask"

    def frozen(self, p, m, task) -> Tensor:
        mask = torch.zeros(S, F + 1, dtype=torch.bool)
        mask[:, :2] = True
        return mask


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9, weight_decay=0.1),
        optim.adam(0.1, weight_decay=0.1),
        optim.adamw(0.1, weight_decay=0.1),
        optim.rmsprop(0.1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_frozen_entries_stay_bit_identical_under_every_optimizer(optimizer):
    state, batch, optimizer = fresh(optimizer=optimizer)
    state, _ = run(state, batch, optimizer)  # moments of the time before the freeze must not move them either
    state["methods"] = {"mask": {}}
    old = tree.map(torch.clone, state["params"]["weights"])
    state, _ = run(state, batch, optimizer, methods=[Mask()], max_grad_norm=0.1)
    new = state["params"]["weights"]
    assert torch.equal(new["net.weight"][:, :2], old["net.weight"][:, :2])
    assert not torch.equal(new["net.weight"][:, 2:], old["net.weight"][:, 2:])


def test_frozen_entries_do_not_count_in_the_clipping_norm():
    state, batch, optimizer = fresh(optimizer=optim.sgd(0.1))
    state["methods"] = {"mask": {}}
    _, info = step(LinearRegression(), state, batch, optimizer, methods=[Mask()])
    state, batch, _ = fresh(optimizer=optim.sgd(0.1))
    w = {n: v.clone().requires_grad_() for n, v in state["params"]["weights"].items()}
    prediction = (batch["x"] * w["net.weight"].unsqueeze(-2)).sum(-1) + w["net.bias"]
    (prediction - batch["y"]).square().mean(-1).sum().backward()
    free = torch.cat([w["net.weight"].grad[:, 2:], w["net.bias"].grad], -1)
    torch.testing.assert_close(info["losses/grad_norm"], free.norm(dim=-1))


class Penalty(Method):
    """EWC's stand-in: a quadratic pull to an anchor, by `loss` or in closed form by `grads`."""

    def __init__(self, closed: bool) -> None:
        self.closed, self.name = closed, "penalty"
        self.seen: list[StepInfo] = []

    def loss(self, learner, p, m, batch, task, key):
        if self.closed:
            return None
        flat = torch.cat([w.flatten(1) for w in p["weights"].values()], -1)
        return 0.5 * (flat - m["anchor"]).square().sum(-1)

    def grads(self, learner, gradients: Gradients, p, m, task) -> Tensor:
        if not self.closed:
            return gradients.total
        flat = torch.cat([w.detach().flatten(1) for w in p["weights"].values()], -1)
        return gradients.total + (flat - m["anchor"])

    def after_step(self, learner, info: StepInfo, p, m, task, key):
        self.seen.append(info)
        return m


def test_a_penalty_by_loss_equals_the_same_in_closed_form_and_leaves_the_task_gradient_alone():
    results, infos = [], []
    for closed in (False, True):
        state, batch, optimizer = fresh(optimizer=optim.sgd(0.1))
        state["methods"] = {"penalty": {"anchor": torch.zeros(S, F + 1, dtype=torch.float64)}}
        method = Penalty(closed)
        state, _ = run(state, batch, optimizer, methods=[method])
        results.append(state["params"]["weights"]["net.weight"])
        infos.append(method.seen)
    torch.testing.assert_close(results[0], results[1])
    plain, batch, optimizer = fresh(optimizer=optim.sgd(0.1))
    assert not torch.allclose(results[0], run(plain, batch, optimizer)[0]["params"]["weights"]["net.weight"])
    torch.testing.assert_close(infos[0][0].gradient, infos[1][0].gradient)
    assert infos[0][0].delta.abs().sum() > 0


class Shrunk(Method):
    """A re-parametrisation that every forward pass sees."""

    name = "shrunk"

    def params(self, learner, p, m, task):
        return {**p, "weights": {name: 0.5 * w for name, w in p["weights"].items()}}


def test_the_params_hook_changes_the_forward_pass_and_gradients_flow_through_it():
    state, batch, optimizer = fresh(optimizer=optim.sgd(0.1))
    start = tree.map(torch.clone, state["params"]["weights"])
    state["methods"] = {"shrunk": {}}
    state, info = step(LinearRegression(), state, batch, optimizer, methods=[Shrunk()])
    w = {n: v.clone().requires_grad_() for n, v in start.items()}
    prediction = (batch["x"] * 0.5 * w["net.weight"].unsqueeze(-2)).sum(-1) + 0.5 * w["net.bias"]
    loss = (prediction - batch["y"]).square().mean(-1)
    loss.sum().backward()
    torch.testing.assert_close(info["net"], loss.detach())
    expected = start["net.weight"] - 0.1 * w["net.weight"].grad
    torch.testing.assert_close(state["params"]["weights"]["net.weight"], expected)


def test_an_inner_gradient_step_differentiates_through_losses_and_optimizer():
    """MAML's stand-in: the outer gradient of one inner step equals finite differences."""
    from rlmeta.learning.gradients import StepContext

    keys = random.make_keys(range(S))
    learner, (support, query) = LinearRegression(), (data(keys, B, F), data(random.fold(keys, 1), B, F))
    state = learner.init(keys, F, optim.sgd(0.1))
    weights = {n: w.clone().requires_grad_() for n, w in state["params"]["weights"].items()}
    inner = optim.sgd(0.1)

    def outer(initial):
        p = {**state["params"], "weights": initial}
        loss = learner.losses(p, support, StepContext())["net"].sum()
        gradients = dict(zip(initial, torch.autograd.grad(loss, list(initial.values()), create_graph=True)))
        updates, _ = inner.update(gradients, inner.init(initial, keys.shape), initial)
        adapted = optim.apply_updates(initial, updates)
        return learner.losses({**p, "weights": adapted}, query, StepContext())["net"].sum()

    found = torch.autograd.grad(outer(weights), weights["net.weight"])[0]
    for index in ((0, 0), (3, 2)):
        moved = []
        for sign in (1, -1):
            shifted = {n: w.detach().clone() for n, w in weights.items()}
            shifted["net.weight"][index] += sign * 1e-5
            moved.append(outer({n: w.requires_grad_() for n, w in shifted.items()}))
        torch.testing.assert_close(found[index], ((moved[0] - moved[1]) / 2e-5).detach(), rtol=1e-6, atol=1e-8)


def test_packed_weights_are_views_and_packing_twice_is_free():
    weights = {"a": torch.randn(S, 3, 2), "b": torch.randn(S, 5)}
    packed = Packed.of(weights, 1)
    assert packed.flat.shape == (S, 11)
    assert Packed.of(packed, 1) is packed
    for name, value in weights.items():
        assert torch.equal(packed[name], value)
        assert packed[name].untyped_storage().data_ptr() == packed.flat.untyped_storage().data_ptr()
    flat = packed.flat.clone().requires_grad_()
    Packed.view(flat, packed, 1)["b"].sum().backward()
    assert flat.grad.sum() == S * 5


def test_take_put_and_select():
    state = {"a": torch.arange(12.0).reshape(4, 3), "b": {"c": torch.arange(4)}}
    assert torch.equal(take(state, 2)["a"], state["a"][2])
    moved = put(state, 1, take(state, 3))
    assert moved["b"]["c"].tolist() == [0, 3, 2, 3] and state["b"]["c"].tolist() == [0, 1, 2, 3]
    chosen = select(torch.tensor([True, False, True, False]), moved, {"a": -state["a"], "b": {"c": -state["b"]["c"]}})
    assert chosen["b"]["c"].tolist() == [0, -1, 2, -3]


# ---------------------------------------------------------------------- several steps


class Recorded(LinearRegression):
    """With a capture of its own."""

    def __init__(self, warm_up: int) -> None:
        self.capture = Capture(warm_up)


def follow(learner, seed, batch_size, optimizer, report, **more):
    """An update of three epochs, and its reports; the learner may have recorded other updates already."""
    keys = random.make_keys(range(seed, seed + S))
    state, batch = learner.init(keys, F, optimizer), data(keys, 8, F)
    if more.pop("poisoned", False):
        batch["y"][1, 5] = torch.nan
    batches = minibatches(keys, seed, batch, batch_size, 3)
    if learner.capture is not None:
        return steps(learner, state, batches, {}, optimizer, max_grad_norm=0.5, report=report, **more)
    reports = []
    for minibatch in batches:
        state, info = step(learner, state, minibatch, optimizer, max_grad_norm=0.5, report=report, **more)
        reports.append(info)
    return state, tree.map(lambda *rows: torch.stack(rows), *reports)


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("active", [None, torch.tensor([True, True, False, True])])
@pytest.mark.parametrize("report", [False, True])
def test_several_steps_are_the_bits_of_one_after_another(batch_size, poisoned, active, report):
    optimizer = optim.adam(torch.tensor([0.1, 0.01, 0.3, 0.05], dtype=torch.float64))
    recorded, plain = Recorded(warm_up=2), Recorded(warm_up=2)
    plain.capture = None
    for seed in range(8):
        more = {"report": report, "active": active, "poisoned": poisoned}
        (state, reports), (expected, rows) = (
            follow(learner, seed, batch_size, optimizer, **more) for learner in (recorded, plain)
        )
        assert state["active"].tolist() == [True, not poisoned, True, True]
        for a, b in zip(tree.leaves(state), tree.leaves(expected), strict=True):
            assert torch.equal(a, b)
        assert reports.keys() == rows.keys() and bool(reports) == report
        for name in rows:
            assert torch.equal(reports[name].nan_to_num(7.0), rows[name].nan_to_num(7.0))
    assert all(program is not None for program in recorded.capture._programs.values())


def test_epochs_in_one_go_are_the_epochs_one_by_one():
    keys = random.make_keys(range(S))
    batch = data(keys, 8, F)
    at_once = list(minibatches(keys, 5, batch, 2, 3))
    by_epoch = [one for epoch in (5, 6, 7) for one in minibatches(keys, epoch, batch, 2)]
    assert len(at_once) == len(by_epoch) == 12
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(at_once, by_epoch))
    assert list(minibatches(keys, 0, batch, 2, 0)) == [] and len(list(minibatches(keys, 0, batch, 8, 2))) == 2
