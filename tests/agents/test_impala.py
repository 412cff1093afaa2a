"""V-trace actor-critic: its losses against the paper's, importance weights, sequences and learners apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlmeta.agents import IMPALA
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.functional.returns import v_trace
from rlmeta.learning.collect import collect
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.state import take
from tests.agents.worlds import start

SMALL = IMPALA(num_envs=3, num_steps=3, num_epochs=2, sequences=3, hidden_sizes=(4,), entropy_coefficient=0.1)


def prepared(settings=SMALL, problem="CartPole-v1"):
    """(agent, state, batch [S, N, T]) with S = T = N = 3; the policy that acted is another, and some steps are none."""
    agent, state, world = start(settings, problem, 3)
    state, rollout = collect(agent, state, world, agent.steps_per_iteration)
    generator = torch.Generator().manual_seed(0)
    rollout["valid"] = torch.rand(rollout["valid"].shape, generator=generator) < 0.8
    rollout["terminated"] = torch.rand(rollout["valid"].shape, generator=generator) < 0.2
    credited = agent.credit(state["params"], rollout, {"task": rollout["reward"]})
    credited["old_log_prob"] = credited["old_log_prob"] + torch.randn(3, 3, 3, generator=generator)
    return agent, state, tree.map(lambda x: x.transpose(1, 2).contiguous(), credited)


@pytest.mark.parametrize("problem", ["CartPole-v1", "Pendulum-v1"])
def test_losses_are_those_of_the_paper(problem):
    settings = dataclasses.replace(SMALL, rho_clip=1.5, c_clip=0.8, trace_lambda=0.9, value_coefficient=0.3)
    agent, state, batch = prepared(settings, problem)
    p = state["params"]
    found = agent.losses(p, batch, StepContext(training=True))
    for learner in range(3):
        one = take({"p": p, "batch": batch}, learner)
        b = tree.map(lambda x: x.transpose(0, 1), one["batch"])
        d = agent.forward(agent.policy, "policy", one["p"], b["observation"])
        value = agent.forward(agent.value, "value", one["p"], b["observation"])
        after = agent.forward(agent.value, "value", one["p"], b["next_observation"])
        log_prob = agent.head.log_prob(d, b["action"])
        target, advantage = v_trace(
            b["reward"], b["discount"], value, after, b["cut"], log_prob - b["old_log_prob"], 1.5, 0.8, 0.9
        )
        valid = b["valid"]
        policy = -(log_prob * advantage)[valid].mean() - 0.1 * agent.head.entropy(d)[valid].mean()
        torch.testing.assert_close(found["policy"][learner], policy, rtol=1e-4, atol=1e-5)
        worth = 0.3 * (target - value).square()[valid].mean()
        torch.testing.assert_close(found["value"][learner], worth, rtol=1e-4, atol=1e-5)


def test_no_gradient_passes_through_targets_and_weights():
    """The policy's gradient is rho A grad log pi, the value function's that of a regression on fixed targets."""
    agent, state, batch = prepared(dataclasses.replace(SMALL, entropy_coefficient=0.0))
    weights = {name: w.detach().clone().requires_grad_() for name, w in state["params"]["weights"].items()}
    p = {**state["params"], "weights": weights}
    terms = agent.losses(p, batch, StepContext(training=True))
    for term, own in (("policy", "policy."), ("value", "value.")):
        found = torch.autograd.grad(terms[term].sum(), list(weights.values()), retain_graph=True, allow_unused=True)
        assert all((g is not None) == name.startswith(own) for name, g in zip(weights, found)), term
    rollout = tree.map(lambda x: x.transpose(1, 2), batch)
    with torch.no_grad():
        value, after = (
            agent.forward(agent.value, "value", p, rollout[name]) for name in ("observation", "next_observation")
        )
    log_prob = agent.head.log_prob(agent.forward(agent.policy, "policy", p, rollout["observation"]), rollout["action"])
    ratio = (log_prob - rollout["old_log_prob"]).detach()
    _, advantage = v_trace(rollout["reward"], rollout["discount"], value, after, rollout["cut"], ratio)
    by_hand = -(log_prob * advantage * rollout["valid"]).sum((1, 2)) / rollout["valid"].sum((1, 2))
    names = [name for name in weights if name.startswith("policy.")]
    expected = torch.autograd.grad(by_hand.sum(), [weights[name] for name in names])
    found = torch.autograd.grad(terms["policy"].sum(), [weights[name] for name in names])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_no_step_of_an_episode_is_cut_off():
    agent, state, world = start(SMALL, "CartPole-v1", 2)
    state, rollout = collect(agent, state, world, 3)
    for name, place in (("terminated", 0), ("truncated", 1), ("valid", 2)):
        rollout[name] = torch.full_like(rollout[name], name == "valid")
        rollout[name][0, place, 0] = name != "valid"
    credited = agent.credit(state["params"], rollout, {"task": rollout["reward"]})
    assert credited["cut"][0, :, 0].all() and credited["cut"].sum() == 3
    assert credited["discount"][0, :, 0].tolist() == pytest.approx([0.0, 0.99, 0.99])


def test_the_first_step_on_a_rollout_is_on_policy():
    agent, state, world = start(SMALL, "CartPole-v1", 2)
    state, rollout = collect(agent, state, world, 3)
    credited = agent.credit(state["params"], rollout, {"task": rollout["reward"]})
    ctx = StepContext(training=True)
    agent.losses(state["params"], tree.map(lambda x: x.transpose(1, 2), credited), ctx)
    assert ctx.info["losses/clipfrac"].tolist() == [0.0, 0.0]


def test_recorded_iterations_equal_unrecorded_ones(monkeypatch):
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 3)
    ends = []
    for recorded in (True, False):
        agent, state, world = start(dataclasses.replace(SMALL, sequences=1), "CartPole-v1", 3)
        agent.capture = agent.capture if recorded else None
        for _ in range(10):
            state, _ = agent.iterate(state, world)
        ends.append(state)
        assert not recorded or "gradient steps" in agent.capture.operations()
    for part in ("params", "optimizer", "world"):
        ours, theirs = (tree.flatten(state[part]) for state in ends)
        for leaf, value in ours.items():
            torch.testing.assert_close(value, theirs[leaf], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_settings_that_leave_sequences_out_are_refused():
    with pytest.raises(SettingError, match="sequences 3 does not divide num_envs 8"):
        IMPALA(sequences=3)
    with pytest.raises(SettingError, match="rho_clip"):
        IMPALA(rho_clip=0.0)
