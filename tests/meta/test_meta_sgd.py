"""Meta-SGD: the gradient of the rates, MAML where they stay, all learners at once as in loops, resumed runs."""

from __future__ import annotations

from dataclasses import asdict
from unittest import mock

import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.settings import hyper_tensors
from rlmeta.meta.meta_sgd import PREFIX
from rlmeta.nn import Encoder
from rlmeta.supervised import Regressor
from tests.meta.test_maml import PROBLEMS, SMALL, K, S, batch_of, doubled


def bound(name="regressor", seeds=range(S), double=True, **settings):
    """A learner on one of MAML's problems, its state with rates that differ from entry to entry, and its world."""
    inner, problem = PROBLEMS[name]
    made = rl.MetaSGD(**{"learner": inner, "num_envs": K, "inner_rate": 0.1, "inner_steps": 2, **settings})
    world = problem.world((len(seeds),), K)
    with mock.patch.object(Encoder.__init__, "__defaults__", (torch.float64 if double else torch.float32,)):
        learner = made.bind(world.observation_space, world.action_space)
    learner.capture = learner.inner.capture = learner.rates.capture = None
    state = learner.init(random.make_keys(seeds), hyper_tensors([made], len(seeds)), world)
    for rate, value in state["params"]["buffers"].items():
        factor = 0.5 + random.uniform(state["key"], f"test/{rate}", 0, tuple(value.shape[1:]))
        state["params"]["buffers"][rate] = value * factor
    if double:
        state["params"] = doubled(state["params"])
    return learner, state, world


def rates_of(state):
    return {name: value for name, value in state["params"]["buffers"].items() if name.startswith(PREFIX)}


def loss_of(learner, p, batch, rates):
    ctx, given = StepContext(training=True, report=False), {**batch, "params": p}
    return learner.rates.losses({"weights": rates}, given, ctx)["query"]


def gradient(learner, state, batch):
    """Of the rates."""
    leaves = {name: rate.clone().requires_grad_() for name, rate in rates_of(state).items()}
    loss = loss_of(learner, state["params"], batch, leaves)
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, found))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["regressor", "classifier"])
def test_the_gradient_of_the_rates_is_that_of_the_outer_loss(name, steps):
    learner, state, world = bound(name, inner_steps=steps)
    batch, rates = batch_of(learner, state, world), rates_of(state)
    _, found = gradient(learner, state, batch)
    assert len(rates) == len(state["params"]["weights"]) > 3
    for rate, value in rates.items():
        index, eps = (1,) + (0,) * (value.dim() - 1), 1e-6
        ends = []
        for sign in (1, -1):
            moved = value.clone()
            moved[index] += sign * eps
            ends.append(loss_of(learner, state["params"], batch, {**rates, rate: moved})[1].detach())
        slope = (float(ends[0]) - float(ends[1])) / (2 * eps)
        assert float(found[rate][index]) == pytest.approx(slope, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("first_order", [False, True])
def test_of_one_step_it_is_minus_the_product_of_the_two_gradients(first_order):
    """d L_query(θ - α ∘ g) / dα = - g ∘ ∇L_query, mean over tasks, whatever the order."""
    learner, state, world = bound(inner_steps=1, first_order=first_order)
    p, batch = state["params"], batch_of(learner, state, world)
    _, found = gradient(learner, state, batch)

    def slope(at, part):
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in at["weights"].items()}
        loss = learner.loss({**at, "weights": leaves}, batch[part])
        return dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values()))))

    start = learner.start(p, K)
    inner, outer = slope(start, "support"), slope(learner.adapted(start, batch["support"], 1, "none"), "query")
    for name, g in inner.items():
        torch.testing.assert_close(found[PREFIX + name], -(g * outer[name]).mean(1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["regressor", "reinforce"])
def test_learners_at_once_are_a_loop(name):
    learner, state, world = bound(name)
    batch = batch_of(learner, state, world)
    loss, together = gradient(learner, state, batch)
    for s in range(S):
        alone = tree.map(lambda x, s=s: x[s : s + 1], {"state": state, "batch": batch})
        own, single = gradient(learner, alone["state"], alone["batch"])
        torch.testing.assert_close(own[0], loss[s])
        for rate, value in single.items():
            torch.testing.assert_close(value[0], together[rate][s])


@pytest.mark.parametrize("name", ["regressor", "reinforce", "ppo"])
def test_steps_of_learners_at_once_are_those_of_each(name):
    learner, state, world = bound(name, double=False, rates_max_grad_norm=0.1)
    alone, single, one = bound(name, seeds=[1], double=False, rates_max_grad_norm=0.1)
    first = rates_of(state)
    for _ in range(3):
        state, _ = learner.iterate(state, world)
        single, metrics = alone.iterate(single, one)
    for rate, value in rates_of(single).items():
        torch.testing.assert_close(rates_of(state)[rate][1:2], value, rtol=2e-4, atol=1e-5)
        assert not torch.equal(rates_of(state)[rate], first[rate]) or (name == "ppo" and "value" in rate)
    mean = torch.cat([value.flatten() for value in rates_of(single).values()]).mean()
    torch.testing.assert_close(metrics["charts/inner_rate"][0], mean)


@pytest.mark.parametrize("first_order", [False, True])
def test_with_rates_that_stay_it_is_maml_bit_for_bit(first_order):
    settings = {"learner": SMALL, "num_envs": 5, "inner_rate": 0.03, "inner_steps": 2, "first_order": first_order}
    runs = [
        rl.train(made, "sinusoid", steps=400, seeds=2, threads=1)
        for made in (rl.MAML(**settings), rl.MetaSGD(**settings, rates_rate=0.0, max_grad_norm=float("inf")))
    ]
    maml, ours = (run.state for run in runs)
    for name, weight in maml["params"]["weights"].items():
        assert torch.equal(weight, ours["params"]["weights"][name]), name
        assert bool((ours["params"]["buffers"][PREFIX + name] == torch.tensor(0.03)).all())
    assert torch.equal(runs[0].scores, runs[1].scores)
    assert "gradient steps" in runs[1].agent.rates.capture.operations(), "the rates' steps are recorded, too"
    moments = tree.flatten(ours["rates"]["optimizer"])
    assert any(bool(value.any()) for name, value in moments.items() if name.endswith("square/weights"))


def test_the_rates_have_a_rate_and_a_clip_of_their_own():
    """Adam's first move is its rate in every entry; clipped to nothing, hardly any of it is left under its epsilon."""
    learner, state, world = bound(seeds=[4, 4, 4], double=False)
    state["params"]["hyper"]["rates_rate"] = torch.tensor([0.0, 1e-3, 1e-3])
    state["params"]["hyper"]["rates_max_grad_norm"] = torch.tensor([torch.inf, torch.inf, 1e-12])
    before, weights = rates_of(state), dict(state["params"]["weights"])
    state, _ = learner.iterate(state, world)
    for name, rate in rates_of(state).items():
        moved = (rate - before[name]).abs()
        assert not bool(moved[0].any())
        torch.testing.assert_close(moved[1], torch.full_like(moved[1], 1e-3), rtol=0.02, atol=0.0)
        assert float(moved[2].max()) < 1e-6
    for name, weight in state["params"]["weights"].items():
        assert not torch.equal(weight, weights[name])
        assert torch.equal(weight[0], weight[1]) and torch.equal(weight[0], weight[2])


def test_rates_and_weights_move_along_gradients_at_the_same_place():
    """Adam's first mean is a tenth of the gradient, here at the weights before they moved."""
    learner, state, world = bound(double=False, meta_rate=0.1)
    tasks = world.tasks(state["key"], state["count"]["iterations"], K, "train")
    _, expected = gradient(learner, state, tasks)
    state, _ = learner.iterate(state, world)
    mean = state["rates"]["optimizer"]["all"]["mean"]["weights"]
    flat = torch.cat([expected[name].flatten(1) for name in rates_of(state)], -1)
    torch.testing.assert_close(mean, 0.1 * flat, rtol=1e-3, atol=1e-6)


def test_a_learner_that_stopped_keeps_its_rates_and_their_moments():
    learner, state, world = bound(double=False)
    state, _ = learner.iterate(state, world)
    state["active"] = torch.tensor([True, False, True])
    kept = tree.map(torch.clone, {"rates": rates_of(state), "moments": state["rates"]["optimizer"]})
    state, _ = learner.iterate(state, world)
    now = {"rates": rates_of(state), "moments": state["rates"]["optimizer"]}
    for before, after in zip(tree.leaves(kept), tree.leaves(now), strict=True):
        assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


def test_a_run_that_was_stopped_and_resumed_is_the_one_that_was_not(tmp_path):
    settings = rl.MetaSGD(SMALL, num_envs=5, meta_rate_schedule="linear", rates_max_grad_norm=1.0)
    given = {"steps": 300, "seeds": 2, "threads": 1, "eval_every": 100}
    whole = rl.train(settings, "sinusoid", **given)

    def stop(run, line):
        return line["iteration"] >= 23

    rl.train(settings, "sinusoid", **given, out=tmp_path / "run", callbacks=[stop])
    again = rl.resume(tmp_path / "run")
    assert again.experiment.variants == (settings,)
    for name, value in tree.flatten(whole.state).items():
        assert torch.equal(value, tree.flatten(again.state)[name]), name
    assert torch.equal(whole.scores, again.scores)


def test_the_best_weights_come_with_the_rates_they_were_best_with():
    """Rates that grow too fast: the best evaluation is not the last one."""
    settings = rl.MetaSGD(SMALL, num_envs=4, inner_rate=0.05, rates_rate=0.1)
    run = rl.train(settings, "sinusoid", steps=400, eval_every=100)
    best, kept, now = (state["params"]["buffers"] for state in (run.best_state(), run.state["best"], run.state))
    for name in rates_of(run.state):
        assert torch.equal(best[name], kept[name]) and not torch.equal(best[name], now[name])


def test_it_learns_rates():
    settings = {"inner_rate": 0.02, "meta_rate": 5e-3}
    runs = [
        rl.train(made, rl.family("sinusoid"), steps=7_500, seeds=2)
        for made in (rl.MAML(**settings), rl.MetaSGD(**settings))
    ]
    starts = [run.agent.effective_params(run.state) for run in runs]
    errors = [run.agent.adaptation(p, run.world, run.state["key"], 100, 1) for run, p in zip(runs, starts)]
    maml, ours = (float(curve[..., 1].mean()) for curve in errors)
    assert ours < 0.8 * maml < 2.0


def test_settings_out_of_range_are_refused():
    for settings, message in (
        ({"rates_rate": -1.0}, "MetaSGD: rates_rate is -1, expected at least 0"),
        ({"rates_rate": float("inf")}, "MetaSGD: rates_rate is inf"),
        ({"rates_max_grad_norm": 0.0}, "MetaSGD: rates_max_grad_norm is 0, expected above 0"),
        ({"inner_steps": -1}, "inner_steps is -1"),
    ):
        with pytest.raises(SettingError, match=message):
            rl.MetaSGD(**settings)
    assert asdict(rl.MetaSGD()).keys() - asdict(rl.MAML()).keys() == {"rates_rate", "rates_max_grad_norm"}
    assert isinstance(rl.MetaSGD(Regressor()), rl.MAML)
