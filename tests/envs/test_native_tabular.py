"""Tabular environments: tables equal to gymnasium's, known optima, sampling, and MDPs from arrays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.envs.native import NATIVE, CliffWalking, FrozenLake, GridWorld, NativeWorld, Tabular, TabularMDP
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional.random import make_keys

PAIRS: list[tuple[str, dict[str, Any], Tabular]] = [
    ("FrozenLake-v1", {}, FrozenLake()),
    ("FrozenLake-v1", {"is_slippery": False}, FrozenLake(is_slippery=False)),
    ("FrozenLake8x8-v1", {}, FrozenLake(map_name="8x8", max_episode_steps=200)),
    ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}, FrozenLake(map_name="8x8", is_slippery=False)),
    (
        "FrozenLake-v1",
        {"desc": ["SFH", "FSG"], "success_rate": 0.7, "reward_schedule": (3, -1.1, -0.1)},
        FrozenLake(desc=["SFH", "FSG"], success_rate=0.7, reward_schedule=(3, -1.1, -0.1)),
    ),
    ("CliffWalking-v1", {}, CliffWalking()),
    ("CliffWalking-v1", {"is_slippery": True}, CliffWalking(is_slippery=True)),
]


def optimum(env: Tabular, horizon: int, discount: float = 1.0) -> Tensor:
    """Value `[S]` of the optimal policy over `horizon` steps."""
    going_on, reward = env.dynamics()
    value = torch.zeros(len(reward), dtype=torch.float64)
    for _ in range(horizon):
        value = (reward + discount * going_on @ value).amax(-1)
    return value


@pytest.mark.parametrize(("name", "settings", "env"), PAIRS)
def test_tables_equal_gymnasium(name: str, settings: dict[str, Any], env: Tabular) -> None:
    reference = gym.make(name, **settings)
    inner: Any = reference.unwrapped
    assert env.observation_space == inner.observation_space and env.action_space == inner.action_space
    assert reference.spec is not None and env.max_episode_steps == reference.spec.max_episode_steps
    probability, next_state, reward, terminated, start = env.tables
    np.testing.assert_allclose(start, inner.initial_state_distrib, atol=1e-15)
    for state, by_action in inner.P.items():
        for action, outcomes in by_action.items():
            theirs: Counter = Counter()
            for p, to, r, end in outcomes:
                theirs[int(to), float(r), bool(end)] += p
            ours: Counter = Counter()
            for k in range(probability.shape[-1]):
                at = state, action, k
                ours[int(next_state[at]), float(reward[at]), bool(terminated[at])] += float(probability[at])
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[outcome] - theirs[outcome]) < 1e-12 for outcome in ours)


@pytest.mark.parametrize(("name", "settings", "env"), PAIRS)
def test_dynamics_equal_gymnasium(name: str, settings: dict[str, Any], env: Tabular) -> None:
    inner: Any = gym.make(name, **settings).unwrapped
    going_on, reward = env.dynamics()
    for state, by_action in inner.P.items():
        for action, outcomes in by_action.items():
            expected = np.zeros(len(reward))
            for p, to, _, end in outcomes:
                expected[to] += p * (not end)
            np.testing.assert_allclose(going_on[state, action], expected, atol=1e-12)
            np.testing.assert_allclose(reward[state, action], sum(p * r for p, _, r, _ in outcomes), atol=1e-12)


@pytest.mark.parametrize(("name", "settings", "env"), PAIRS)
def test_steps_equal_gymnasium_for_the_same_uniform_number(name: str, settings: dict[str, Any], env: Tabular) -> None:
    inner: Any = gym.make(name, **settings).unwrapped
    inner.reset(seed=0)
    rng = np.random.default_rng(0)
    count = 1500
    state = rng.integers(env.observation_space.n, size=count)
    action, noise = rng.integers(4, size=count), rng.random(count)

    class Fixed:
        def random(self) -> float:
            return self.value

    inner.np_random = Fixed()
    columns: Any = torch.empty(count, 0) if env.step_noise == 0 else torch.tensor(noise)[:, None]
    new, reward, terminated = env.step({"state": torch.tensor(state)}, torch.tensor(action), columns, {})
    for i in range(count):
        inner.s, inner.np_random.value = int(state[i]), noise[i]
        to, r, end, _, _ = inner.step(int(action[i]))
        if len(inner.P[int(state[i])][int(action[i])]) == 3 or env.step_noise == 0:  # else an absorbing state
            assert env.observe(new)[i] == to
        assert reward[i] == np.float32(r) and bool(terminated[i]) == end


def test_the_registry_states_the_optima_of_frozen_lake() -> None:
    """gymnasium/envs/__init__.py: 0.74 in 100 steps, 0.91 in 200."""
    assert round(optimum(NATIVE["FrozenLake-v1"], 100)[0].item(), 2) == 0.74
    assert round(optimum(NATIVE["FrozenLake8x8-v1"], 200)[0].item(), 2) == 0.91
    assert optimum(FrozenLake(is_slippery=False), 6)[0] == 1 and optimum(FrozenLake(is_slippery=False), 5)[0] == 0


def test_the_best_walk_along_the_cliff_costs_13() -> None:
    assert optimum(CliffWalking(), 100)[36] == -13


def test_grid_world_has_the_utilities_of_the_textbook() -> None:
    """Russell and Norvig, Artificial Intelligence, figure 17.3."""
    expected = [[0.812, 0.868, 0.918], [0.762, None, 0.660], [0.705, 0.655, 0.611, 0.388]]
    value = optimum(GridWorld(), 200).reshape(3, 4)
    for row, line in enumerate(expected):
        for column, utility in enumerate(line):
            if utility is not None:
                assert value[row, column].item() == pytest.approx(utility, abs=6e-4)


def test_grid_world_options() -> None:
    env = GridWorld(("S.", "#G"), slip=0.0, step_reward=-0.5, goal_reward=2.0)
    world = NativeWorld(env, (), 1)
    state = world.reset(make_keys([0])[0])
    seen = []
    for action in (2, 3, 1, 2):  # against the wall, against the border, right, down into the goal
        state, transition = world.step(state, torch.tensor([action]))
        seen.append((int(transition.next_observation), float(transition.reward), bool(transition.terminated)))
    assert seen == [(0, -0.5, False), (0, -0.5, False), (1, -0.5, False), (3, 1.5, True)]
    trap = GridWorld(("SH",), slip=0.0, trap_reward=-3.0)
    _, transition = NativeWorld(trap).step(NativeWorld(trap).reset(make_keys([0])[0]), torch.tensor([1]))
    assert transition.terminated.item() and transition.reward.item() == pytest.approx(-3.04)
    anywhere = GridWorld((".#", ".G"))
    assert anywhere.tables.start.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_slipping_frequencies() -> None:
    """20,000 steps right from the middle: ahead with probability 0.6, to either side with 0.2; 5 sigma is 0.018."""
    env = GridWorld(("...", ".S.", "..."), slip=0.4)
    world = NativeWorld(env, (), 20_000)
    _, transition = world.step(world.reset(make_keys([0])[0]), torch.ones(20_000, dtype=torch.int64))
    share = torch.bincount(transition.next_observation, minlength=9) / 20_000
    torch.testing.assert_close(share, torch.tensor([0, 0.2, 0, 0, 0, 0.6, 0, 0.2, 0]), atol=0.018, rtol=0)


@pytest.mark.parametrize(("env", "name"), [(FrozenLake(), "success_rate"), (GridWorld(slip=0.5), "slip")])
def test_the_rate_of_slipping_may_differ_by_row(env: Tabular, name: str) -> None:
    """Physics 1 and 0: always or never in the intended direction."""
    count = 300
    rate = torch.tensor([1.0, 0.0], dtype=torch.float64)
    world = NativeWorld(env, (2,), count, {name: rate})
    state = world.reset(make_keys([0, 1]))
    state["env"]["state"].fill_(8 if name == "slip" else 4)
    up = 0 if name == "slip" else 3
    _, transition = world.step(state, torch.full((2, count), up))
    meant = transition.next_observation == (4 if name == "slip" else 0)
    certain, never = (1, 0) if name == "slip" else (0, 1)
    assert meant[certain].all() and not meant[never].any()
    assert len(transition.next_observation[never].unique()) == 2


@given(seed=st.integers(0, 2**31), states=st.integers(1, 5), actions=st.integers(1, 4), expected=st.booleans())
def test_arrays_become_their_mdp(seed: int, states: int, actions: int, expected: bool) -> None:
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states, 0.5), (states, actions))
    R = rng.normal(size=(states, actions) if expected else (states, actions, states))
    terminal = rng.random(states) < 0.3
    terminal[0] = False
    env = TabularMDP(P, R, terminal)
    going_on, reward = env.dynamics()
    np.testing.assert_allclose(going_on, P * ~terminal, atol=1e-12)
    np.testing.assert_allclose(reward, R if expected else (P * R).sum(-1), atol=1e-9)
    np.testing.assert_allclose(env.tables.start, ~terminal / (~terminal).sum())
    noise = rng.random(50)
    state, action = rng.integers(states, size=50), rng.integers(actions, size=50)
    new, got, ended = env.step(
        {"state": torch.tensor(state)}, torch.tensor(action), torch.tensor(noise)[:, None][:, : env.step_noise], {}
    )
    for i in range(50):
        to = int((P[state[i], action[i]].cumsum() > noise[i]).argmax())
        assert new["state"][i] == to and bool(ended[i]) == terminal[to]
        assert got[i] == np.float32(R[state[i], action[i]] if expected else R[state[i], action[i], to])


def test_every_table_may_differ_by_row() -> None:
    rng = np.random.default_rng(0)
    envs = [
        TabularMDP(rng.dirichlet(np.ones(3), (3, 2)), rng.normal(size=(3, 2)), torch.tensor([False, True, i == 0]))
        for i in range(4)
    ]
    physics = {name: torch.stack([e.tables._asdict()[name] for e in envs]) for name in envs[0].tables._fields}
    world = NativeWorld(envs[0], (4,), 4, physics)
    keys = make_keys(range(4))
    state = world.reset(keys)
    alone = [NativeWorld(env, (4,), 4) for env in envs]
    states = [w.reset(keys) for w in alone]
    for step in range(20):
        action = torch.randint(2, (4, 4), generator=torch.Generator().manual_seed(step))
        state, transition = world.step(state, action)
        for i, w in enumerate(alone):
            states[i], own = w.step(states[i], action)
            for a, b in zip(transition, own):
                assert torch.equal(a[i], b[i])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda p: sum(p) > 1e-3))
def test_an_impossible_outcome_is_never_drawn(weights: list[float]) -> None:
    """Not even by the largest uniform number, when rounding leaves the probabilities short of one."""
    start = torch.tensor(weights, dtype=torch.float64)
    start = start / start.sum()
    n = len(weights)
    env = TabularMDP(start.expand(n, 1, n), torch.zeros(n, 1), start=start)
    noise = torch.tensor([[2.0**-53], [1 - 2.0**-53]], dtype=torch.float64)
    first = env.reset(noise, {})["state"]
    assert (start[first] > 0).all()
    after, _, _ = env.step({"state": first}, torch.zeros_like(first), noise, {})
    assert (start[after["state"]] > 0).all()
    rows = {"probability": env.tables.probability.expand(2, n, 1, n), "start": start.expand(2, n)}
    assert torch.equal(env.reset(noise, rows)["state"], first)
    assert torch.equal(env.step({"state": first}, torch.zeros_like(first), noise, rows)[0]["state"], after["state"])


def test_mistakes_are_named() -> None:
    even, none = torch.full((2, 1, 2), 0.5), torch.zeros(2, 1)
    with pytest.raises(SettingError, match=r"P has shape \(2, 2\): expected \[states, actions, states\]"):
        TabularMDP(torch.eye(2), none)
    with pytest.raises(SettingError, match=r"R has shape \(2,\): expected \(2, 1\) or \(2, 1, 2\)"):
        TabularMDP(even, torch.zeros(2))
    with pytest.raises(SettingError, match=r"terminal has shape \(3,\): expected \(2,\)"):
        TabularMDP(even, none, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(SettingError, match="P has rows that are no probabilities"):
        TabularMDP(even * 0.9, none)
    with pytest.raises(SettingError, match="P has rows that are no probabilities"):
        TabularMDP(torch.tensor([[[1.5, -0.5]], [[0.5, 0.5]]]), none)
    with pytest.raises(SettingError, match="start has rows that are no probabilities"):
        TabularMDP(even, none, start=torch.tensor([0.5, 0.4]))
    with pytest.raises(SettingError, match="start has rows"):
        TabularMDP(even, none, terminal=torch.ones(2, dtype=torch.bool))
    with pytest.raises(UnknownNameError, match="unknown map '5x5'"):
        FrozenLake(map_name="5x5")
    with pytest.raises(SettingError, match="rows of equal length"):
        FrozenLake(desc=["SF", "G"])
    with pytest.raises(SettingError, match="at least one S"):
        FrozenLake(desc=["FF", "FG"])
    with pytest.raises(SettingError, match=r"success_rate=1\.5"):
        FrozenLake(success_rate=1.5)
    with pytest.raises(SettingError, match="three numbers"):
        FrozenLake(reward_schedule=(1, 0))
    with pytest.raises(SettingError, match="layout"):
        GridWorld(("Sx",))
    with pytest.raises(SettingError, match="a cell to start from"):
        GridWorld(("#G",))
    with pytest.raises(SettingError, match="slip=-1"):
        GridWorld(slip=-1)
    with pytest.raises(UnknownNameError, match="success_rate"):
        NativeWorld(FrozenLake(is_slippery=False), (), 1, {"success_rate": 0.5})
