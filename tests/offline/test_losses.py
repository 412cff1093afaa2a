"""The losses of offline learners against closed forms and plain loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import pytest
import torch

from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.nn import Context
from rlmeta.nn.encoder import Encoder
from rlmeta.offline.cql import conservative_penalty
from rlmeta.offline.fixed_data import minibatch
from rlmeta.offline.iql import expectile_loss
from rlmeta.offline.td3_bc import normalised_policy_loss
from tests.agents.worlds import start
from tests.offline.data import SETTINGS, recorded

TORQUE = "Pendulum-v1"


@pytest.fixture(autouse=True)
def encoders_give_float64(monkeypatch):
    monkeypatch.setattr(Encoder.__init__, "__defaults__", (torch.float64,))


def double(x: Any) -> Any:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)


def in_double(name: str, seeds: int = 3, size: int = 3, action_space: Any = None, **own: Any) -> tuple[Any, Any, Any]:
    """Agent, parameters and a minibatch of as many samples as learners, in float64."""
    discrete = isinstance(action_space, gym.spaces.Discrete)
    given = recorded(action_space=action_space) if discrete else recorded()
    agent, state, _ = start(SETTINGS[name](given, **own), _task(discrete), seeds)
    for copy in agent.copies:  # targets that differ from what they follow
        for leaf in copy.sources(state["params"]["weights"], state["params"]["buffers"]):
            state["params"]["buffers"][leaf] = state["params"]["buffers"][leaf] + 0.1
    p = state["params"]
    p = double({**p, "weights": dict(p["weights"])})
    p["hyper"] |= {
        field: torch.full((seeds,), value, dtype=torch.float64) for field, value in own.items() if field in p["hyper"]
    }
    keys = random.fold(state["key"], 5)
    if name == "decision_transformer":
        return agent, p, double(agent.windows(keys, size))
    return agent, p, double(minibatch(agent.transitions, keys, size, p["hyper"]["gamma"].float()))


def _task(discrete: bool) -> Any:
    import rlmeta as rl

    return rl.task(_Spaces, name="spaces") if discrete else TORQUE


class _Spaces(gym.Env):
    observation_space, action_space = recorded().observation_space, gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return torch.zeros(3).numpy(), {}


def losses_of(agent: Any, p: Any, batch: Any, seeds: list[int]) -> dict[str, Any]:
    return agent.losses(p, batch, StepContext(key=random.fold(random.make_keys(seeds), 9)))


# ------------------------------------------------------------------------------------------------ data


def test_a_truncated_end_bootstraps_from_its_own_last_observation_and_a_terminated_one_does_not():
    given = recorded()
    batch = minibatch(given.transitions(), random.make_keys([0, 1]), 300, torch.tensor([0.9, 0.5]))
    row = batch["observation"][..., 0]
    assert torch.equal(batch["next_observation"][..., 0], row + 1), "nothing reaches into another episode"
    assert set(row.flatten().tolist()) == set(range(15)) - {5, 9, 14}, "what follows a last step is no step"
    ends = (row == 4) | (row == 13)  # the steps that terminate; the one before row 9 was cut by a time limit
    assert torch.equal(batch["discount"], torch.tensor([[0.9], [0.5]]) * ~ends)
    assert bool((row == 8).any()) and not torch.equal(batch["action"][0], batch["action"][1])


# ------------------------------------------------------------------------------------------------ closed forms


def test_the_expectile_loss_is_a_loop_and_its_minimum_the_expectile():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    level = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = expectile_loss(prediction, target, level)
    for i in range(3):
        errors = [float(t - v) for v, t in zip(prediction[i], target[i])]
        by_hand = [(1 - float(level[i]) if u < 0 else float(level[i])) * u**2 for u in errors]
        assert float(found[i]) == pytest.approx(sum(by_hand) / 5, rel=1e-12)
    assert float(found[1]) == pytest.approx(0.5 * float((prediction[1] - target[1]).square().mean()), rel=1e-12)
    # of targets 0 and 1 the t-expectile is t
    value = torch.full((1, 2), 0.9, dtype=torch.float64, requires_grad=True)
    expectile_loss(value, torch.tensor([[0.0, 1.0]], dtype=torch.float64), 0.9).sum().backward()
    assert float(value.grad.sum()) == pytest.approx(0.0, abs=1e-12)


def test_the_conservative_penalty_is_the_integral_over_actions():
    """With actions at the midpoints of small intervals, importance sampling is a sum of rectangles."""
    cells = 20_000
    action = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 - 1
    q, shown = (-3 * (action - 0.2).square()).expand(1, 2, cells), torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    normal = math.sqrt(math.pi / 3) / 2 * (math.erf(math.sqrt(3) * 0.8) + math.erf(math.sqrt(3) * 1.2))
    uniform = torch.full((cells,), -math.log(2.0), dtype=torch.float64)
    assert float(conservative_penalty(q, shown, uniform)) == pytest.approx(math.log(normal) + 0.25, abs=1e-7)
    # drawn from another density, f(a) = (1 + a) / 2, by its quantiles
    quantile = 2 * ((action + 1) / 2).sqrt() - 1
    other = (-3 * (quantile - 0.2).square()).expand(1, 2, cells)
    assert float(conservative_penalty(other, shown, ((1 + quantile) / 2).log())) == pytest.approx(
        math.log(normal) + 0.25, abs=1e-2
    )
    # of Discrete actions it is exact, and its gradient is the soft choice less that of the data
    few = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    conservative_penalty(few, few[..., 2], None).sum().backward()
    assert torch.allclose(few.grad, few.detach().softmax(-1) - torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_the_policys_loss_is_in_units_of_the_values():
    q = torch.tensor([[1.0, -3.0, 5.0], [10.0, -30.0, 50.0]], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([2.5, 2.5], dtype=torch.float64)
    found = normalised_policy_loss(q, alpha)
    assert torch.allclose(found, torch.full((2,), -2.5 * 1.0 / 3.0, dtype=torch.float64))
    found.sum().backward()
    assert torch.allclose(q.grad, torch.tensor([[-2.5 / 9], [-2.5 / 90]], dtype=torch.float64).expand(2, 3))
    assert torch.equal(normalised_policy_loss(torch.zeros(1, 2), 2.5), torch.zeros(1))


# ------------------------------------------------------------------------------------------------ whole losses


@pytest.mark.parametrize("name", SETTINGS)
def test_learners_together_equal_each_alone(name):
    """As many samples as learners, so that no axis can be taken for another."""
    agent, p, batch = in_double(name)
    together = losses_of(agent, p, batch, [0, 1, 2])
    for i in range(3):
        own = [tree.map(lambda leaf, i=i: leaf[i : i + 1], part) for part in (p, batch)]
        for term, value in losses_of(agent, own[0], own[1], [i]).items():
            torch.testing.assert_close(value[0], together[term][i], rtol=1e-11, atol=1e-11)


def test_td3_bc_is_td3_and_squared_errors():
    agent, p, batch = in_double("td3_bc", seeds=1, size=4, alpha=1.5)
    found = losses_of(agent, p, batch, [0])
    theirs = agent.td3.losses(p, batch, StepContext(key=random.fold(random.make_keys([0]), 9)))
    assert torch.equal(found["critic"], theirs["critic"])
    mean = agent.forward(agent.policy, "policy", p, batch["observation"])["mean"]
    q = agent.td3.values(p, "q", batch["observation"], 2 * mean, Context())[:, 0]
    cloning = sum(float(m - a / 2) ** 2 for m, a in zip(mean.flatten(), batch["action"].flatten())) / 4
    expected = -1.5 / float(q.abs().mean()) * float(q.mean()) + cloning
    assert float(found["actor"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("action_space", [None, gym.spaces.Discrete(3)])
def test_iql_by_hand(action_space):
    agent, p, batch = in_double("iql", 1, 6, action_space, beta=2.0, expectile=0.8, largest_weight=1.1)
    found = losses_of(agent, p, batch, [0])
    q, target = (agent.values(p, name, batch["observation"], batch["action"], Context())[0] for name in ("q", "target"))
    value, after = (
        agent.forward(agent.value, "value", p, batch[name])[0] for name in ("observation", "next_observation")
    )
    policy = agent.forward(agent.policy, "policy", p, batch["observation"])
    log_prob = agent.head.log_prob(policy, batch["action"])[0]
    terms = {"value": 0.0, "critic": 0.0, "actor": 0.0}
    weights = []
    for i in range(6):
        advantage = float(min(target[0, i], target[1, i]) - value[i])
        terms["value"] += (0.8 if advantage > 0 else 0.2) * advantage**2 / 6
        y = float(batch["reward"][0, i] + batch["discount"][0, i] * after[i])
        terms["critic"] += sum((float(q[c, i]) - y) ** 2 for c in range(2)) / 6
        weights.append(min(math.exp(2.0 * advantage), 1.1))
        terms["actor"] -= weights[-1] * float(log_prob[i]) / 6
    assert len(set(weights)) > 2 and max(weights) == 1.1
    for name, expected in terms.items():
        assert float(found[name]) == pytest.approx(expected, rel=1e-10), name


def test_iqls_policy_reaches_no_value_and_its_value_no_policy():
    agent, p, batch = in_double("iql", 1, 4)
    leaves = {name: leaf.requires_grad_() for name, leaf in p["weights"].items()}
    found = losses_of(agent, {**p, "weights": leaves}, batch, [0])
    for term, group in (("value", "value."), ("critic", "q."), ("actor", "policy.")):
        slopes = torch.autograd.grad(found[term].sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        moved = {name for name, slope in zip(leaves, slopes) if slope is not None and bool(slope.any())}
        assert moved and all(name.startswith(group) for name in moved), term


@pytest.mark.parametrize("action_space", [None, gym.spaces.Discrete(3)])
def test_cql_is_sac_and_the_penalty(action_space):
    agent, p, batch = in_double("cql", 1, 4, action_space, conservative_weight=3.0)
    found = losses_of(agent, p, batch, [0])
    key = random.fold(random.make_keys([0]), 9)
    theirs = agent.sac.losses(p, batch, StepContext(key=key))
    if action_space is None:
        q, log_density = agent.sampled_values(p, batch, random.fold(key, "conservative"), Context())
        log_ratio = q - log_density
    else:
        log_ratio = agent.sac.values(p, "q", batch["observation"], None, Context()) + math.log(3)
    shown = agent.sac.values(p, "q", batch["observation"], batch["action"], Context())
    penalty = 0.0
    for critic in range(2):
        for i in range(4):
            mean = sum(math.exp(float(x)) for x in log_ratio[0, critic, i]) / log_ratio.shape[-1]
            penalty += (math.log(mean) - float(shown[0, critic, i])) / 4
    assert float(found["critic"] - theirs["critic"]) == pytest.approx(3.0 * penalty, rel=1e-9)
    assert torch.equal(found["actor"], theirs["actor"]) and torch.equal(found["temperature"], theirs["temperature"])


def test_cqls_draws_have_the_densities_that_are_said(monkeypatch):
    """Each action is valued in its own state, and its density is that of the policy there or in the next state."""
    agent, p, batch = in_double("cql", 2, 3)
    taken = []
    values = agent.sac.values
    monkeypatch.setattr(agent.sac, "values", lambda *given: taken.append(given) or values(*given))
    q, log_density = agent.sampled_values(p, batch, random.make_keys([0, 1]), Context())
    actions = taken[0][3].reshape(2, 3, 9, 1)
    for n in range(9):
        one = values(p, "q", batch["observation"], actions[:, :, n], Context())
        torch.testing.assert_close(one, q[..., n])
        where = (None, "observation", "next_observation")[n // 3]
        expected = torch.full((2, 3), -math.log(2.0), dtype=torch.float64)
        if where:
            policy = agent.forward(agent.policy, "policy", p, batch[where])
            expected = agent.head.log_prob(policy, actions[:, :, n]) + math.log(2.0)
        torch.testing.assert_close(log_density[:, 0, :, n], expected, rtol=1e-5, atol=1e-5)
    assert len(set(actions.flatten().tolist())) == 54 and float(actions.abs().max()) > 1
