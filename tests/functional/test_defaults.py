"""Results depend neither on torch's default device and dtype, nor on gradient and inference modes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta.functional
from rlmeta.functional import (
    axes,
    distributional,
    normalise,
    optim,
    packed,
    projection,
    quadratics,
    random,
    schedules,
    statistics,
    sum_tree,
    tabular,
    tree,
    trust_region,
)
from rlmeta.functional.normalise import reward_init, running_init, running_update
from rlmeta.nn import fisher, sample_gradients

SINGLE, DOUBLE = torch.float32, torch.float64
KEYS = random.make_keys(range(3), "cpu")


def numbers(name: str, *shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return random.normal(random.make_keys([0], "cpu")[0], name, 0, shape, dtype)


SQUARE = {name: numbers(name, 3, 3, 3) for name in ("reward", "discount", "value", "next_value", "x", "loss")}
FLAGS = numbers("flags", 3, 3, 3) > 0
P = numbers("P", 3, 2, 3, dtype=DOUBLE).softmax(-1)
POLICY = numbers("policy", 3, 2, dtype=DOUBLE).softmax(-1)
SEEN = running_update(running_init((3,), (3,), "cpu"), SQUARE["x"])
PAID = running_init((3,), (), "cpu") | {"var": torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE, device="cpu")}
PARAMS, GRADS = {"w": SQUARE["x"]}, {"w": SQUARE["value"]}
RATES = torch.tensor([0.1, 0.2, 0.3], device="cpu")
DECAYS = torch.tensor([0.0, 0.5, 0.9], device="cpu")
CHOSEN = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0]], device="cpu")

BY_NAME: dict[str, Any] = {
    **SQUARE,
    **dict.fromkeys(
        ("log_prob", "prediction", "advantage", "entropy", "logits", "logits_p", "mean", "mean_p"), SQUARE["x"]
    ),
    **dict.fromkeys(("old_log_prob", "target", "logits_q", "log_std", "log_std_p", "pre_tanh"), SQUARE["value"]),
    **dict.fromkeys(("old_value", "kl", "mean_q", "next_q", "next_q_online", "log_std_q"), SQUARE["next_value"]),
    **dict.fromkeys(("cut", "terminated", "valid", "mask"), FLAGS),
    **dict.fromkeys(
        ("gamma", "lambda_", "clip", "coefficient", "sigma", "setting"), torch.tensor([0.5, 0.6, 0.7], device="cpu")
    ),
    "action": SQUARE["discount"].tanh(),
    "bootstrap": SQUARE["reward"][:, 0],
    "key": KEYS,
    "counter": 2,
    "count": 4,
    "size": 3,
    "sizes": (1, 2),
    "stream": "stream",
    "shape": (3, 2),
    "data": torch.arange(3, device="cpu"),
    "high": 5,
    "n": 3,
    "seeds": [0, 1, 2],
    "learner_shape": (3,),
    "num_envs": 3,
    "noise": numbers("noise", 3, 3, 3, 5),
    "gradient": numbers("gradient", 3, 4),
    "reference": numbers("reference", 3, 4),
    "references": numbers("references", 3, 3, 4),
    "margin": 0.5,
    "scores": np.arange(12.0).reshape(4, 3),
    "baseline": np.arange(9.0).reshape(3, 3),
    "thresholds": [1.0, 5.0],
    "tensor": FLAGS.to(torch.uint8),
    "q": {"precision": SQUARE["x"].square(), "centre": SQUARE["value"], "constant": SQUARE["reward"][..., 0]},
    "fisher": SQUARE["reward"].square(),
    "theta": SQUARE["next_value"],
    "decay": torch.tensor([0.5, 0.6, 0.7], device="cpu"),
    "free": FLAGS[..., 0],
    "number": torch.arange(1, 4, device="cpu"),
    "drawn": torch.tensor([0, 1, 0], device="cpu"),
    "room": 2,
    "place": torch.tensor([0, 1, 0], device="cpu"),
    "places": 2,
    "name": "flags",
}
"""What a parameter of this name is given."""


def trained(make: Callable[..., optim.Optimizer], **settings: Any) -> Any:
    optimizer = make(RATES, **settings)
    params, state = PARAMS, optimizer.init(PARAMS, (3,))
    for _ in range(3):
        updates, state = optimizer.update(GRADS, state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def linear(p: Any, batch: Any, ctx: Any) -> Tensor:
    return batch @ p["weights"]["w"].mT


def log_prob(p: Any, batch: Any, ctx: Any) -> Tensor:
    return linear(p, batch, ctx).log_softmax(-1)[..., 0]


def two(p: Any, batch: Any, ctx: Any) -> Tensor:
    return linear(p, batch, ctx)[..., :2]


def scheduled(schedule: schedules.Schedule) -> Any:
    return schedule(DECAYS), schedule(DECAYS.double()), schedule(0.3)


ENDS = torch.tensor([1.0, 2.0, 3.0], device="cpu")
ROWS = SQUARE["reward"][..., 0], SQUARE["discount"][..., 0]
DISTRIBUTIONS = SQUARE["x"], SQUARE["value"].softmax(-1)
WEIGHTS, SHARES = numbers("weights", 3, 5).abs(), numbers("shares", 3, 3, dtype=DOUBLE).sigmoid()
CALLS: dict[str, Callable[[], Any]] = {
    "axes.align": lambda: axes.align(BY_NAME["gamma"], SQUARE["x"]),
    "distributions.multi_discrete_log_prob": lambda: called(
        "distributions.multi_discrete_log_prob", action=CHOSEN[..., None].expand(3, 3, 2) % 1
    ),
    "distributions.categorical_log_prob": lambda: called("distributions.categorical_log_prob", action=CHOSEN),
    "losses.cross_entropy_loss": lambda: called("losses.cross_entropy_loss", target=CHOSEN, valid=FLAGS[..., 0]),
    "losses.squared_loss": lambda: called("losses.squared_loss", valid=FLAGS[..., 0]),
    "losses.soft_value": lambda: called(
        "losses.soft_value", q=SQUARE["reward"][..., 0], log_prob=SQUARE["reward"][..., 0], temperature=0.2
    ),
    "losses.expected_soft_value": lambda: called("losses.expected_soft_value", q=SQUARE["reward"], temperature=0.2),
    "returns.v_trace": lambda: called("returns.v_trace", log_ratio=SQUARE["x"], rho_clip=1.5, c_clip=RATES),
    "returns.retrace": lambda: called("returns.retrace", q=SQUARE["value"], log_ratio=SQUARE["x"]),
    "trust_region.conjugate_gradient": lambda: trust_region.conjugate_gradient(
        lambda x: x * BY_NAME["fisher"][0], SQUARE["x"][0], 2
    ),
    "trust_region.step_within": lambda: [
        trust_region.step_within(limit, SQUARE["x"][0], SQUARE["value"][0]) for limit in (0.1, RATES)
    ],
    "trust_region.line_search": lambda: trust_region.line_search(
        lambda x: (-x.square().sum(-1), x.square().sum(-1)), SQUARE["x"][0], -SQUARE["x"][0], RATES, 4
    ),
    "losses.q_target": lambda: called(
        "losses.q_target", reward=SQUARE["reward"][..., 0], discount=SQUARE["discount"][..., 0]
    ),
    "losses.double_q_target": lambda: called(
        "losses.double_q_target", reward=SQUARE["reward"][..., 0], discount=SQUARE["discount"][..., 0]
    ),
    "losses.huber_error": lambda: called("losses.huber_error", delta=BY_NAME["gamma"]),
    "distributional.support": lambda: distributional.support(ENDS, 4.0, SQUARE["x"]),
    "distributional.categorical_projection": lambda: distributional.categorical_projection(
        SQUARE["x"].softmax(-1), *ROWS, -ENDS, ENDS
    ),
    "distributional.categorical_divergence": lambda: distributional.categorical_divergence(*DISTRIBUTIONS),
    "distributional.categorical_loss": lambda: distributional.categorical_loss(*DISTRIBUTIONS, FLAGS[..., 0]),
    "distributional.quantile_target": lambda: distributional.quantile_target(SQUARE["x"], *ROWS),
    "distributional.quantile_huber": lambda: distributional.quantile_huber(*DISTRIBUTIONS, RATES),
    "distributional.quantile_loss": lambda: distributional.quantile_loss(*DISTRIBUTIONS, 0.5, FLAGS[..., 0]),
    "distributional.weighted_mean": lambda: distributional.weighted_mean(ROWS[0], FLAGS[..., 0], ROWS[1].abs()),
    "sum_tree.build": lambda: sum_tree.build(WEIGHTS),
    "sum_tree.total": lambda: sum_tree.total(sum_tree.build(WEIGHTS)),
    "sum_tree.weights_of": lambda: sum_tree.weights_of(sum_tree.build(WEIGHTS), 5),
    "sum_tree.find": lambda: sum_tree.find(sum_tree.build(WEIGHTS), SHARES),
    "sum_tree.replace": lambda: sum_tree.replace(sum_tree.build(WEIGHTS), CHOSEN, ROWS[0].abs()),
    "evolution.evolution_gradient": lambda: called("evolution.evolution_gradient", sigma=0.5),
    "fisher.categorical_fisher": lambda: [
        fisher.categorical_fisher(linear, {"weights": PARAMS}, SQUARE["value"], 1, kind, **labels)
        for kind, labels in (("exact", {}), ("sample", {"key": KEYS}), ("empirical", {"target": CHOSEN}))
    ],
    "fisher.gaussian_fisher": lambda: fisher.gaussian_fisher(two, {"weights": PARAMS}, SQUARE["value"], 1),
    "fisher.score_fisher": lambda: fisher.score_fisher(log_prob, {"weights": PARAMS}, SQUARE["value"], 1),
    "fisher.categorical_roots": lambda: list(fisher.categorical_roots(SQUARE["x"])),
    "fisher.gaussian_roots": lambda: list(fisher.gaussian_roots(SQUARE["x"][..., :2])),
    "sample_gradients.check_outputs": lambda: sample_gradients.check_outputs(
        linear, {"weights": PARAMS}, SQUARE["value"], 1
    ),
    "sample_gradients.squared_gradients": lambda: sample_gradients.squared_gradients(
        linear, {"weights": PARAMS}, SQUARE["value"], fisher.categorical_roots, 1
    ),
    "sample_gradients.group_gradients": lambda: sample_gradients.group_gradients(
        log_prob, {"weights": PARAMS}, SQUARE["value"].unsqueeze(2), 1
    ),
    "normalise.normalise": lambda: [normalise.normalise(x, SEEN) for x in (SQUARE["x"], CHOSEN)],
    "normalise.normalise_reward": lambda: [normalise.normalise_reward(x, PAID) for x in (SQUARE["x"], CHOSEN)],
    "normalise.running_update": lambda: called(
        "normalise.running_update", stats=running_init((3,), (3,)), valid=FLAGS[..., 0]
    ),
    "normalise.reward_update": lambda: called("normalise.reward_update", stats=reward_init((3,), 3)),
    "optim.sgd": lambda: trained(optim.sgd, momentum=0.9, nesterov=True, weight_decay=0.1),
    "optim.adagrad": lambda: trained(optim.adagrad, lr_decay=0.1),
    "optim.rmsprop": lambda: trained(optim.rmsprop, centered=True, momentum=0.9),
    "optim.adam": lambda: [trained(optim.adam, amsgrad=True), trained(optim.adam, b1=DECAYS)],
    "optim.adamw": lambda: trained(optim.adamw),
    "optim.apply_updates": lambda: optim.apply_updates(PARAMS, GRADS),
    "optim.clip": lambda: trained(lambda lr: optim.chain(optim.clip(0.5), optim.sgd(lr))),
    "optim.chain": lambda: trained(lambda lr: optim.chain(optim.clip(lr), optim.adam(lr))),
    "optim.clip_by_norm": lambda: optim.clip_by_norm(GRADS, ENDS, 1),
    "pruning.largest_free": lambda: called(
        "pruning.largest_free", size=SQUARE["x"][..., 0].abs(), count=FLAGS[..., 0].sum(-1, keepdim=True) // 2
    ),
    "projection.projection_weights": lambda: projection.projection_weights(
        *(SQUARE["x"] @ SQUARE["x"].mT, SQUARE["value"][..., 0], ENDS), margin=DECAYS
    ),
    "projection.nonnegative_quadratic": lambda: projection.nonnegative_quadratic(
        torch.ones(3, 3, 3, dtype=DOUBLE, device="cpu"), -SQUARE["x"][..., 0].double().abs()
    ),
    "quadratics.zero_quadratic": lambda: quadratics.zero_quadratic(SQUARE["x"]),
    "packed.in_order": lambda: packed.in_order({"b": RATES, "a": ENDS}, {"a": ENDS, "b": RATES}),
    "schedules.anneal": lambda: [schedules.anneal(ENDS, name, DECAYS.double()) for name in ("linear", "cosine")],
    "schedules.constant": lambda: scheduled(schedules.constant(0.1)),
    "schedules.linear": lambda: [scheduled(schedules.linear(0.3, 0.1)), scheduled(schedules.linear(ENDS, 0.1))],
    "schedules.cosine": lambda: [scheduled(schedules.cosine(0.3, 0.1)), scheduled(schedules.cosine(ENDS, 0.1))],
    "schedules.exponential": lambda: [
        scheduled(schedules.exponential(0.3, 0.1)),
        scheduled(schedules.exponential(ENDS, 0.1)),
    ],
    "schedules.warm_up": lambda: scheduled(schedules.warm_up(schedules.linear(ENDS), 0.2)),
    "shapes.same_shape": lambda: [],
    "statistics.optimality_gap": lambda: statistics.optimality_gap(BY_NAME["scores"], 5.0),
    "statistics.stratified_bootstrap_interval": lambda: statistics.stratified_bootstrap_interval(
        BY_NAME["scores"], reps=50
    ),
    "tabular.expected_reward": lambda: tabular.expected_reward(P, P),
    "tabular.soft_plan": lambda: tabular.soft_plan(P, POLICY, 4),
    "tabular.soft_plan_discounted": lambda: tabular.soft_plan_discounted(P, POLICY, 0.5),
    "tabular.optimal_plan": lambda: tabular.optimal_plan(P, POLICY, 0.5),
    "tabular.occupancy": lambda: tabular.occupancy(P, POLICY[:, 0], POLICY.expand(4, 3, 2)),
    "tabular.occupancy_discounted": lambda: tabular.occupancy_discounted(P, POLICY[:, 0], POLICY, 0.5),
    "tabular.policy_value": lambda: tabular.policy_value(P, POLICY, POLICY, 0.5),
    "tabular.policy_value_horizon": lambda: tabular.policy_value_horizon(P, POLICY, POLICY.expand(4, 3, 2)),
    "tabular.causal_log_likelihood": lambda: tabular.causal_log_likelihood(
        POLICY.expand(4, 3, 2), POLICY.expand(4, 3, 2).log(), 0.9
    ),
    "tree.map": lambda: tree.map(torch.neg, SEEN),
    "tree.leaves": lambda: list(tree.leaves(SEEN)),
    "tree.rebuild": lambda: tree.rebuild(SEEN, tree.leaves(SEEN)),
    "tree.flatten": lambda: tree.flatten(SEEN),
    "tree.unflatten": lambda: tree.unflatten(tree.flatten(SEEN)),
}
"""How functions are called whose arguments are not all in `BY_NAME`."""


def public() -> dict[str, Callable[..., Any]]:
    """Every function of rlmeta.functional."""
    functions = {}
    for module in pkgutil.iter_modules(rlmeta.functional.__path__):
        content = importlib.import_module(f"rlmeta.functional.{module.name}")
        for name, function in inspect.getmembers(content, inspect.isfunction):
            if function.__module__ == content.__name__ and not name.startswith("_"):
                functions[f"{module.name}.{name}"] = function
    return functions


FUNCTIONS = public()


def called(name: str, **others: Any) -> Any:
    """Result of a function called with the values of its parameters in `BY_NAME`, optional ones too, and others."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    known = {parameter: BY_NAME[parameter] for parameter in parameters if parameter in BY_NAME}
    return FUNCTIONS[name](**known | others)


def leaves(values: Any) -> Iterator[Tensor | np.ndarray | float]:
    if isinstance(values, dict):
        for name in sorted(values):
            yield from leaves(values[name])
    elif isinstance(values, list | tuple):
        for entry in values:
            yield from leaves(entry)
    else:
        yield values


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(DOUBLE),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same_whatever_torchs_defaults_are(name: str, mode: str) -> None:
    call = CALLS.get(name, lambda: called(name))
    expected = list(leaves(call()))
    with MODES[mode]():
        results = list(leaves(call()))
    assert len(results) == len(expected)
    for result, right in zip(results, expected):
        if isinstance(right, Tensor):
            assert isinstance(result, Tensor) and result.dtype == right.dtype and result.device == right.device
            same = torch.equal(result.nan_to_num(7), right.nan_to_num(7))
            assert same
        else:
            np.testing.assert_array_equal(result, right)
