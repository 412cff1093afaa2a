"""TRPO: its Fisher-vector products, the trust region, learners apart, recorded and resumed."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import rlmeta as rl
from rlmeta.agents import TRPO
from rlmeta.envs.task import task
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.collect import collect
from rlmeta.learning.state import take
from rlmeta.nn import Context, Encoder
from rlmeta.nn.product import plain_graph
from tests.agents.worlds import start, train

SMALL = TRPO(num_envs=4, num_steps=16, batch_size=32, value_epochs=2, hidden_sizes=(4,), kl_target=0.02)
NAMES = {"CartPole-v1": SMALL, "Pendulum-v1": dataclasses.replace(SMALL, state_dependent_exploration=True)}


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr("rlmeta.agents.networks.Encoder", partial(Encoder, dtype=torch.float64))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(settings, problem, seeds=3):
    """(agent, state, batch) in the default type: a rollout with its advantages, as a step of the policy sees it."""
    agent, state, world = start(settings, problem, seeds)
    p, dtype = state["params"], torch.get_default_dtype()
    real = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    p["weights"] = Packed.of({name: 3 * real(w) for name, w in p["weights"].items()}, 1)
    p["hyper"] = tree.map(real, p["hyper"])
    state, rollout = collect(agent, state, world, agent.steps_per_iteration)
    credited = agent.credit(state["params"], tree.map(real, rollout), {"task": real(rollout["reward"])})
    batch = agent.items(credited, 1)
    keep = torch.arange(batch["valid"].shape[-1]) % 5 > 0
    batch["valid"] = batch["valid"] & keep
    return agent, state, batch


@pytest.mark.parametrize("problem", NAMES)
def test_fisher_vector_products_are_those_of_the_explicit_matrix(problem, in_float64):
    """F = E[sum over actions of pi (d log pi / d theta)(d log pi / d theta)^T], from the scores' roots."""
    agent, state, batch = prepared(NAMES[problem], problem)
    p, start_at = state["params"], agent.policy_weights(state["params"])
    old = agent.distribution(p, batch, Context())
    with plain_graph():
        leaf = start_at.flat.clone().requires_grad_()
        _, divergence = agent.surrogate(agent._distribution(p, start_at, leaf, batch), old, batch)
        (slope,) = torch.autograd.grad(divergence.sum(), leaf, create_graph=True)
    torch.testing.assert_close(slope.detach(), torch.zeros_like(leaf), atol=1e-12, rtol=0)
    damping = torch.tensor([0.0, 0.1, 2.0])
    vector = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    found = agent.fisher_product(slope, leaf, damping)(vector)
    for learner in range(3):
        one = take({"p": p, "batch": batch}, learner)
        own = Packed.of({n: w for n, w in one["p"]["weights"].items() if n.startswith("policy.")}, 0)

        def outputs(flat, one=one, own=own):
            d = agent._distribution(one["p"], own, flat, one["batch"])
            return torch.cat([d[name] for name in ("logits", "mean", "log_std") if name in d], -1)

        jacobian = torch.autograd.functional.jacobian(outputs, own.flat)  # [B, outputs, G]
        if problem == "CartPole-v1":
            probability = outputs(own.flat).softmax(-1)
            metric = torch.diag_embed(probability) - probability.unsqueeze(-1) * probability.unsqueeze(-2)
        else:
            log_std = outputs(own.flat)[:, 1]
            metric = torch.diag_embed(torch.stack([(-2 * log_std).exp(), torch.full_like(log_std, 2.0)], -1))
        each = jacobian.mT @ metric @ jacobian
        fisher = each[one["batch"]["valid"]].mean(0)
        expected = fisher @ vector[learner] + damping[learner] * vector[learner]
        torch.testing.assert_close(found[learner], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("problem", NAMES)
def test_a_step_improves_the_objective_within_the_trust_region(problem, in_float64):
    settings = dataclasses.replace(NAMES[problem], kl_target=[0.001, 0.02, 0.3], damping=1e-3)
    agent, state, batch = prepared(settings, problem, 1)
    before = agent.policy_weights(state["params"])
    outputs = agent.natural_step({"params": state["params"], "batch": batch})
    after = agent._distribution(state["params"], before, outputs["weights"], batch)
    objective, divergence = agent.surrogate(after, agent.distribution(state["params"], batch, Context()), batch)
    limit, mean = (
        torch.tensor([0.001, 0.02, 0.3]),
        (batch["advantage"] * batch["valid"]).sum(-1) / batch["valid"].sum(-1),
    )
    assert (divergence <= limit).all() and (divergence > 0.2 * limit).all()
    assert (objective > mean).all(), "at the old policy every ratio is 1"
    assert (outputs["losses/step_fraction"] > 0.1).all()
    torch.testing.assert_close(outputs["losses/kl"], divergence)


def test_the_direction_is_the_natural_gradient_and_learners_are_apart(in_float64):
    """With as many products as weights: parallel to (F + damping I)^-1 g, for each learner as if it were alone."""
    settings = dataclasses.replace(SMALL, conjugate_steps=80, line_search_steps=1, kl_target=1e-8)
    agent, state, batch = prepared(settings, "CartPole-v1")
    moved = agent.natural_step({"params": state["params"], "batch": batch})["weights"]
    for learner in range(3):
        one = take({"params": state["params"], "batch": batch}, slice(learner, learner + 1))
        alone = agent.natural_step(one)["weights"]
        torch.testing.assert_close(moved[learner], alone[0], rtol=1e-7, atol=1e-9)
    old, like = agent.distribution(state["params"], batch, Context()), agent.policy_weights(state["params"])

    def measures(flat, which):
        return agent.surrogate(agent._distribution(state["params"], like, flat, batch), old, batch)[which].sum()

    flat = like.flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measures(flat, 0), flat)
    hessian = torch.autograd.functional.hessian(lambda x: measures(x, 1), like.flat)
    for learner in range(3):
        curvature = hessian[learner, :, learner] + 0.1 * torch.eye(flat.shape[-1])
        direction = torch.linalg.solve(curvature, gradient[learner])
        step = moved[learner] - like.flat[learner]
        assert torch.cosine_similarity(step, direction, dim=0) > 1 - 1e-6


def test_recorded_iterations_equal_unrecorded_ones(monkeypatch):
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 3)
    ends = []
    for recorded in (True, False):
        settings = dataclasses.replace(SMALL, conjugate_steps=3, line_search_steps=3)
        agent, state, world = start(settings, "CartPole-v1", 3)
        agent.capture = agent.capture if recorded else None
        for _ in range(9):
            state, _ = agent.iterate(state, world)
        ends.append(state)
        if recorded:
            assert {"a policy step", "gradient steps"} <= agent.capture.operations().keys()
    for part in ("params", "optimizer", "world"):
        ours, theirs = (tree.flatten(state[part]) for state in ends)
        for leaf, value in ours.items():
            torch.testing.assert_close(value, theirs[leaf], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_inactive_learner_stays_as_it_is_and_its_moments_too():
    agent, state, world = start(SMALL, "CartPole-v1", 3)
    state["active"] = torch.tensor([True, False, True])
    before = tree.map(
        torch.clone, {name: state[name] for name in ("optimizer",)} | {"w": dict(state["params"]["weights"])}
    )
    state, metrics = agent.iterate(state, world)
    after = {"optimizer": state["optimizer"], "w": dict(state["params"]["weights"])}
    for a, b in zip(tree.leaves(before), tree.leaves(after)):
        assert torch.equal(a[1], b[1])
    assert not torch.equal(before["w"]["policy.head.linear.weight"][0], after["w"]["policy.head.linear.weight"][0])
    assert metrics["losses/kl"].shape == (3,)


@pytest.mark.parametrize("name", ["TRPO", "IMPALA", "PPG", "DDPG", "SAC"])
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    few = {"num_envs": 2, "num_steps": 8, "hidden_sizes": (4,)}
    replayed = {"learning_starts": 16, "batch_size": 8, "capacity": 64, "gradient_steps": 2}
    settings, problem = {
        "TRPO": (rl.TRPO(batch_size=8, state_dependent_exploration=True, conjugate_steps=4, **few), "Pendulum-v1"),
        "IMPALA": (rl.IMPALA(sequences=1, **few), "CartPole-v1"),
        "PPG": (rl.PPG(batch_size=8, auxiliary_every=3, **few), "CartPole-v1"),
        "DDPG": (rl.DDPG(**few, **replayed), "Pendulum-v1"),
        "SAC": (rl.SAC(**few, **replayed), "CartPole-v1"),
    }[name]
    budget = {"final_episodes": 2, "threads": 1, "seeds": 2}
    whole = rl.train(settings, problem, steps=160, **budget)
    rl.train(
        settings,
        problem,
        steps=160,
        out=tmp_path / "run",
        callbacks=[lambda run, line: line["iteration"] >= 4],
        **budget,
    )
    again = rl.resume(tmp_path / "run")
    for part in ("params", "optimizer", "world", "rollouts", "replay"):
        ours, theirs = (tree.flatten(run.state.get(part, {})) for run in (whole, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours), part


def test_lifelong_methods_are_refused_in_one_sentence():
    with pytest.raises(SettingError, match="TRPO: its policy takes steps of its own"):
        world = task("CartPole-v1").world((1,), 1)
        SMALL.bind(world.observation_space, world.action_space, [rl.EWC()])
    with pytest.raises(SettingError, match="batch_size"):
        TRPO(batch_size=100)
    with pytest.raises(SettingError, match="exclude each other"):
        TRPO(state_dependent_exploration=True, action_bounds="squash")


def test_it_learns():
    settings = TRPO(num_envs=8, num_steps=64, batch_size=128, value_learning_rate=3e-3, value_epochs=5)
    agent, state = train(settings, "CartPole-v1", 16)
    world = task("CartPole-v1").world((2,), 8)
    scores = agent.evaluate(state["params"], world, random.fold(state["key"], "test"), 8).returns.mean(-1)
    assert (scores > 100).all(), scores
