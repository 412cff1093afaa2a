"""PPG: what moves in which phase, its losses against the paper's, the rollouts that it keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlmeta.agents import PPG
from rlmeta.envs.task import task
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.state import take
from rlmeta.nn import Context
from tests.agents.worlds import start, train

SMALL = PPG(num_envs=3, num_steps=4, batch_size=6, auxiliary_every=3, auxiliary_epochs=2, hidden_sizes=(4,))


def weights_of(state, prefix):
    return {name: w.clone() for name, w in state["params"]["weights"].items() if name.startswith(prefix)}


def test_the_auxiliary_head_moves_in_auxiliary_phases_alone():
    agent, state, world = start(SMALL, "CartPole-v1", 2)
    moved, phases = [], []
    for _ in range(6):
        before = {prefix: weights_of(state, prefix) for prefix in ("policy.", "value.", "auxiliary.")}
        state, metrics = agent.iterate(state, world)
        phases.append("losses/auxiliary_phase/clone_loss" in metrics)
        moved.append(
            [any(not torch.equal(w, state["params"]["weights"][n]) for n, w in old.items()) for old in before.values()]
        )
    assert [row[2] for row in moved] == phases == [False, False, True] * 2
    assert all(row[0] and row[1] for row in moved)
    # 2 minibatches of either group a rollout, 6 an epoch over 3 rollouts
    counts = {name: state["optimizer"][name]["count"].tolist() for name in ("policy", "value", "auxiliary")}
    assert counts == {"policy": [36, 36], "value": [36, 36], "auxiliary": [24, 24]}


def test_rollouts_are_kept_in_order_until_the_phase_and_not_over_a_new_task():
    agent, state, world = start(SMALL, "CartPole-v1", 2)
    empty = tree.map(torch.clone, state["rollouts"])
    seen = []
    for count in (1, 2, 0, 1):
        inner = agent.credit

        def credit(*arguments, inner=inner):
            credited = inner(*arguments)
            seen.append(credited)
            return credited

        agent.credit = credit
        before = state["rollouts"]
        copied = tree.map(torch.clone, before)
        state, _ = agent.iterate(state, world)
        agent.credit = inner
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(copied))), "written in place"
        assert state["rollouts"]["count"].tolist() == [count, count]
        place = (count - 1) % 3
        for name in ("observation", "return", "valid"):
            assert torch.equal(state["rollouts"][name][:, place], seen[-1][name]), name
    assert torch.equal(state["rollouts"]["return"][:, 1], seen[1]["return"]), "the others wait for theirs"
    state = agent.begin_task(state, world, state["key"])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state["rollouts"]), tree.leaves(empty)))


@pytest.mark.parametrize("problem", ["CartPole-v1", "Pendulum-v1"])
def test_losses_are_those_of_the_paper(problem):
    settings = dataclasses.replace(SMALL, clone_coefficient=0.7, entropy_coefficient=0.1, clip_range=0.05)
    agent, state, _ = start(settings, problem, 3)
    generator, axes = torch.Generator().manual_seed(0), (3, 3)
    p, size = state["params"], agent.observation_space.shape
    other = {
        **p,
        "weights": {
            name: w * 1.5 + 0.3 * torch.randn(w.shape, generator=generator) for name, w in p["weights"].items()
        },
    }
    observation = torch.randn(*axes, *size, generator=generator)
    old = agent.distribution(other, {"observation": observation}, Context())
    action = agent.head.sample(old, state["key"])
    batch = {
        "observation": observation,
        "action": action,
        "valid": torch.tensor([[True, True, False]] * 3),
        "advantage": torch.randn(axes, generator=generator),
        "return": torch.randn(axes, generator=generator),
        "old_log_prob": agent.head.log_prob(old, action),
        "old_distribution": old,
    }
    policy_phase = agent.losses(p, batch, StepContext(training=True, moving=frozenset({"policy", "value"})))
    phase = agent.losses(p, batch, StepContext(training=True, moving=frozenset({"policy", "value", "auxiliary"})))
    assert policy_phase.keys() == {"policy", "entropy", "value"} and phase.keys() == {"auxiliary", "clone", "value"}
    for learner in range(3):
        one = take({"p": p, "batch": batch}, learner)
        b = tree.map(lambda x: x[:2], one["batch"])
        d = agent.distribution(one["p"], b, Context())
        ratio = (agent.head.log_prob(d, b["action"]) - b["old_log_prob"]).exp()
        clipped = torch.minimum(ratio * b["advantage"], ratio.clamp(0.95, 1.05) * b["advantage"])
        value = agent.forward(agent.value, "value", one["p"], b["observation"])
        features = agent.features(one["p"], b, Context())
        head = (one["p"]["weights"][f"auxiliary.linear.{w}"] for w in ("weight", "bias"))
        extra = torch.nn.functional.linear(features, *head)[:, 0]
        expected = {
            "policy": -clipped.mean(),
            "entropy": -0.1 * agent.head.entropy(d).mean(),
            "value": 0.5 * (value - b["return"]).square().mean(),
            "auxiliary": 0.5 * (extra - b["return"]).square().mean(),
            "clone": 0.7 * agent.head.kl(b["old_distribution"], d).mean(),
        }
        for name, loss in expected.items():
            torch.testing.assert_close({**policy_phase, **phase}[name][learner], loss, rtol=1e-4, atol=1e-5, msg=name)


def test_the_clone_term_keeps_the_policy():
    """With a large coefficient an auxiliary phase hardly changes the answers, while the head learns."""
    ends = {}
    for coefficient in (0.0, 30.0):
        settings = dataclasses.replace(
            SMALL, auxiliary_every=2, auxiliary_epochs=20, clone_coefficient=coefficient, learning_rate=3e-3
        )
        agent, state, world = start(settings, "CartPole-v1", 2)
        state, _ = agent.iterate(state, world)
        before = tree.map(torch.clone, dict(state["params"]["weights"]))
        batch = {"observation": state["rollouts"]["observation"][:, 0].flatten(1, 2)}
        d = agent.distribution({**state["params"], "weights": before}, batch, Context())
        state, _ = agent.iterate(state, world)
        now = agent.distribution(state["params"], batch, Context())
        ends[coefficient] = agent.head.kl(d, now).mean().item()
    assert ends[30.0] < 0.2 * ends[0.0]


def test_recorded_iterations_equal_unrecorded_ones(monkeypatch):
    monkeypatch.setattr("rlmeta.engine.capture.WARM_UP", 3)
    ends = []
    for recorded in (True, False):
        agent, state, world = start(SMALL, "CartPole-v1", 3)
        agent.capture = agent.capture if recorded else None
        for _ in range(10):
            state, _ = agent.iterate(state, world)
        ends.append(state)
        assert not recorded or "gradient steps" in agent.capture.operations()
    for part in ("params", "optimizer", "world", "rollouts"):
        ours, theirs = (tree.flatten(state[part]) for state in ends)
        for leaf, value in ours.items():
            torch.testing.assert_close(value, theirs[leaf], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_it_learns_over_several_phases():
    settings = PPG(num_envs=8, num_steps=32, policy_epochs=4, value_epochs=4, batch_size=64, auxiliary_every=8,
                   learning_rate=2e-3)  # fmt: skip
    agent, state = train(settings, "CartPole-v1", 28)
    world = task("CartPole-v1").world((2,), 8)
    scores = agent.evaluate(state["params"], world, random.fold(state["key"], "test"), 8).returns.mean(-1)
    assert (scores > 60).all(), scores


def test_settings_that_drop_samples_are_refused():
    with pytest.raises(SettingError, match="PPG: batch_size 100 does not divide"):
        PPG(batch_size=100)
    with pytest.raises(SettingError, match="auxiliary_every"):
        PPG(auxiliary_every=0)
