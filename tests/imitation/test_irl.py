"""Maximum causal entropy IRL: exact visits are matched, gradients are the likelihood's, batched equals looped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.native import TabularMDP
from rlmeta.errors import DemonstrationError, SettingError, SpaceError
from rlmeta.functional import tabular, tree
from rlmeta.imitation.irl import demonstrated_visits
from rlmeta.learning.gradients import StepContext
from tests.agents.worlds import start
from tests.functional.test_tabular import grid5

P5, REWARD5 = grid5()
GRID = TabularMDP(P=P5, R=REWARD5.expand(4, -1).T, start=torch.eye(25, dtype=torch.float64)[0], max_episode_steps=15)


def walks(lengths: tuple[int, ...] = (3, 2), states: int = 25, actions: int = 4) -> Demonstrations:
    """Episodes that visit states 0, 1, 2, ... in order."""
    steps = sum(lengths)
    return Demonstrations(
        observation=torch.arange(steps + len(lengths)) % states,
        action=torch.zeros(steps, dtype=torch.int64),
        reward=torch.zeros(steps),
        lengths=torch.tensor(lengths),
        terminated=torch.zeros(len(lengths), dtype=torch.bool),
        truncated=torch.ones(len(lengths), dtype=torch.bool),
        observation_space=gym.spaces.Discrete(states),
        action_space=gym.spaces.Discrete(actions),
    )


def fitted(settings: rl.IRL, iterations: int, reward: Tensor = REWARD5, seeds: int | list[int] = 2) -> tuple[Any, Any]:
    """(agent, state) after matching the exact visits of the soft policy of a reward."""
    agent, state, world = start(settings, rl.task(GRID), seeds)
    agent.cut = torch.zeros_like(agent.cut)
    agent.visits = agent.policy_visits(agent.plan(reward))
    for i in range(iterations):
        state["progress"] = torch.full_like(state["progress"], i / iterations)
        state, metrics = agent.iterate(state, world)
    assert metrics["losses/visits_difference"].shape == state["key"].shape
    return agent, state


@pytest.mark.parametrize(("horizon", "gamma"), [(15, 1.0), (15, 0.9), (0, 0.9)])
def test_the_visits_of_the_demonstrator_are_matched_and_its_policy_is_as_good(horizon, gamma):
    settings = rl.IRL(walks(), horizon=horizon, gamma=gamma, learning_rate=0.1, num_steps=50)
    agent, state = fitted(settings, 4)
    plan = agent.plan(agent.reward(state["params"]))
    torch.testing.assert_close(agent.policy_visits(plan), agent.visits.expand(2, -1), rtol=0, atol=1e-2)
    value = tabular.policy_value_horizon if horizon else tabular.policy_value
    policies = agent.plan(REWARD5).log_policy.exp(), plan.log_policy.exp()
    expected, found = (value(P5, REWARD5[:, None], pi, gamma)[..., 0] for pi in policies)
    assert (expected - found).abs().max() < 1e-2  # the expected value difference under the true reward


@pytest.mark.parametrize("terminal", [None, torch.arange(25) > 21], ids=["endless", "ends"])
def test_the_gradient_is_that_of_the_likelihood(terminal):
    """With the probabilities of the demonstrator's actions known, autograd through planning gives the same numbers."""
    grid = TabularMDP(P=P5, R=REWARD5.expand(4, -1).T, start=GRID.start, terminal=terminal, max_episode_steps=15)
    agent, state, _ = start(rl.IRL(walks(), horizon=6, gamma=0.8), rl.task(grid), 1)
    demonstrator = agent.plan(REWARD5).log_policy.exp()
    visits = tabular.occupancy(agent.P, agent.start, demonstrator)[:-1].unsqueeze(-1) * demonstrator
    agent.visits = agent.policy_visits(agent.plan(REWARD5))
    p = {**state["params"], "weights": {n: w.clone().requires_grad_() for n, w in state["params"]["weights"].items()}}
    ours = agent.losses(p, {"visits": agent.visits.expand(1, -1)}, StepContext())["reward"].sum()
    exact = -tabular.causal_log_likelihood(visits, agent.plan(agent.reward(p)).log_policy, 0.8).sum()
    for a, b in zip(*(torch.autograd.grad(loss, list(p["weights"].values())) for loss in (ours, exact))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ends", [False, True])
def test_demonstrations_cut_by_a_time_limit_say_nothing_of_what_would_have_come(ends):
    """The gradient is that of the likelihood of what was done, where transitions are certain to the last digit."""
    steps = torch.tensor([[max(0, s - 1), min(4, s + 1)] for s in range(5)])
    chain = TabularMDP(
        P=torch.nn.functional.one_hot(steps, 5).double(),
        R=torch.zeros(5, 2, dtype=torch.float64),
        start=torch.eye(5, dtype=torch.float64)[0],
        terminal=torch.tensor([False, False, False, ends, False]),
        max_episode_steps=9,
    )
    done = replace(
        walks((2, 3), 5, 2),
        observation=torch.tensor([0, 1, 2, 0, 1, 2, 3]),
        action=torch.ones(5, dtype=torch.int64),
        terminated=torch.tensor([False, ends]),
        truncated=torch.tensor([True, not ends]),
    )
    agent, state, _ = start(rl.IRL(done, gamma=0.9), rl.task(chain), 1)
    table = torch.linspace(-0.5, 0.7, 5, dtype=torch.float64)[None].requires_grad_()
    agent.reward = lambda p, ctx=None: table
    ours = agent.losses(state["params"], {"visits": agent.visits.expand(1, -1)}, StepContext())["reward"].sum()
    log_policy = agent.plan(table).log_policy[0]
    exact = -sum(0.9**t * log_policy[t, 1] for length in (2, 3) for t in range(length)) / 2
    (a,), (b,) = (torch.autograd.grad(loss, table) for loss in (ours, exact))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_network_that_sees_only_the_distance_explains_a_reward_of_it():
    """Deep MaxEnt: a reward of the distance to the goal, learned from features of it by a hidden layer."""

    class Distance(torch.nn.Module):
        def forward(self, observation: Tensor) -> Tensor:
            state = observation.long()
            distance = (8 - state // 5 - state % 5).float() / 8
            return torch.stack((distance, distance**2, (distance == 0).float()), -1)

    reward = torch.tensor([1.0 if s == 24 else -0.05 * (8 - s // 5 - s % 5) for s in range(25)], dtype=torch.float64)
    settings = rl.IRL(walks(), gamma=0.9, learning_rate=0.05, num_steps=50, network=lambda space: Distance())
    agent, state = fitted(settings, 4, reward)
    found = agent.policy_visits(agent.plan(agent.reward(state["params"])))
    torch.testing.assert_close(found, agent.visits.expand(2, -1), rtol=0, atol=2e-2)


def test_demonstrated_visits_are_counted_by_hand():
    # episode one acts in 0, 1, 2 and is cut in 3; episode two acts in 4, 5 and ends in 6
    made = replace(walks(), terminated=torch.tensor([False, True]), truncated=torch.tensor([True, False]))
    for horizon, by_hand in (
        (0, [1, 0.5, 0.25, 0, 1, 0.5, 0.25]),
        (2, [1, 0.5, 0, 0, 1, 0.5, 0.25]),
        (1, [1, 0, 0, 0, 1, 0, 0]),
    ):
        assert (2 * demonstrated_visits(made, 25, horizon, 0.5)[:7]).tolist() == by_hand


@pytest.mark.parametrize("horizon", [0, 4])
def test_learners_do_not_see_each_other(horizon):
    settings = rl.IRL(walks(), horizon=horizon, learning_rate=0.1, num_steps=3)
    _, one = fitted(settings, 2, seeds=[0, 1])
    _, other = fitted(settings, 2, seeds=[0, 7])
    for a, b in zip(tree.leaves(one["params"]["weights"]), tree.leaves(other["params"]["weights"])):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


def test_the_policy_acts_by_its_time_and_its_probabilities():
    agent, state, _ = start(rl.IRL(walks(), horizon=3, gamma=1.0), rl.task(GRID), 2)
    p = {**state["params"], "log_policy": torch.randn(2, 3, 25, 4, dtype=torch.float64).log_softmax(-1)}
    memory = agent.initial_memory(p, (2, 2))
    seen = torch.tensor([[0, 7], [24, 3]])
    for time in (0, 1, 2, 2):
        action, memory = agent.act(p, seen, memory, state["key"], deterministic=True)
        expected = [[int(p["log_policy"][i, time, seen[i, j]].argmax()) for j in range(2)] for i in range(2)]
        assert action.tolist() == expected
    counts = torch.zeros(4)
    memory = {"time": torch.zeros(2, 4000, dtype=torch.int64)}
    sampled, _ = agent.act(p, torch.full((2, 4000), 5), memory, state["key"])
    counts = torch.bincount(sampled[1], minlength=4) / 4000
    torch.testing.assert_close(counts.double(), p["log_policy"][1, 0, 5].exp(), rtol=0, atol=0.03)


def test_a_recorded_run_is_explained_and_imitated(tmp_path):
    """From episodes of a trained agent on a stochastic grid, with terminal states: as good as its demonstrator."""
    expert = rl.train(rl.A2C(learning_rate=3e-3), "GridWorld-v0", steps=20_000, seeds=1)
    made = rl.record(expert, 300, deterministic=False)
    budget = rl.Budget(steps=400, eval_every=4000, final_episodes=512)
    run = rl.train(rl.IRL(made, gamma=0.95, num_steps=20), "GridWorld-v0", seeds=2, budget=budget, out=tmp_path / "run")
    assert (run.scores > float(made.returns.mean()) - 0.1).all()
    for own in (None, {"demonstrations": made}):
        again = rl.load(tmp_path / "run", own=own)
        assert torch.equal(again.evaluate(8).returns, run.evaluate(8).returns)
    with pytest.raises(SettingError, match=r"pass it again as own=\{'demonstrations'"):
        rl.resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "task", "error", "message"),
    [
        ({}, "GridWorld-v0", DemonstrationError, "nothing to imitate"),
        ({"demonstrations": walks()}, "GridWorld-v0", DemonstrationError, "have observation space Discrete"),
        ({"demonstrations": walks()}, "CartPole-v1", SpaceError, "use GAIL"),
        ({"demonstrations": walks(states=16)}, rl.task("FrozenLake-v1", native=False), SettingError, "known dynamics"),
    ],
)
def test_what_has_no_known_dynamics_or_other_states_is_refused(settings, task, error, message):
    with pytest.raises(error, match=message):
        start(rl.IRL(**settings), task)


def test_an_endless_sum_is_refused():
    with pytest.raises(SettingError, match="gamma is 1 without a horizon"):
        rl.IRL(gamma=1.0)
