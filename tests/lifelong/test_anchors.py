"""L2, SI, MAS and RWalk: the importance of weights against closed forms and loops; what an infinite strength holds."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import rlmeta as rl
from rlmeta.functional.packed import Packed
from rlmeta.functional.quadratics import zero_quadratic
from rlmeta.learning.method import Gradients, StepInfo
from rlmeta.lifelong import EWC, L2, MAS, SI, RWalk
from rlmeta.lifelong.mas import sensitivity
from tests.lifelong.toy import flat, trained

DOUBLE = torch.float64
CURVATURE, OPTIMUM = torch.tensor([1.0, 3.0, 0.0], dtype=DOUBLE), torch.tensor([2.0, -1.0, 5.0], dtype=DOUBLE)
TASK = {"index": torch.zeros((), dtype=torch.int64)}


class Plain:
    """A learner whose whole weights predict."""

    predicts = ("w",)


def weights(theta):
    return {"weights": Packed.of({"w": theta}, 0)}


def loss(theta):
    return 0.5 * (CURVATURE * (theta - OPTIMUM).square()).sum()


def descended(method, m, theta, rate, steps, pull=0.0):
    """Gradient descent on a quadratic loss; `pull`, of another method, moves the weights but is no gradient of it."""
    for _ in range(steps):
        gradient = CURVATURE * (theta - OPTIMUM)
        delta = -rate * (gradient + pull)
        theta = theta + delta
        m = method.after_step(Plain, StepInfo(gradient, delta, {}, {}), weights(theta), m, TASK, None)
    return m, theta


def start(theta, **more):
    zero = torch.zeros_like(theta)
    one = torch.ones((), dtype=DOUBLE)
    return {"quadratic": zero_quadratic(theta), "strength": one, "path": zero, "start": theta, **more}


def test_sis_path_sums_up_to_what_the_loss_fell_by():
    """In full-batch descent, as the step size goes to 0: half the step, half the gap."""
    theta = torch.zeros(3, dtype=DOUBLE)
    gaps = []
    for rate in (1e-3, 5e-4):
        m, end = descended(SI(), start(theta), theta, rate, round(1 / rate))
        gaps.append(float((m["path"].sum() - (loss(theta) - loss(end))).abs()))
    assert gaps[0] < 5e-3
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.05)
    assert m["path"][2] == 0.0  # no curvature, no part in it


def test_sis_path_is_of_the_tasks_gradient_whatever_else_pulls():
    theta = torch.zeros(3, dtype=DOUBLE)
    m, end = descended(SI(), start(theta), theta, 1e-4, 10_000, pull=torch.tensor([0.1, 0.0, 1.0], dtype=DOUBLE))
    assert float((m["path"].sum() - (loss(theta) - loss(end))).abs()) < 1e-3
    assert m["path"][2] == 0.0  # it moved, for another's sake


def test_sis_importance_is_the_path_over_the_distance_and_never_negative():
    theta = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    path = torch.tensor([0.5, -4.0, 1.0], dtype=DOUBLE)
    m = start(theta - 2.0) | {"path": path}
    _, m = SI(damping=0.5).task_end(Plain, weights(theta), m, TASK, None)
    torch.testing.assert_close(m["quadratic"]["precision"], 2.0 * path.clamp(min=0) / 4.5)
    assert torch.equal(m["quadratic"]["centre"], theta)
    _, m = SI(damping=0.5).task_end(Plain, weights(theta + 1.0), m, TASK, None)
    expected = 2.0 * path.clamp(min=0) * (1 / 4.5 + 1 / 9.5)  # importance adds up, the anchor is the latest
    torch.testing.assert_close(m["quadratic"]["precision"], expected)
    assert torch.equal(m["quadratic"]["centre"], theta + 1.0)


def test_rwalks_score_by_hand():
    """Two moments of two steps each, with numbers that a pencil can follow."""
    method, theta = RWalk(rate=0.5, every=2), torch.zeros(1, dtype=DOUBLE)
    zeros = {name: torch.zeros_like(theta) for name in ("fisher", "path", "score", "past_score")}
    m = start(theta, **zeros, moment=theta, steps=torch.zeros((), dtype=torch.int64))
    fisher = score = path = 0.0
    moment = place = 0.0
    for step, (g, d) in enumerate(((2.0, -0.5), (1.0, -0.25), (1.0, 0.5), (-1.0, 1.0)), 1):
        theta, place = theta + d, place + d
        info = StepInfo(torch.tensor([g], dtype=DOUBLE), torch.tensor([d], dtype=DOUBLE), {}, {})
        m = method.after_step(Plain, info, weights(theta), m, TASK, None)
        fisher, path = 0.5 * g * g + 0.5 * fisher, path - g * d
        if step % 2 == 0:
            score += max(path, 0.0) / (0.5 * fisher * (place - moment) ** 2 + 1e-8)
            path, moment = 0.0, place
    torch.testing.assert_close(m["score"], torch.tensor([score], dtype=DOUBLE))
    torch.testing.assert_close(m["fisher"], torch.tensor([fisher], dtype=DOUBLE))
    assert score > 0
    _, first = method.task_end(Plain, weights(theta), m, TASK, None)
    torch.testing.assert_close(first["past_score"], m["score"])
    second = {"index": torch.ones((), dtype=torch.int64)}
    _, again = method.task_end(Plain, weights(theta), first | {"score": 3.0 * m["score"]}, second, None)
    torch.testing.assert_close(again["past_score"], 2.0 * m["score"])
    torch.testing.assert_close(again["quadratic"]["precision"], torch.full((1,), 4.0, dtype=DOUBLE))  # 2 (1 + 1)


@pytest.mark.parametrize("network", ["default", "normalised"])
def test_mas_importance_is_the_mean_of_every_samples_absolute_gradient(network):
    """A loop over samples; labels are not looked at."""
    layers = {
        "default": None,
        "normalised": lambda space: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Tanh()),
    }
    run = trained(count=1, steps=40, network=layers[network])
    agent, p = run.agent, run.state["params"]
    batch = agent.draw(run.state, run.world, 12)
    found = sensitivity(agent, p, batch, 1)
    expected = torch.zeros_like(found)
    for row in range(12):
        leaves = {name: w.detach().requires_grad_() for name, w in p["weights"].items()}
        sample = {name: x[:, row : row + 1] for name, x in batch.items()}
        with torch.enable_grad():
            norm = agent.logits({**p, "weights": leaves}, sample).square().sum()
            gradients = torch.autograd.grad(norm, list(leaves.values()))
        expected += torch.cat([g.abs().flatten(1) for g in gradients], -1) / 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    turned = batch | {"target": 2 - batch["target"]}
    assert torch.equal(sensitivity(agent, p, turned, 1), found)


def test_mas_leaves_classes_out_that_may_not_be_chosen():
    run = rl.train(
        rl.Classifier(hidden_sizes=(8,)),
        rl.stream("split-digits", scenario="class"),
        steps=40,
        lifelong=[MAS(samples=20)],
        progress=False,
    )
    assert all(torch.isfinite(x).all() for x in run.state["methods"]["mas"]["quadratic"].values())


@pytest.mark.parametrize("method", [L2(strength=3.0), SI(strength=3.0), MAS(strength=3.0), RWalk(strength=3.0)])
def test_the_penalty_pulls_towards_the_latest_anchor(method):
    run = trained(method, steps=80)
    m = run.state["methods"][method.name]
    packed = Packed.of(run.state["params"]["weights"], 1)
    zero = torch.zeros_like(packed.flat)
    moved = Packed.view(packed.flat + 0.1, packed, 1)
    pull = method.grads(run.agent, Gradients(zero, zero), {"weights": moved}, m, run.state["task"])
    torch.testing.assert_close(m["quadratic"]["centre"], packed.flat)
    torch.testing.assert_close(pull, 3.0 * m["quadratic"]["precision"] * (moved.flat - packed.flat))
    assert (pull >= 0).all() and (pull > 0).any()


@pytest.mark.parametrize("method", [EWC(samples=40), L2(), SI(), MAS(samples=40), RWalk()], ids=lambda m: m.name)
def test_an_infinite_strength_holds_what_mattered_and_nothing_else(method):
    """After the first task; a learner of the same run with a strength of 0 is fine-tuned bit for bit."""
    one = trained(dataclasses.replace(method, strength=math.inf), count=1, steps=40, seeds=2)
    both = trained(dataclasses.replace(method, strength=(math.inf, 0.0)), count=2, steps=40, seeds=2)
    mattered = one.state["methods"][method.name]["quadratic"]["precision"] > 0
    start_of_second, end = flat(one.state), flat(both.state)
    assert torch.equal(end[:2][mattered], start_of_second[mattered])
    assert mattered.any()
    assert torch.equal(end[2:], flat(trained(count=2, steps=40, seeds=2).state))


@pytest.mark.parametrize("method", [L2(), SI(), MAS(samples=16), RWalk()], ids=lambda m: m.name)
def test_an_agents_critic_is_left_alone(method):
    run = rl.train(
        rl.PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=2, hidden_sizes=(4,)),
        "cartpole-conflicts",
        steps=64,
        lifelong=[method],
        progress=False,
    )
    weights = run.state["params"]["weights"]
    precision = Packed.view(run.state["methods"][method.name]["quadratic"]["precision"], weights, 1)
    for name, value in precision.items():
        assert (value.sum() > 0) == name.startswith("policy."), name
