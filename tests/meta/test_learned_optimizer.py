"""The learned optimizer as an optimizer."""

from __future__ import annotations

import math

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.minimisation import DigitMLPs, Quadratics
from rlmeta.errors import SettingError
from rlmeta.functional import optim, random, tree
from rlmeta.functional.optim import apply_updates
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.settings import hyper_tensors
from rlmeta.meta.adapt import adapt, expand_tasks
from rlmeta.meta.learned_optimizer import (
    CoordinateLSTM,
    LearnedOptimizer,
    TorchLearnedOptimizer,
    learned_optimizer,
    log_and_sign,
    minimise,
)
from rlmeta.nn import stack

NET = CoordinateLSTM((5, 4))


def theta(seeds=3, net=NET):
    made = stack(lambda: CoordinateLSTM(net.hidden_sizes), random.make_keys(range(seeds)))
    return {name: value.double() for name, value in made.items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_log_and_sign_has_two_branches_that_meet():
    edge = math.exp(-10.0)
    g = torch.tensor([0.0, edge, -edge, edge * (1 - 1e-12), 1.0, -5.0, 1e-8, -1.5 * edge], dtype=torch.float64)
    expected = [
        (-1, 0), (-1, 1), (-1, -1), (-1, 1), (0, 1), (math.log(5) / 10, -1), (-1, 1e-8 * math.exp(10)),
        (math.log(1.5) / 10 - 1, -1),
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
        index, eps = (1,) + (0,) * (value.dim() - 1), 1e-5
        ends = []
        for sign in (1, -1):
            moved = value.clone()
            moved[index] += sign * eps
            ends.append(unroll({**meta, name: moved}).item())
        assert grads[name][index].item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-5, abs=1e-7)


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


# ---------------------------------------------------------------------- its meta-training


def bound(seeds=(0, 1, 2), problems=None, **settings):
    problem = NamedFamily("problems", problems or Quadratics(3))
    made = LearnedOptimizer(**{"num_envs": 6, "horizon": 8, "unroll": 2, "hidden_sizes": (4,), **settings})
    world = problem.world((len(seeds),), made.num_envs)
    learner = made.bind(world.observation_space, world.action_space)
    return learner, learner.init(random.make_keys(seeds), hyper_tensors([made], len(seeds)), world), world


class Parabola(Quadratics):
    """f(x) = x², from 1."""

    def tasks(self, key, counter, count, split):
        one = torch.ones(*key.shape, count, 1)
        return {"matrix": one.unsqueeze(-1), "target": torch.zeros_like(one), "start": one}


def test_one_variable_is_minimised_as_deepminds_convergence_test_asks():
    """Below 1e-5 within 500 epochs of 5 unrolls of 20 steps, by a linear map that begins at zero."""
    settings = {"num_envs": 1, "horizon": 100, "unroll": 20, "hidden_sizes": (), "zero_output": True, "preprocess": 0.0}
    learner, state, world = bound((0,), Parabola(1), meta_rate=1e-2, output_scale=1.0, **settings)
    losses = []
    for _ in range(10):
        for _ in range(50 * 5):
            state, _ = learner.iterate(state, world)
        losses.append(float(learner.evaluate(state["params"], world, state["key"], 1).returns))
        if losses[-1] < 1e-5:
            break
    assert losses[-1] < 1e-5, losses


def test_problems_are_spread_over_the_horizon_and_replaced_at_its_end():
    learner, state, world = bound()
    ages, problems = [], []
    for _ in range(9):
        state, _ = learner.iterate(state, world)
        carry = state["params"]["buffers"]["carry"]
        ages.append(carry["age"][0].tolist())
        problems.append(carry["problem"]["target"][0, :, 0].tolist())
    assert ages[0] == [2, 4, 6, 8, 2, 4] and ages[1] == [4, 6, 8, 2, 4, 6]
    assert all(0 < age <= 8 for row in ages for age in row)
    for before, after, age in zip(problems, problems[1:], ages[1:]):
        assert [x != y for x, y in zip(before, after)] == [a == 2 for a in age]


@pytest.mark.parametrize("estimator", ["es", "pes"])
def test_perturbed_pairs_share_problem_and_age(estimator):
    learner, state, world = bound(estimator=estimator, num_envs=4)
    for i in range(6):
        state, metrics = learner.iterate(state, world)
        carry = state["params"]["buffers"]["carry"]
        assert torch.equal(carry["problem"]["matrix"][:, :2], carry["problem"]["matrix"][:, 2:])
        assert torch.equal(carry["age"][:, :2], carry["age"][:, 2:])
        assert not torch.equal(carry["weights"]["x"][:, :2], carry["weights"]["x"][:, 2:])
        if estimator == "pes":
            sizes = state["accumulator"].square().mean(-1).sqrt() / 0.01 / (carry["age"] / 2.0).clamp(max=i + 1).sqrt()
            torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0.25, atol=0)
    assert torch.isfinite(metrics["losses/unroll"]).all()
    assert ("accumulator" in state) == (estimator == "pes")


def test_the_estimate_goes_through_the_one_step_as_a_gradient():
    learner, state, _ = bound(estimator="pes", num_envs=4)
    p, ctx = state["params"], StepContext(training=True)
    given = torch.randn(3, sum(w[0].numel() for w in p["weights"].values()))
    leaves = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
    loss = learner.losses({**p, "weights": leaves}, {"gradient": given}, ctx)["unroll"]
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    torch.testing.assert_close(torch.cat([g.flatten(1) for g in found], 1), given)


@pytest.mark.parametrize("estimator", ["truncated", "pes"])
def test_a_meta_learners_numbers_are_its_own(estimator):
    together, alone = bound(estimator=estimator), bound((1,), estimator=estimator)
    states = []
    for learner, state, world in (together, alone):
        for _ in range(6):
            state, _ = learner.iterate(state, world)
        states.append(state["params"])
    for a, b in zip(tree.leaves(states[0]), tree.leaves(states[1])):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["truncated", "pes"])
def test_stopped_and_resumed_is_never_stopped(estimator, tmp_path):
    settings = LearnedOptimizer(num_envs=4, horizon=8, unroll=2, hidden_sizes=(4,), estimator=estimator)
    whole = rl.train(settings, "quadratics", steps=320, seeds=2, threads=1)

    def stop(run, line):
        return line["iteration"] >= 23

    rl.train(settings, "quadratics", steps=320, seeds=2, threads=1, out=tmp_path / "run", callbacks=[stop])
    again = rl.resume(tmp_path / "run")
    for name, value in tree.flatten(whole.state).items():
        assert torch.equal(value, tree.flatten(again.state)[name]), name


def test_what_was_learned_optimizes_a_module():
    learner, state, _ = bound()
    module = torch.nn.Linear(3, 2)
    optimizer = learner.as_torch(state["params"], module.parameters(), learner=1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = module.weight.detach().clone()
    module(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    learned = learner.learned({"weights": {n: w[1] for n, w in state["params"]["weights"].items()}})
    updates, _ = learned.update({"w": module.weight.grad}, learned.init({"w": before}), {"w": before})
    torch.testing.assert_close(module.weight.detach(), before + updates["w"])


def test_any_optimizer_minimises_problems():
    family, keys = Quadratics(4), random.make_keys([0, 1])
    problem = family.tasks(keys, 0, 3, "test")
    rates = torch.tensor([0.01, 0.001])
    found = minimise(family, problem, optim.sgd(rates), 5)
    assert found.shape == (2, 3, 6) and (found[..., -1] < found[..., 0]).all()
    alone = minimise(family, tree.map(lambda x: x[1:], problem), optim.sgd(0.001), 5)
    torch.testing.assert_close(found[1:], alone, rtol=1e-5, atol=1e-5)  # of numbers in float32


def test_many_problems_are_minimised_in_parts():
    learner, state, world = bound(problems=Quadratics(2))
    found = learner.adaptation(state["params"], world, state["key"], 150, 3)
    problem = world.tasks(state["key"], 0, 150, "test")
    whole = minimise(world.family, problem, learner.learned(state["params"]), 3)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)  # of numbers in float32
    assert found.shape == (3, 150, 4)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(SettingError, match="unroll 30 does not divide horizon 100"):
        LearnedOptimizer(unroll=30)
    for strange in ((0,), 20, (20.0,)):
        with pytest.raises(SettingError, match=r"hidden_sizes is .*, expected (widths|a tuple of whole)"):
            LearnedOptimizer(hidden_sizes=strange)
    with pytest.raises(SettingError, match="perturbs problems in pairs"):
        LearnedOptimizer(estimator="pes", num_envs=5)


# ---------------------------------------------------------------------- as a torch.optim.Optimizer


def fitted(module, optimizer, steps=3):
    """The module's weights after some steps, as float64."""
    dtype = next(module.parameters()).dtype
    for i in range(steps):
        optimizer.zero_grad()
        module(normal(5, 3, seed=i).to(dtype)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_another_type_than_the_learned_weights_are_optimized(dtype):
    learner, state, _ = bound()
    torch.manual_seed(0)
    module, found = torch.nn.Linear(3, 2).to(dtype), []
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    for kind in (dtype, torch.float32):
        module = torch.nn.Linear(3, 2).to(kind)
        module.load_state_dict(start)
        optimizer = learner.as_torch(state["params"], module.parameters())
        found.append(fitted(module, optimizer))
        saved = optimizer.state_dict()
        optimizer = learner.as_torch(state["params"], module.parameters())
        optimizer.load_state_dict(saved)  # torch turns the state into the parameters' type
        found.append(fitted(module, optimizer))
    assert not torch.equal(found[0], found[1])
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found[:2], found[2:], rtol=tolerance, atol=tolerance)


def test_the_learning_rate_is_the_factor_of_the_updates():
    learner, state, _ = bound(output_scale=0.5)
    module = torch.nn.Linear(3, 2)
    optimizer = learner.as_torch(state["params"], [{"params": [module.weight]}, {"params": [module.bias], "lr": 0.0}])
    before = [p.detach().clone() for p in module.parameters()]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.0]
    fitted(module, optimizer, 1)
    moved = module.weight.detach() - before[0]
    assert torch.equal(module.bias, before[1]) and moved.abs().min() > 0
    with torch.no_grad():
        module.weight.copy_(before[0])
    optimizer = learner.as_torch(state["params"], module.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 if epoch == 0 else 0.0)
    fitted(module, optimizer, 1)
    torch.testing.assert_close(module.weight.detach() - before[0], 0.5 * moved)
    scheduler.step()
    at = module.weight.detach().clone()
    fitted(module, optimizer, 1)
    assert torch.equal(module.weight, at)


def test_what_it_cannot_optimize_is_refused():
    learner, state, _ = bound()
    for wrong in (3, -1):
        with pytest.raises(SettingError, match=f"learner is {wrong}, expected 0 to 2"):
            learner.as_torch(state["params"], torch.nn.Linear(3, 2).parameters(), learner=wrong)
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = learner.as_torch(state["params"], table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(SettingError, match="no sparse gradients"):
        optimizer.step()


def test_it_is_read_back_from_a_run_and_optimizes_as_before(tmp_path):
    settings = LearnedOptimizer(num_envs=4, horizon=8, unroll=2, hidden_sizes=(4,))
    run = rl.train(settings, "quadratics", steps=80, seeds=2, out=tmp_path / "run")
    again, found = rl.load(tmp_path / "run"), []
    for one in (run, again):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        found.append(
            fitted(module, one.agent.as_torch(one.agent.effective_params(one.state), module.parameters(), learner=1))
        )
    assert torch.equal(*found)


@pytest.mark.parametrize(("schedule", "left"), [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.5, 0.0])])
def test_the_meta_rate_follows_its_schedule(schedule, left):
    """Adam's first move is its rate: of equal learners at 0, half and all of their budget."""
    learner, state, world = bound((4, 4, 4), meta_rate_schedule=schedule, meta_rate=0.01)
    state["progress"] = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    before = {n: w.clone() for n, w in state["params"]["weights"].items()}
    state, _ = learner.iterate(state, world)
    name = "optimizer.output.bias"
    moved = (state["params"]["weights"][name] - before[name]).flatten(1)
    expected = 0.01 * torch.tensor(left).unsqueeze(-1) * moved[0].sign()
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-3, atol=1e-7)


def test_what_an_iteration_counts():
    learner, state, world = bound()
    for _ in range(2):
        state, _ = learner.iterate(state, world)
    counted = {n: c.tolist() for n, c in state["count"].items()}
    assert counted["iterations"] == counted["gradient_steps"] == [2] * 3
    assert counted["vector_steps"] == counted["task_steps"] == [4] * 3 and counted["env_steps"] == [2 * 2 * 6] * 3


def test_the_meta_gradient_is_clipped_by_its_norm():
    learner, state, world = bound(max_grad_norm=1e-12)
    before = {n: w.clone() for n, w in state["params"]["weights"].items()}
    state, metrics = learner.iterate(state, world)
    moved = max(float((w - before[n]).abs().max()) for n, w in state["params"]["weights"].items())
    assert moved < 1e-4 and (metrics["losses/grad_norm"] > 1e-6).all()  # below Adam's epsilon


@pytest.mark.parametrize("problems", [Quadratics(3), DigitMLPs(hidden=3, batch_size=8)])
def test_the_loss_of_a_piece_is_the_mean_after_each_of_its_steps(problems):
    """Minibatches are those of each problem's own age."""
    learner, state, world = bound(problems=problems, unroll=2)
    carry = state["params"]["buffers"]["carry"]
    loss, after = learner.unroll(state["params"]["weights"], carry)
    problem, w, memory = carry["problem"], carry["weights"], carry["memory"]
    optimizer, losses = learner.learned(state["params"]), []
    for i in range(2):
        leaves = {n: v.clone().requires_grad_() for n, v in w.items()}
        value = world.family.loss(leaves, problem, carry["age"] + i)
        g = dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values()))))
        updates, memory = optimizer.update(g, memory, w)
        w = apply_updates(w, updates)
        losses.append(world.family.loss(w, problem, carry["age"] + i + 1))
    torch.testing.assert_close(loss, torch.stack(losses).mean(0))
    for name, value in w.items():
        torch.testing.assert_close(after["weights"][name], value)
    assert torch.equal(after["age"], carry["age"] + 2)


def test_evaluation_is_the_loss_at_the_horizon_of_held_out_problems():
    learner, state, world = bound()
    found = learner.evaluate(state["params"], world, state["key"], 5)
    curve = learner.adaptation(state["params"], world, state["key"], 5, 8, split="test")
    assert torch.equal(found.returns, curve[..., 8]) and (found.lengths == 8).all()
    assert not torch.equal(curve, learner.adaptation(state["params"], world, state["key"], 5, 8, split="train"))


def test_draws_are_fresh_problems_and_leave_no_trace():
    learner, state, world = bound()
    before = tree.map(torch.clone, {n: v for n, v in state.items() if n != "methods"})
    drawn = learner.draw(state, world, 6)
    assert drawn["target"].shape[:2] == (3, 6)
    assert not torch.isin(drawn["target"], state["params"]["buffers"]["carry"]["problem"]["target"]).any()
    for a, b in zip(tree.leaves(before), tree.leaves({n: v for n, v in state.items() if n != "methods"})):
        assert torch.equal(a, b)


def test_its_state_counts_its_steps():
    optimizer, weights = learned_optimizer(NET, theta(1)), {"w": normal(1, 2)}
    state = optimizer.init(weights, (1,))
    for _ in range(3):
        _, state = optimizer.update(weights, state, weights)
    assert state["count"].tolist() == [3]
