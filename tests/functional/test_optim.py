from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import optim, tree
from rlmeta.functional.optim import Optimizer

Settings = dict[str, Any]

# ours, settings that may be per learner, torch's, switches
CASES: dict[str, tuple[Callable[..., Optimizer], Settings, type[torch.optim.Optimizer], Settings]] = {
    "sgd": (optim.sgd, {"lr": 0.05}, torch.optim.SGD, {}),
    "sgd-decay": (optim.sgd, {"lr": 0.05, "weight_decay": 0.1}, torch.optim.SGD, {}),
    "sgd-momentum": (optim.sgd, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, {}),
    "sgd-nesterov": (
        optim.sgd,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        torch.optim.SGD,
        {"nesterov": True},
    ),
    "adagrad": (optim.adagrad, {"lr": 0.1}, torch.optim.Adagrad, {}),
    "adagrad-all": (
        optim.adagrad,
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "eps": 1e-3},
        torch.optim.Adagrad,
        {"initial_accumulator": 0.2},
    ),
    "rmsprop": (optim.rmsprop, {"lr": 0.02}, torch.optim.RMSprop, {}),
    "rmsprop-centered": (optim.rmsprop, {"lr": 0.02, "alpha": 0.9}, torch.optim.RMSprop, {"centered": True}),
    "rmsprop-momentum": (optim.rmsprop, {"lr": 0.02, "momentum": 0.8, "eps": 1e-3}, torch.optim.RMSprop, {}),
    "rmsprop-all": (
        optim.rmsprop,
        {"lr": 0.02, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1, "eps": 1e-3},
        torch.optim.RMSprop,
        {"centered": True},
    ),
    "adam": (optim.adam, {"lr": 0.05}, torch.optim.Adam, {}),
    "adam-all": (
        optim.adam,
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
        torch.optim.Adam,
        {"amsgrad": True},
    ),
    "adam-no-averages": (optim.adam, {"lr": 0.05, "b1": 0.0, "b2": 0.0}, torch.optim.Adam, {}),
    "adamw": (optim.adamw, {"lr": 0.05}, torch.optim.AdamW, {}),
    "adamw-all": (
        optim.adamw,
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3},
        torch.optim.AdamW,
        {"amsgrad": True},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def make(name: str, **changes: Any) -> Optimizer:
    """Optimizer of a case, with some settings replaced."""
    factory, settings, _, switches = CASES[name]
    return factory(**{**settings, **switches, **changes})


def make_torch(name: str, params: list[Tensor], **changes: float) -> torch.optim.Optimizer:
    _, settings, reference, switches = CASES[name]
    theirs = {**settings, **switches, **changes}
    if "b1" in theirs:
        theirs["betas"] = theirs.pop("b1"), theirs.pop("b2")
    if "initial_accumulator" in theirs:
        theirs["initial_accumulator_value"] = theirs.pop("initial_accumulator")
    return reference(params, foreach=False, **theirs)


def start(*learner_shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Initial parameters per learner: a matrix and a vector with 3 rows (as many as learners), and a scalar."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (3, 3), "bias": (3,), "scale": ()}
    return {name: torch.randn((*learner_shape, *s), generator=generator, dtype=dtype) for name, s in shapes.items()}


def loss_of(params: dict[str, Tensor], learner_axes: int = 0) -> Tensor:
    """Non-convex loss `[*L]`, different for each parameter, with gradients that change sign."""
    total: Tensor | float = 0.0
    for index, value in enumerate(params.values()):
        flat = value.reshape(*value.shape[:learner_axes], -1)
        total = total + (torch.sin(3 * flat + index) + 0.3 * (flat - 0.5) ** 2 + 0.1 * flat.roll(1, -1) * flat).sum(-1)
    assert isinstance(total, Tensor)
    return total


def grads_of(params: dict[str, Tensor], learner_axes: int = 0, create_graph: bool = False) -> dict[str, Tensor]:
    if not create_graph:
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(loss_of(params, learner_axes).sum(), list(params.values()), create_graph=create_graph)
    return dict(zip(params, grads))


def run(
    optimizer: Optimizer, params: dict[str, Tensor], steps: int, learner_shape: tuple[int, ...] = ()
) -> tuple[dict[str, Tensor], optim.State]:
    state = optimizer.init(params, learner_shape)
    for _ in range(steps):
        updates, state = optimizer.update(grads_of(params, len(learner_shape)), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def run_torch(name: str, params: dict[str, Tensor], steps: int, **changes: float) -> dict[str, Tensor]:
    params = {key: value.clone().requires_grad_() for key, value in params.items()}
    optimizer = make_torch(name, list(params.values()), **changes)
    for _ in range(steps):
        for value, grad in zip(params.values(), grads_of(params).values()):
            value.grad = grad
        optimizer.step()
    return {key: value.detach() for key, value in params.items()}


def assert_trees_close(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# ------------------------------------------------------------------------------------------------- equal to torch.optim


@every_case
def test_trajectory_equals_torch(name: str) -> None:
    params = start()
    for steps in (1, 2, 60):
        ours, state = run(make(name), params, steps)
        assert_trees_close(ours, run_torch(name, params, steps), rtol=1e-12, atol=1e-12)
        assert state["count"].item() == steps


@every_case
def test_learners_with_their_own_settings_equal_separate_torch_optimizers(name: str) -> None:
    """Three learners, three values of *every* setting, given as tensors `[S]`; S = rows of the parameters."""
    settings = CASES[name][1]
    values = {
        key: [value, value * 0.5, value * 0.8 if key in ("b1", "b2", "alpha", "momentum") else value * 2.0]
        for key, value in settings.items()
    }
    params = start(3)
    optimizer = make(name, **{key: torch.tensor(v, dtype=torch.float64) for key, v in values.items()})
    ours, state = run(optimizer, params, 25, (3,))
    for learner in range(3):
        alone = {key: value[learner] for key, value in params.items()}
        expected = run_torch(name, alone, 25, **{key: v[learner] for key, v in values.items()})
        assert_trees_close({key: value[learner] for key, value in ours.items()}, expected, rtol=1e-12, atol=1e-12)
    assert state["count"].tolist() == [25, 25, 25]


@every_case
def test_two_learner_axes_and_settings_of_the_first_only(name: str) -> None:
    """3 x 3 learners and every setting `[3]`: from the right it would broadcast too, along the wrong axis."""
    values = {key: [value, value * 0.5, value * 0.8] for key, value in CASES[name][1].items()}
    params = start(3, 3)
    optimizer = make(name, **{key: torch.tensor(v, dtype=torch.float64) for key, v in values.items()})
    ours, _ = run(optimizer, params, 6, (3, 3))
    for i in range(3):
        for j in range(3):
            alone = {key: value[i, j] for key, value in params.items()}
            expected, _ = run(make(name, **{key: v[i] for key, v in values.items()}), alone, 6)
            assert_trees_close({k: v[i, j] for k, v in ours.items()}, expected, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize(
    ("dtype", "settings_dtype", "tolerance"),
    [(torch.float32, torch.float64, 1e-5), (torch.float64, torch.float32, 1e-4), (torch.bfloat16, torch.float32, 2e-2)],
)
def test_settings_of_another_type(name: str, dtype: torch.dtype, settings_dtype: torch.dtype, tolerance: float) -> None:
    """Dtypes are preserved, and results equal those with Python numbers as settings."""
    values = {key: torch.full((3,), value, dtype=settings_dtype) for key, value in CASES[name][1].items()}
    params, state = run(make(name, **values), start(3, dtype=dtype), 3, (3,))
    leaves = {**tree.flatten(params), **tree.flatten(state)}
    assert {leaf.dtype for path, leaf in leaves.items() if path != "count"} == {dtype}
    assert state["count"].dtype == torch.int64
    close, _ = run(make(name), start(3, dtype=dtype), 3, (3,))
    assert_trees_close(params, close, rtol=tolerance, atol=tolerance)


def test_half_precision_averages_with_settings_per_learner() -> None:
    """The weight of a new gradient is 1 − 0.999; worked out in bfloat16, where 0.999 is 1, it would be 0."""
    keep = torch.full((3,), 0.999)
    params = {"w": torch.zeros(3, 2, dtype=torch.bfloat16)}
    grads = {"w": torch.ones(3, 2, dtype=torch.bfloat16)}
    for optimizer in (optim.adam(0.1, b1=keep, b2=keep), optim.rmsprop(0.1, alpha=keep, centered=True)):
        _, state = optimizer.update(grads, optimizer.init(params, (3,)), params)
        for buffer in ("mean", "square"):
            assert state[buffer]["w"].flatten().tolist() == pytest.approx([0.001] * 6, rel=1e-2)


@pytest.mark.parametrize("per_learner", [False, True])
def test_adams_bias_correction_keeps_its_digits_in_float32(per_learner: bool) -> None:
    """At the first step m̂ = g and v̂ = g², so the update is −lr sign(g); 1 − 0.9999f is off by 3e-4 of itself."""
    b2 = 0.9999
    setting = torch.full((2,), b2, dtype=torch.float64) if per_learner else b2
    params = {"w": torch.zeros(2, 3)}
    optimizer = optim.adam(1.0, b2=setting, eps=0.0)
    updates, _ = optimizer.update({"w": torch.full((2, 3), 0.7)}, optimizer.init(params, (2,)), params)
    torch.testing.assert_close(updates["w"], torch.full((2, 3), -1.0), rtol=5e-6, atol=0)


def test_adams_rate_is_worked_out_in_float32_for_half_precision() -> None:
    """With m = v = g = 1 the update is the rate itself, rounded once: 500 learners, each at a different step."""
    ones, count = torch.ones(500, 1, dtype=torch.bfloat16), torch.arange(500)
    optimizer = optim.adam(1.0, eps=0.0)
    state = {"count": count, "mean": {"w": ones}, "square": {"w": ones}}
    updates, _ = optimizer.update({"w": ones}, state, {"w": ones})
    step = (count + 1).double()
    expected = -(1 - 0.999**step).sqrt() / (1 - 0.9**step)
    assert updates["w"].dtype == torch.bfloat16
    assert (updates["w"][:, 0] == expected.to(torch.bfloat16)).double().mean() > 0.99


def test_centered_rmsprop_survives_a_variance_that_rounds_below_zero() -> None:
    params = {"w": torch.zeros(1_000)}
    grads = {"w": torch.rand(1_000, generator=torch.Generator().manual_seed(0)) + 0.5}
    optimizer = optim.rmsprop(0.1, alpha=0.5, centered=True)
    state = optimizer.init(params)
    for _ in range(60):  # constant gradients: the variance vanishes
        updates, state = optimizer.update(grads, state, params)
        assert updates["w"].isfinite().all()
    variance = state["square"]["w"] - state["mean"]["w"] ** 2
    assert (variance < 0).any(), "the case that is tested did not come up"


# ----------------------------------------------------------------------------------------------------- learners, purity


@every_case
def test_state_starts_with_the_learner_axes_and_keeps_its_shape(name: str) -> None:
    params = start(2, 3)
    optimizer = make(name)
    before = tree.flatten(optimizer.init(params, (2, 3)))
    after = tree.flatten(run(optimizer, params, 2, (2, 3))[1])
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        assert leaf.shape[:2] == (2, 3)
        assert leaf.shape == after[path].shape and leaf.dtype == after[path].dtype
    assert before["count"].dtype == torch.int64 and before["count"].shape == (2, 3)


@every_case
def test_inputs_are_not_modified_and_not_shared(name: str) -> None:
    params = start(3)
    optimizer = make(name)
    _, state = run(optimizer, params, 2, (3,))
    grads = grads_of(params, 1)
    inputs = {"params": params, "state": state, "grads": grads}
    copies = tree.map(torch.clone, inputs)
    versions = tree.map(lambda leaf: leaf._version, inputs)
    updates, new_state = optimizer.update(grads, state, params)
    new_params = optim.apply_updates(params, updates)
    for leaf in [*tree.leaves(updates), *tree.leaves(new_state), *tree.leaves(new_params)]:
        leaf.fill_(7)  # writing to what came out must not reach what went in
    assert_trees_close(inputs, copies, rtol=0, atol=0)
    assert tree.map(lambda leaf: leaf._version, inputs) == versions


@every_case
def test_learners_are_not_coupled(name: str) -> None:
    """NaN gradients of a learner leave the others bit-identical, and `torch.where` restores a learner."""
    params = start(3)
    optimizer = make(name)
    _, state = run(optimizer, params, 2, (3,))
    grads = grads_of(params, 1)
    broken = tree.map(lambda g: torch.where(torch.arange(3).reshape(3, *[1] * (g.dim() - 1)) == 1, math.nan, g), grads)
    results = optimizer.update(grads, state, params)
    others = torch.tensor([0, 2])
    for ours, nan in zip(results, optimizer.update(broken, state, params)):
        assert_trees_close(tree.map(lambda x: x[others], nan), tree.map(lambda x: x[others], ours), rtol=0, atol=0)
    alone = tree.map(lambda x: x[1:2], {"grads": grads, "state": state, "params": params})
    result_alone = optimizer.update(alone["grads"], alone["state"], alone["params"])
    for ours, single in zip(results, result_alone):
        assert_trees_close(tree.map(lambda x: x[1:2], ours), single, rtol=1e-15, atol=0)


@every_case
def test_vmap_equals_learner_axes(name: str) -> None:
    params = start(3)
    lr = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)

    def two_steps(params: dict[str, Tensor], lr: Tensor) -> dict[str, Tensor]:
        optimizer = make(name, lr=lr)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(torch.func.grad(loss_of)(params), state, params)
            params = optim.apply_updates(params, updates)
        return params

    ours, _ = run(make(name, lr=lr), params, 2, (3,))
    assert_trees_close(torch.func.vmap(two_steps)(params, lr), ours, rtol=1e-12, atol=1e-12)


def test_a_schedule_makes_a_new_optimizer_every_step() -> None:
    params = start()
    theirs = {key: value.clone().requires_grad_() for key, value in params.items()}
    reference = torch.optim.Adam(list(theirs.values()), lr=1.0, foreach=False)
    state = optim.adam().init(params)
    for lr in (0.1, 0.05, 0.0, 0.02):
        updates, state = optim.adam(lr).update(grads_of(params), state, params)
        params = optim.apply_updates(params, updates)
        reference.param_groups[0]["lr"] = lr
        for value, grad in zip(theirs.values(), grads_of(theirs).values()):
            value.grad = grad
        reference.step()
        assert_trees_close(params, {k: v.detach() for k, v in theirs.items()}, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- differentiable

DIFFERENTIATED = {  # every setting that is differentiated through, besides the parameters
    "sgd-nesterov": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "adagrad-all": {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "eps": 1e-3},
    "rmsprop-all": {"lr": 0.02, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1, "eps": 1e-3},
    "adam-all": {"lr": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
    "adamw-all": {"lr": 0.05, "b1": 0.3, "b2": 0.45, "eps": 1e-3, "weight_decay": 0.3},
}


def unrolled(name: str, steps: int, names: list[str]) -> Callable[..., Tensor]:
    """Parameters of two learners after `steps` steps, as a function of the initial ones and of settings `[2]`."""

    def function(weight: Tensor, *settings: Tensor) -> Tensor:
        optimizer = make(name, **dict(zip(names, settings)))
        params = {"weight": weight}
        state = optimizer.init(params, (2,))
        for _ in range(steps):
            updates, state = optimizer.update(grads_of(params, 1, create_graph=True), state, params)
            params = optim.apply_updates(params, updates)
        return params["weight"]

    return function


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_through_three_steps_are_those_of_finite_differences(name: str) -> None:
    names = list(DIFFERENTIATED[name])
    settings = [
        torch.tensor([v, v * 0.9], dtype=torch.float64, requires_grad=True) for v in DIFFERENTIATED[name].values()
    ]
    weight = start(2)["weight"][:, 0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(unrolled(name, 3, names), (weight, *settings))
    assert torch.autograd.gradgradcheck(unrolled(name, 2, names), (weight, *settings))


@every_case
def test_gradients_through_steps_with_numbers_as_settings(name: str) -> None:
    weight = start(2)["weight"][:, 0, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(unrolled(name, 3, []), (weight,))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_and_second_derivatives_are_finite_at_zero_gradient(name: str, dtype: torch.dtype) -> None:
    """A parameter that the loss ignores for two steps, and one that starts at a stationary point."""
    params = {"dead": torch.zeros(2, 2, dtype=dtype), "alive": torch.ones(2, dtype=dtype)}
    params = {key: value.requires_grad_() for key, value in params.items()}
    lr = torch.tensor([0.1, 0.2], dtype=dtype, requires_grad=True)
    overflows = dtype == torch.float32 and not name.startswith("sgd")  # the true derivative, (lr / eps)^4
    optimizer = make(name, lr=lr, **({"eps": 1e-3} if overflows else {}))
    state, current = optimizer.init(params, (2,)), params
    for _ in range(2):
        loss = (current["dead"] ** 2).sum() + (current["alive"] ** 3).sum()
        grads = dict(zip(current, torch.autograd.grad(loss, list(current.values()), create_graph=True)))
        updates, state = optimizer.update(grads, state, current)
        current = optim.apply_updates(current, updates)
    outer = sum((value.sin() + value**2).sum() for value in current.values())
    inputs = [*params.values(), lr]
    first = torch.autograd.grad(outer, inputs, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() + g.sum() for g in first), inputs)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert (first[1] != 0).all() and (first[2] != 0).all()


def test_derivative_of_adams_first_step_at_zero_gradient_is_the_true_one() -> None:
    """Δ = −lr g / (|g| + eps), so dΔ/dg = −lr / eps at g = 0."""
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    grad = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = optim.adam(0.1, eps=1e-3)
    updates, _ = optimizer.update({"w": grad}, optimizer.init(params), params)
    (slope,) = torch.autograd.grad(updates["w"].sum(), grad)
    torch.testing.assert_close(slope, torch.full((3,), -100.0, dtype=torch.float64))


@every_case
def test_values_are_the_same_with_and_without_a_graph(name: str) -> None:
    """The guarded square root takes another path while a graph is recorded, NaN and zero gradients included."""
    params = start(3)
    params["bias"][0, 0] = 0.0
    grads = {**grads_of(params, 1), "bias": torch.zeros(3, 3, dtype=torch.float64)}
    grads["weight"][0, 0, 0] = math.nan
    optimizer = make(name)
    plain = optimizer.update(grads, optimizer.init(params, (3,)), params)
    recorded = optimizer.update(
        {key: value.clone().requires_grad_() for key, value in grads.items()}, optimizer.init(params, (3,)), params
    )
    for ours, expected in zip(recorded, plain):
        for name_, leaf in tree.flatten(ours).items():
            torch.testing.assert_close(leaf.detach(), tree.flatten(expected)[name_], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adagrad", "rmsprop-all", "adam-all", "adamw"])
def test_forward_mode_equals_reverse_mode(name: str) -> None:
    weight = start(2)["weight"][:, 0, :2].clone()
    optimizer = make(name)

    def two_steps(weight: Tensor) -> Tensor:
        params = {"w": weight, "dead": torch.zeros_like(weight) * weight}
        state = optimizer.init(params, (2,))
        for _ in range(2):
            grads = {"w": (3 * params["w"]).cos(), "dead": params["dead"] * 2}
            updates, state = optimizer.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return params["w"] + params["dead"]

    forward, backward = torch.func.jacfwd(two_steps)(weight), torch.func.jacrev(two_steps)(weight)
    assert forward.isfinite().all()
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)


def test_meta_gradient_of_sgd_on_a_quadratic_is_the_closed_form() -> None:
    """w_k − a = (I − lr H)^k (w_0 − a), so the gradient of ½|w_k|² is (I − lr H)^k w_k."""
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    initial = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    optimizer = optim.sgd(0.1)
    params, state = {"w": initial}, optimizer.init({"w": initial})
    for _ in range(5):
        updates, state = optimizer.update({"w": hessian @ (params["w"] - target)}, state, params)
        params = optim.apply_updates(params, updates)
    (meta,) = torch.autograd.grad(0.5 * (params["w"] ** 2).sum(), initial)
    power = torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - 0.1 * hessian, 5)
    expected = target + power @ (initial.detach() - target)
    torch.testing.assert_close(params["w"].detach(), expected)
    torch.testing.assert_close(meta, power @ expected)


# ------------------------------------------------------------------------------------------------------ clipping, chain


@pytest.mark.parametrize("per_learner", [False, True])
def test_clip_equals_torch_per_learner(per_learner: bool) -> None:
    grads = start(3, 3)
    bounds = torch.tensor([0.5, 3.0, math.inf], dtype=torch.float64) if per_learner else torch.full((3,), 3.5)
    clipped, norm = optim.clip_by_norm(grads, bounds if per_learner else 3.5, 2)
    assert norm.shape == (3, 3)
    changed = 0
    for i in range(3):
        for j in range(3):
            params = [torch.zeros_like(g[i, j]).requires_grad_() for g in grads.values()]
            for param, g in zip(params, grads.values()):
                param.grad = g[i, j].clone()
            expected_norm = torch.nn.utils.clip_grad_norm_(params, bounds[i].item())
            torch.testing.assert_close(norm[i, j], expected_norm, rtol=1e-13, atol=0)
            for param, g in zip(params, clipped.values()):
                torch.testing.assert_close(g[i, j], param.grad, rtol=1e-13, atol=0)
            changed += bool(expected_norm > bounds[i])
    assert 0 < changed < 9, "both sides of the bound should come up"


def test_clip_without_learner_axes_and_with_only_learner_axes() -> None:
    scalar = {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}
    clipped, norm = optim.clip_by_norm(scalar, 1.0, 0)
    assert norm.item() == 5.0 and clipped["a"].item() == pytest.approx(0.6, rel=1e-6)
    clipped, norm = optim.clip_by_norm({"log_alpha": torch.tensor([3.0, -0.5])}, 1.0, 1)
    assert norm.tolist() == [3.0, 0.5]
    assert clipped["log_alpha"].tolist() == pytest.approx([1.0, -0.5], rel=1e-6)


def test_clip_keeps_one_learners_nan_and_infinity_to_itself() -> None:
    grads = {"w": torch.ones(3, 4), "b": torch.ones(3, 1)}
    expected, _ = optim.clip_by_norm(grads, 0.5, 1)
    grads["w"][1, 2], grads["b"][2, 0] = math.nan, math.inf
    for recorded in (False, True):
        clipped, norm = optim.clip_by_norm(
            {key: value.clone().requires_grad_(recorded) for key, value in grads.items()}, 0.5, 1
        )
        assert norm.isfinite().tolist() == [True, False, False]
        assert torch.equal(clipped["w"][0], expected["w"][0]) and torch.equal(clipped["b"][0], expected["b"][0])
        assert clipped["w"][1].isnan().all() and clipped["b"][1].isnan().all()


def test_clip_is_twice_differentiable_also_at_zero() -> None:
    def function(w: Tensor, b: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
        clipped, norm = optim.clip_by_norm({"w": w, "b": b}, bound, 1)
        return (*clipped.values(), norm)

    w, b = start(2)["weight"][:, 0].clone().requires_grad_(), start(2)["scale"].clone().requires_grad_()
    bound = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (w, b, bound))
    assert torch.autograd.gradgradcheck(function, (w, b, bound))
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    clipped, norm = optim.clip_by_norm({"w": zero}, 0.5, 1)
    (first,) = torch.autograd.grad((clipped["w"] + clipped["w"] ** 2).sum() + norm.sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + (first**2).sum(), zero)
    assert torch.equal(first, torch.ones_like(first)) and second.isfinite().all()


def test_chain_of_clip_and_adam_equals_torch() -> None:
    optimizer = optim.chain(optim.clip(0.5), optim.adam(0.05))
    params = start(3)
    ours, state = run(optimizer, params, 20, (3,))
    assert all(leaf.shape[0] == 3 for leaf in tree.leaves(state))
    assert state["0"]["count"].tolist() == state["1"]["count"].tolist() == [20, 20, 20]
    for learner in range(3):
        theirs = {key: value[learner].clone().requires_grad_() for key, value in params.items()}
        reference = torch.optim.Adam(list(theirs.values()), lr=0.05, foreach=False)
        for _ in range(20):
            for value, grad in zip(theirs.values(), grads_of(theirs).values()):
                value.grad = grad
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
            reference.step()
        expected = {key: value.detach() for key, value in theirs.items()}
        assert_trees_close({key: value[learner] for key, value in ours.items()}, expected, rtol=1e-11, atol=1e-11)


def test_states_survive_being_flattened() -> None:
    """Checkpoints drop empty dictionaries, so no optimizer state may have one."""
    for optimizer in (*(make(name) for name in CASES), optim.chain(optim.clip(1.0), optim.sgd(0.1))):
        params = start(3)
        state = optimizer.init(params, (3,))
        expected, _ = optimizer.update(grads_of(params, 1), state, params)
        updates, _ = optimizer.update(grads_of(params, 1), tree.unflatten(tree.flatten(state)), params)
        assert all(torch.equal(updates[name], expected[name]) for name in expected)


def test_apply_updates_leaves_parameters_without_an_update_alone() -> None:
    params = {"w": torch.ones(2), "running_mean": torch.ones(2)}
    new = optim.apply_updates(params, {"w": torch.full((2,), 0.5)})
    assert new["w"].tolist() == [1.5, 1.5] and new["running_mean"] is params["running_mean"]
    assert list(new) == ["w", "running_mean"]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optim.sgd(-0.1), "lr is -0.1"),
        (lambda: optim.sgd(math.nan), "lr is nan"),
        (lambda: optim.sgd(0.1, momentum=1.0), "momentum is 1.0"),
        (lambda: optim.sgd(0.1, weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: optim.sgd(0.1, nesterov=True), "nesterov=True needs a positive momentum"),
        (lambda: optim.adam(b1=1.0), "b1 is 1.0"),
        (lambda: optim.adamw(b2=-0.1), "b2 is -0.1"),
        (lambda: optim.adam(eps=-1e-8), "eps is -1e-08"),
        (lambda: optim.rmsprop(alpha=1.5), "alpha is 1.5"),
        (lambda: optim.adagrad(initial_accumulator=-1.0), "initial_accumulator is -1.0"),
        (lambda: optim.clip_by_norm(start(), 0.0, 0), "max_norm is 0.0"),
        (lambda: optim.clip_by_norm({}, 1.0, 0), "no gradients"),
        (lambda: optim.clip_by_norm({"a": torch.ones(3, 2), "b": torch.ones(1, 2)}, 1.0, 1), "'b' has shape"),
        (lambda: optim.clip_by_norm({"a": torch.ones(3)}, 1.0, 2), "'a' has shape"),
        (lambda: optim.adam().init({}), "at least one parameter"),
        (lambda: optim.adam().init(start(3), (2,)), r"'weight' has shape \(3, 3, 3\), expected learner axes \(2,\)"),
        (lambda: optim.apply_updates(start(), {"wieght": torch.zeros(3, 3)}), "no parameter 'wieght'"),
        (lambda: optim.apply_updates(start(), {"weight": torch.zeros(3)}), "'weight' has shape"),
    ],
)
def test_mistakes_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()


@every_case
def test_gradients_that_do_not_fit_are_refused(name: str) -> None:
    params = start(3)
    optimizer = make(name)
    state, grads = optimizer.init(params, (3,)), grads_of(params, 1)
    with pytest.raises(SettingError, match="'bias' has shape"):
        optimizer.update({**grads, "bias": grads["bias"][0]}, state, params)
    with pytest.raises(SettingError, match="the state has"):
        optimizer.update(grads, {**state, "foreign": {}}, params)
    if state.keys() != {"count"}:
        with pytest.raises(SettingError, match="as given to init"):
            optimizer.update({"bias": grads["bias"]}, state, params)


def test_a_setting_of_other_learners_is_refused() -> None:
    params = start(3)
    for optimizer in (make(name, lr=torch.full((2,), 0.1)) for name in CASES):
        with pytest.raises(ValueError, match="not a prefix"):
            optimizer.update(grads_of(params, 1), optimizer.init(params, (3,)), params)
