"""Shaping and counts: theorems on tabular tasks, brute force over episodes, every autoreset mode, what is refused."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import GridWorld, TabularMDP
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.functional.returns import generalized_advantage
from rlmeta.functional.tabular import optimal_plan
from rlmeta.learning.collect import collect
from rlmeta.rewards import EpisodicCounts, PotentialShaping
from tests.agents.worlds import start

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))
from tests.envs.counter_env import CounterEnv, schedule, step_and_episode

GAMMA = 0.9


def gamma_of(*values: float) -> dict[str, Any]:
    """The part of a state that shaping reads."""
    return {"params": {"hyper": {"gamma": torch.tensor(values, dtype=torch.float64)}}}


def every_transition(env: Any) -> tuple[dict[str, Tensor], torch.Size]:
    """A rollout `[1, T, 1]` float64 with every state, action and outcome of a tabular task once; and `[S, A, K]`."""
    tables = env.tables
    shape = tables.next_state.shape
    here = torch.arange(shape[0])[:, None, None].expand(shape)
    row = lambda x: x.reshape(1, -1, 1)  # noqa: E731
    return {
        "observation": row(here),
        "next_observation": row(tables.next_state),
        "reward": row(tables.reward),
        "terminated": row(tables.terminated),
        "truncated": torch.zeros_like(row(tables.terminated)),
        "valid": torch.ones_like(row(tables.terminated)),
    }, shape


def optimal_q(env: Any, potential: Tensor, keep_terminal: bool = False) -> Tensor:
    """Q of the task under the rewards that the agent would learn from."""
    rollout, shape = every_transition(env)
    told = {**rollout, "terminated": torch.zeros_like(rollout["terminated"])} if keep_terminal else rollout
    shaping = PotentialShaping(lambda observation: potential[observation])
    _, streams, _ = shaping.relabel(None, gamma_of(GAMMA), {}, told, {"task": rollout["reward"]})
    reward = (env.tables.probability * sum(streams.values()).reshape(shape)).sum(-1)
    return optimal_plan(env.dynamics()[0], reward, GAMMA).q


@pytest.mark.parametrize("seed", range(3))
def test_shaping_moves_q_by_the_potential_and_no_optimal_action(seed):
    env = GridWorld()
    potential = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    plain, shaped = optimal_q(env, torch.zeros_like(potential)), optimal_q(env, potential)
    torch.testing.assert_close(shaped, plain - potential[:, None], rtol=0, atol=1e-10)
    free = [0, 1, 2, 4, 6, 8, 9, 10, 11]  # not the goal, the trap and the wall
    assert torch.equal(shaped.argmax(-1)[free], plain.argmax(-1)[free])


def test_a_potential_kept_at_the_end_would_turn_the_optimal_policy_round():
    """Five states in a row, a reward of 1 for reaching the right end; both ends are terminal."""
    P = torch.zeros(5, 2, 5, dtype=torch.float64)
    for s in range(5):
        P[s, 0, max(s - 1, 0)] = P[s, 1, min(s + 1, 4)] = 1
    R = torch.zeros(5, 2, 5, dtype=torch.float64)
    R[3, 1, 4] = 1
    chain = TabularMDP(P=P, R=R, terminal=torch.tensor([True, False, False, False, True]))
    potential = torch.tensor([10.0, 1, 2, 3, 0], dtype=torch.float64)
    assert optimal_q(chain, potential)[1:4].argmax(-1).tolist() == [1, 1, 1]
    assert optimal_q(chain, potential, keep_terminal=True)[1:4].argmax(-1).tolist() == [0, 0, 0]


KINDS: dict[str, Any] = {
    "loop": lambda: CounterEnv(),
    **{
        mode.value: lambda mode=mode: SyncVectorEnv([CounterEnv] * 4, autoreset_mode=mode)
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)
    },
}


def counter_rollout(kind: str, episodes: int = 5) -> dict[str, Any]:
    """`[2, T, 2]` of the counter environment, until every row saw so many episodes."""
    make = KINDS[kind]
    world = GymnasiumWorld(make if kind == "loop" else make(), (2,), 2)
    state, row, steps = world.reset(random.make_keys([0, 1])), torch.arange(4).view(2, 2), []
    ended = torch.zeros(2, 2, dtype=torch.int64)
    while (ended < episodes).any():
        observation = world.observation(state)
        state, transition = world.step(state, schedule(row, *step_and_episode(observation)))
        kept = {name: value for name, value in transition._asdict().items() if name != "observation"}
        steps.append({**kept, "observation": observation})
        ended += transition.terminated | transition.truncated
    world.close()
    return {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}


def whole(rollout: dict[str, Any], stream: Tensor, episodes: int = 5) -> list[list[float]]:
    """Of each row, the stream at its valid steps within the whole episodes."""
    take = rollout["valid"] & (step_and_episode(rollout["observation"])[1] < episodes)
    return [stream[i, :, j][take[i, :, j]].tolist() for i in range(2) for j in range(2)]


def wavy(observation: Tensor) -> Tensor:
    step, episode = step_and_episode(observation)
    return torch.sin(3 * step + 1.7 * episode) + 0.3 * step


def shaped(rollout: dict[str, Any], *gammas: float) -> Tensor:
    double = {**rollout, "reward": rollout["reward"].double()}
    _, streams, _ = PotentialShaping(wavy).relabel(None, gamma_of(*gammas), {}, double, {"task": double["reward"]})
    return streams["shaping"]


def test_shaping_tells_the_same_story_in_every_autoreset_mode():
    found = {}
    for kind in KINDS:
        rollout = counter_rollout(kind)
        stream = shaped(rollout, 0.9, 0.5)
        assert not stream[~rollout["valid"]].any()
        found[kind] = whole(rollout, stream)
    reference = found.pop("loop")
    assert all(found[kind] == reference for kind in found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_discounted_shaping_of_an_episode_telescopes(kind):
    rollout = counter_rollout(kind)
    stream = shaped(rollout, 0.9, 0.5)
    for row, rewards in enumerate(whole(rollout, stream)):
        gamma, at = (0.9, 0.9, 0.5, 0.5)[row], 0
        for episode in range(5):
            length, cut_kind = 1 + (3 * row + 5 * episode) % 7, 1 + (row + episode) % 3
            total = sum(gamma**t * r for t, r in enumerate(rewards[at : at + length]))
            first, last = (float(wavy(torch.tensor([float(t), float(episode)]))) for t in (0, length))
            assert total == pytest.approx(-first + (gamma**length * last if cut_kind == 2 else 0.0), abs=1e-9)
            at += length


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_do_not_change_where_values_move_by_the_potential(kind):
    rollout = counter_rollout(kind)
    reward, value = rollout["reward"].double(), torch.cos(rollout["observation"].double().sum(-1))
    next_value = torch.cos(rollout["next_observation"].double().sum(-1))
    discount = GAMMA * (~rollout["terminated"]).double()
    cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
    here, there = wavy(rollout["observation"]), wavy(rollout["next_observation"])
    plain = generalized_advantage(reward, discount, value, next_value, cut, 0.8)
    other = generalized_advantage(
        reward + shaped(rollout, GAMMA, GAMMA), discount, value - here, next_value - there, cut, 0.8
    )
    for a, b in zip(whole(rollout, plain), whole(rollout, other)):
        assert a == pytest.approx(b, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", [None, lambda observation: (observation[..., 0] // 2).long()], ids=["rounded", "own"])
def test_counts_equal_a_dictionary_for_every_episode(kind, cell):
    rollout = counter_rollout(kind)
    counts = EpisodicCounts(coefficient=2.0, resolution=3.0, cell=cell, buckets=4096)
    memory = {
        "counts": torch.zeros(2, 2, 4096, dtype=torch.int32),
        "begins": torch.ones(2, 2, dtype=torch.bool),
        "return": torch.zeros(2, 2, dtype=torch.float64),
        "last_return": torch.zeros(2, 2, dtype=torch.float64),
    }
    streams = []
    for part in torch.arange(rollout["reward"].shape[1]).split(3):  # the memory carries over rollouts
        piece = {name: leaf[:, part] for name, leaf in rollout.items()}
        memory, found, metrics = counts.relabel(None, {}, memory, piece, {"task": piece["reward"]})
        streams.append(found["counts"])
        torch.testing.assert_close(metrics["rewards/counts_return"], memory["last_return"].mean(-1))
    same = (lambda step: step // 2) if cell else (lambda step: round(step / 3))
    for row, bonuses in enumerate(whole(rollout, torch.cat(streams, 1))):
        expected = []
        for episode in range(5):
            seen = Counter([same(0)])
            for step in range(1, 2 + (3 * row + 5 * episode) % 7):
                seen[same(step)] += 1
                expected.append(2.0 / seen[same(step)] ** 0.5)
        assert bonuses == pytest.approx(expected, rel=1e-6)


def test_cells_of_discrete_observations_are_exact_and_those_of_dicts_tell_every_entry():
    counts = EpisodicCounts(resolution=0.5, buckets=1 << 40)
    assert counts.bucket(torch.tensor([[3, 7]]), (1, 2)).tolist() == [[3, 7]]
    nested = {"a": torch.tensor([[0.1, 1.0], [0.2, 1.1], [1.0, 0.1]]), "b": torch.tensor([1, 1, 1])}
    first, second, third = counts.bucket(nested, (3,)).tolist()
    assert first == second != third
    assert counts.bucket({**nested, "b": torch.tensor([1, 2, 1])}, (3,))[1] != second


SMALL = {
    "ppo": rl.PPO(num_envs=2, num_steps=32, batch_size=32, num_epochs=1, hidden_sizes=(8,)),
    "a2c": rl.A2C(num_envs=2, num_steps=8, hidden_sizes=(8,)),
    "dqn": rl.DQN(num_envs=2, num_steps=8, capacity=100, learning_starts=8, batch_size=4, hidden_sizes=(8,)),
    "reinforce": rl.REINFORCE(num_envs=2, num_steps=32, hidden_sizes=(8,)),
}


def learned(settings: Any, iterations: int = 3) -> tuple[Any, dict[str, Tensor]]:
    agent, state, world = start(settings, "CartPole-v1")
    for _ in range(iterations):
        state, metrics = agent.iterate(state, world)
    return state, metrics


@pytest.mark.parametrize("name", SMALL)
def test_every_agent_learns_from_what_its_rewards_say(name):
    """Rewards of nothing change no bit; a potential and counts do, and both are reported apart from the task's own."""
    plain, _ = learned(SMALL[name])
    zero = PotentialShaping(lambda observation: observation[..., 0] * 0)
    nothing, _ = learned(replace(SMALL[name], rewards=(zero, EpisodicCounts(coefficient=0.0))))
    some, metrics = learned(replace(SMALL[name], rewards=(PotentialShaping(lambda o: o[..., 2].abs()),)))
    plain, nothing, some = (
        torch.cat([x.flatten() for x in tree.leaves(one["params"]["weights"])]) for one in (plain, nothing, some)
    )
    assert torch.equal(plain, nothing)
    assert not torch.equal(plain, some)
    assert torch.equal(metrics["rewards/task"], torch.ones(2))
    assert metrics["rewards/shaping"].abs().max() > 0


def test_the_streams_are_divided_together_by_the_running_deviation():
    doubled = PotentialShaping(lambda observation: observation[..., 2] * 100)
    settings = rl.A2C(num_envs=2, num_steps=8, normalise_reward=True, rewards=(doubled,))
    agent, state, _ = start(settings, "CartPole-v1")
    rollout = {
        "observation": torch.rand(2, 8, 2, 4),
        "next_observation": torch.rand(2, 8, 2, 4),
        "reward": torch.ones(2, 8, 2),
        **{name: torch.zeros(2, 8, 2, dtype=torch.bool) for name in ("terminated", "truncated")},
        "valid": torch.ones(2, 8, 2, dtype=torch.bool),
    }
    state, rewards, _ = agent.relabel(state, rollout)
    expected = rollout["reward"] + 100 * (0.99 * rollout["next_observation"][..., 2] - rollout["observation"][..., 2])
    ratio = rewards["task"] / expected
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (PotentialShaping(lambda o: o[..., 0], gamma=0.9), r"made for gamma 0\.9, the agent discounts by \[0\.98"),
        (PotentialShaping(lambda o: o[..., 0] / 0), r"potential is (nan|-?inf) for the observation \["),
        (PotentialShaping(lambda o: o), "expected one number for each"),
        (PotentialShaping(lambda o: 3.0), "gave float"),
        (PotentialShaping(lambda o: o[..., 0] + torch.arange(8)), "changes with their place in the batch"),
        (PotentialShaping(lambda o: o[..., :1]), r"gave \(2, 8, 1\)"),
        (PotentialShaping(lambda o: o[..., 0] * torch.arange(o.dim())), "fails for a batch of observations"),
        (PotentialShaping(lambda o: o.goal), "the potential fails for a batch of observations"),
        (PotentialShaping(lambda o: o[..., 0] + o[0, ..., 0].cumsum(0)), "changes with their place in the batch"),
        (EpisodicCounts(cell=lambda o: o[..., 0]), r"gave torch\.float32 \(2, 8\)"),
        (EpisodicCounts(cell=lambda o: o.nothing), "cell= fails for a batch of observations"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(reward, message):
    with pytest.raises(SettingError, match=message):
        start(rl.PPO(gamma=0.98, rewards=(reward,)), "CartPole-v1")


def test_two_rewards_of_one_name_and_wrong_numbers_are_refused():
    with pytest.raises(SettingError, match="resolution is 0"):
        EpisodicCounts(resolution=0.0)
    with pytest.raises(SettingError, match="two rewards named 'counts'"):
        start(rl.PPO(rewards=(EpisodicCounts(), EpisodicCounts(resolution=1.0))), "CartPole-v1")


def test_wrong_settings_are_refused_by_name():
    for wrong in (
        {"coefficient": -1},
        {"coefficient": "x"},
        {"resolution": float("nan")},
        {"buckets": 1.5},
        {"cell": 3},
    ):
        with pytest.raises(SettingError, match=f"EpisodicCounts: {next(iter(wrong))}"):
            EpisodicCounts(**wrong)
    for gamma in (-0.1, 1.1, True, "x", float("nan")):
        with pytest.raises(SettingError, match="PotentialShaping: gamma"):
            PotentialShaping(len, gamma=gamma)
    with pytest.raises(SettingError, match=r"potential is 0\.5, expected a function"):
        PotentialShaping(0.5)
    for name in ("", "task", "a/b", 3, None):
        with pytest.raises(SettingError, match="name"):
            EpisodicCounts(name=name)
        with pytest.raises(SettingError, match="name"):
            PotentialShaping(len, name=name)


@pytest.mark.parametrize("cls", [rl.PPO, rl.A2C, rl.REINFORCE, rl.DQN])
def test_rewards_are_a_tuple_of_rewards(cls):
    with pytest.raises(SettingError, match=r"a single one is \(reward,\)"):
        cls(rewards=PotentialShaping(len))
    with pytest.raises(SettingError, match=r"the class EpisodicCounts.*make one, EpisodicCounts\(...\)"):
        cls(rewards=(EpisodicCounts,))
    with pytest.raises(SettingError, match="expected rewards such as"):
        cls(rewards=(len,))


def test_a_list_of_rewards_trains_as_a_tuple_does():
    reward, budget = PotentialShaping(lambda o: o[..., 2].abs()), rl.Budget(steps=160, eval_every=999, final_episodes=1)
    runs = [
        rl.train(replace(SMALL["a2c"], rewards=given), "CartPole-v1", budget=budget) for given in ([reward], (reward,))
    ]
    one, two = (list(tree.leaves(run.state["params"]["weights"])) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_a_potential_of_truth_values_is_one_of_zeros_and_ones():
    truth, number = PotentialShaping(lambda o: o[..., 2] > 0), PotentialShaping(lambda o: (o[..., 2] > 0).float())
    found = []
    for reward in (truth, number):
        agent, state, world = start(replace(SMALL["a2c"], rewards=(reward,)), "CartPole-v1")
        state, metrics = agent.iterate(state, world)
        found.append(metrics["rewards/shaping"])
    assert torch.equal(*found) and found[0].abs().max() > 0


class Given:
    """A reward of one's own that gives what it was told to."""

    name = "own"

    def __init__(self, relabelled: Any = None, memory: Any = None) -> None:
        self.relabelled, self.memory = relabelled, {} if memory is None else memory

    def init(self, agent: Any, state: Any, world: Any) -> Any:
        return self.memory

    def relabel(self, agent: Any, state: Any, memory: Any, rollout: Any, rewards: Any) -> Any:
        return self.relabelled(rollout["reward"])


@pytest.mark.parametrize(
    ("relabelled", "message"),
    [
        (lambda r: ({}, {"own": r.unsqueeze(-1)}, {}), r"gave a tensor \(2, 5, 8, 1\) as the stream 'own'"),
        (lambda r: ({}, {"own": r[:, :1]}, {}), r"expected a tensor \(2, 5, 8\)"),
        (lambda r: ({}, {"own": 1.0}, {}), "gave float as the stream 'own'"),
        (lambda r: ({}, {}, {}), "no stream of rewards"),
        (lambda r: ({}, {"own": r}, {"rewards/x": r}), "as the metric 'rewards/x'"),
        (lambda r: {"own": r}, "expected .memory, streams, metrics."),
        (lambda r: None, "gave NoneType"),
    ],
)
def test_what_a_reward_of_ones_own_gives_wrongly_is_said(relabelled, message):
    agent, state, world = start(
        replace(SMALL["a2c"], num_steps=5, num_envs=8, rewards=(Given(relabelled),)), "CartPole-v1"
    )
    with pytest.raises(SettingError, match=message):
        agent.iterate(state, world)


def test_what_a_reward_remembers_belongs_to_learners():
    for memory, message in (
        (3, "gave int, expected a dictionary"),
        ({"sum": torch.zeros(3)}, "starts with the learners"),
    ):
        with pytest.raises(SettingError, match=message):
            start(replace(SMALL["a2c"], rewards=(Given(memory=memory),)), "CartPole-v1")


def test_rewards_of_whole_numbers_are_numbers():
    for cast in (torch.long, torch.bool, torch.double):
        given = Given(lambda r, cast=cast: ({}, {"own": r.to(cast)}, {}))
        agent, state, world = start(replace(SMALL["a2c"], rewards=(given,)), "CartPole-v1")
        state, rollout = collect(agent, state, world, 8)
        state, streams, metrics = agent.relabel(state, rollout)
        assert streams["own"].dtype == torch.float32 and metrics["rewards/own"].tolist() == [1.0, 1.0]


def test_a_reward_that_is_no_number_is_named_and_stops_its_learner_alone():
    def lost(reward: Tensor) -> Any:
        reward = reward.clone()
        reward[1, 0, 0] = torch.nan
        return {}, {"own": reward}, {}

    agent, state, world = start(replace(SMALL["a2c"], rewards=(Given(lost),)), "CartPole-v1")
    with pytest.warns(RuntimeWarning, match=r"'own' gave a stream 'own' that is not finite, to learners \[1\]"):
        state, _ = agent.iterate(state, world)
    assert state["active"].tolist() == [True, False]


def test_cells_of_dicts_do_not_depend_on_the_order_of_their_keys():
    one = {"b": torch.rand(4, 3, 2), "a": torch.randint(5, (4, 3))}
    counts = EpisodicCounts()
    assert torch.equal(counts.bucket(one, (4, 3)), counts.bucket(dict(reversed(one.items())), (4, 3)))
