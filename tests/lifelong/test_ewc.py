"""EWC: the joint optimum of a quadratic problem, and what a spring must not do."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import random
from rlmeta.functional.packed import Packed
from rlmeta.functional.quadratics import add_quadratic, zero_quadratic
from rlmeta.learning.method import Gradients
from rlmeta.lifelong import EWC
from rlmeta.lifelong.ewc import information
from rlmeta.nn.fisher import categorical_fisher
from tests.lifelong.toy import trained

DOUBLE = torch.float64


def test_two_quadratic_tasks_with_exact_curvature_give_the_joint_optimum():
    """Tasks ½ Σ h (θ - t)²: after the second with EWC at λ = 1 the weights are where training on both would end."""
    curvature = torch.tensor([[1.0, 3.0, 0.5], [2.0, 1.0, 0.0]], dtype=DOUBLE)
    optimum = torch.tensor([[1.0, -1.0, 2.0], [0.0, 2.0, 5.0]], dtype=DOUBLE)
    method, theta = EWC(strength=1.0), optimum[0].clone()
    quadratic = add_quadratic(zero_quadratic(theta), curvature[0], theta)
    m = {"quadratic": quadratic, "strength": torch.ones((), dtype=DOUBLE)}
    task = {"index": torch.ones((), dtype=torch.int64)}
    for _ in range(200):
        gradient = curvature[1] * (theta - optimum[1])
        p = {"weights": Packed.of({"w": theta}, 0)}
        theta = theta - 0.2 * method.grads(None, Gradients(gradient, gradient), p, m, task)
    joint = (curvature * optimum).sum(0) / curvature.sum(0)
    torch.testing.assert_close(theta, joint)


def test_the_penalty_pulls_wherever_the_weights_have_left_the_anchor():
    run = trained(EWC(strength=3.0))
    m = run.state["methods"]["ewc"]
    weights = Packed.of(run.state["params"]["weights"], 1)
    zero = torch.zeros_like(weights.flat)
    pull = run.agent.methods[0].grads(run.agent, Gradients(zero, zero), {"weights": weights}, m, run.state["task"])
    away = weights.flat - m["quadratic"]["centre"]
    torch.testing.assert_close(pull, 3.0 * m["quadratic"]["precision"] * away)
    stiff = (m["quadratic"]["precision"] > 0) & (away != 0)
    assert stiff.any() and (pull[stiff].sign() == away[stiff].sign()).all()


def test_a_very_strong_spring_lets_only_free_weights_move():
    """The quadratic problem again, λ = 1e6: its stationary point is the anchor but where the old task has no use."""
    curvature = torch.tensor([[1.0, 0.0, 0.5], [2.0, 1.0, 3.0]], dtype=DOUBLE)
    optimum = torch.tensor([[1.0, -1.0, 2.0], [0.0, 2.0, 5.0]], dtype=DOUBLE)
    strength = torch.tensor(1e6, dtype=DOUBLE)
    m = {"quadratic": add_quadratic(zero_quadratic(optimum[0]), curvature[0], optimum[0]), "strength": strength}
    stiffness = strength * curvature[0]
    theta = (stiffness * optimum[0] + curvature[1] * optimum[1]) / (stiffness + curvature[1])
    gradient = curvature[1] * (theta - optimum[1])
    p, task = {"weights": Packed.of({"w": theta}, 0)}, {"index": torch.ones((), dtype=torch.int64)}
    total = EWC(strength=1e6).grads(None, Gradients(gradient, gradient), p, m, task)
    assert total.abs().max() < 1e-8
    torch.testing.assert_close(theta, torch.tensor([1.0, 2.0, 2.0], dtype=DOUBLE), rtol=0, atol=2e-5)
    assert (curvature[0] * (theta - optimum[0]).square()).sum() < 1e-9  # the old task's loss


def test_the_quadratic_of_a_run_is_made_of_its_tasks_fisher_informations():
    run = trained(EWC(strength=1.0, samples=1000), count=1)
    agent, state = run.agent, run.state
    batch = run.agent.draw(state, run.world, 1000)

    def logits(p, batch, ctx):
        return agent.logits(p, batch, ctx)

    expected = categorical_fisher(logits, state["params"], batch, 1)
    found = state["methods"]["ewc"]["quadratic"]
    torch.testing.assert_close(found["precision"], expected)
    torch.testing.assert_close(
        found["centre"][expected > 0], Packed.of(state["params"]["weights"], 1).flat[expected > 0]
    )


@pytest.mark.parametrize("kind", ["exact", "sample", "empirical"])
def test_an_agents_information_is_of_its_policy_alone_and_the_kinds_agree_on_average(kind):
    import rlmeta as rl

    run = rl.train(
        rl.PPO(num_envs=4, num_steps=16, batch_size=64, hidden_sizes=(4,)), "CartPole-v1", steps=64, progress=False
    )
    batch = run.agent.draw(run.state, run.world, 4000)
    key = random.make_keys([3])
    exact = information(run.agent, run.state["params"], batch, 1, "exact", key)
    found = Packed.view(
        information(run.agent, run.state["params"], batch, 1, kind, key), run.state["params"]["weights"], 1
    )
    for name, value in found.items():
        assert (value.sum() > 0) == name.startswith("policy."), name
    total = torch.cat([v.flatten(1) for v in found.values()], -1)
    big = exact > exact.max() / 10
    torch.testing.assert_close(total[big], exact[big], rtol=0.2, atol=0)
