"""Hindsight: goals of the same episode and later, paid by the task, in the share asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.engine.capture import Capture
from rlmeta.envs.goals import ACHIEVED, DESIRED, Goals, goals_of
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import CartPole, PointReach, register
from rlmeta.envs.task import Task, TaskFamily
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random, tree
from rlmeta.learning import hindsight, replay
from tests.agents.worlds import start

S = N = 2
C, T = 16, 4
GAMMA = torch.tensor([0.9, 0.5])
GOALS = Goals(lambda a, g: (a - g).abs().sum(-1), lambda a, g: (a == g).all(-1))
"""Every place is one of its own: its reward tells which goal was taken."""


def history_of(total: int, seed: int) -> dict[str, Any]:
    """What happened in `total` steps `[S, total, N]`: episodes that end in any step, and steps in which nothing is."""
    g = torch.Generator().manual_seed(seed)
    place = torch.arange(S * total * N, dtype=torch.float32).reshape(S, total, N, 1)
    terminated, truncated = (torch.rand(S, total, N, generator=g) < 0.12 for _ in range(2))
    final = (terminated | truncated).unsqueeze(-1)
    following = torch.where(final, place + 0.5, torch.cat([place[:, 1:], place[:, -1:] + 0.25], 1))

    def seen(here: Tensor) -> dict[str, Tensor]:
        return {
            "observation": here,
            ACHIEVED: here.repeat(1, 1, 1, 2),
            DESIRED: torch.full_like(place, -1.0).repeat(1, 1, 1, 2),
        }

    return {
        "observation": seen(place),
        "next_observation": seen(following),
        "action": torch.zeros(S, total, N, 1),
        "terminated": terminated,
        "truncated": truncated,
        "valid": torch.rand(S, total, N, generator=g) < 0.9,
        "reward": torch.full((S, total, N), -7.0),
    }


def filled(total: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A memory of C rows after them, and the history itself."""
    history = history_of(total, seed)
    kept = {name: part for name, part in history.items() if name != "next_observation"}
    memory = tree.map(lambda x: torch.zeros(S, C, *x.shape[2:], dtype=x.dtype), kept)
    memory["written"] = torch.zeros(S, N, dtype=torch.int64)
    for first in range(0, total, T):
        rollout = tree.map(lambda x: x[:, first : first + T], history)  # noqa: B023
        memory = replay.insert(memory, rollout, rollout["reward"], 1)
    return memory, history


def later(history: dict[str, Any], s: int, t: int, n: int) -> list[float]:
    """Places that were reached from step t on in its episode, by a walk."""
    places = []
    while True:
        places.append(float(history["next_observation"]["observation"][s, t, n]))
        over = history["terminated"][s, t, n] | history["truncated"][s, t, n]
        if over or t + 1 == history["valid"].shape[1] or not history["valid"][s, t + 1, n]:
            return places
        t += 1


@pytest.mark.parametrize("total", [8, 28, 60])
@pytest.mark.parametrize("seed", range(3))
def test_goals_are_those_of_a_brute_force_walk(total: int, seed: int) -> None:
    memory, history = filled(total, seed)
    keys = random.fold(random.make_keys(range(S)), torch.arange(2).unsqueeze(-1))
    batch = hindsight.sample(memory, keys, 96, GAMMA, goals=GOALS, share=torch.tensor([0.5, 1.0]))
    own = replay.sample(memory, keys, 96, GAMMA)
    met = set()
    for k, s, b in torch.cartesian_prod(torch.arange(2), torch.arange(S), torch.arange(96)).tolist():
        now: dict[str, Any] = tree.map(lambda x: x[k, s, b], batch)  # noqa: B023
        first = {name: now["observation"][name] for name in ("observation", ACHIEVED)}
        assert all(torch.equal(value, own["observation"][name][k, s, b]) for name, value in first.items())
        assert torch.equal(now["observation"][DESIRED], now["next_observation"][DESIRED])
        goal, reached = now["observation"][DESIRED], float(now["next_observation"]["observation"])
        if not now["valid"] or float(goal[0]) == -1.0:
            assert not now["valid"] or s == 0
            assert torch.equal(now["reward"], own["reward"][k, s, b])
            assert torch.equal(now["discount"], own["discount"][k, s, b])
            continue
        t, n = divmod(int(first["observation"]) - s * total * N, N)
        places = later(history, s, t, n)
        assert float(goal[0]) in places
        assert float(now["reward"]) == pytest.approx(2 * (float(goal[0]) - reached))
        assert float(now["discount"]) == pytest.approx(0.0 if float(goal[0]) == reached else float(GAMMA[s]))
        met.add(places.index(float(goal[0])))
    assert len(met) > 2


def test_later_goals_are_equally_likely_and_so_many_are_taken_as_asked() -> None:
    memory, history = filled(28)
    draw = hindsight.drawing(GOALS, {"params": {"hyper": {"hindsight_goals": torch.tensor([4.0, 1.0])}}})
    number, share = 40_000, (0.8, 0.5)
    batch = draw(memory, random.make_keys(range(S)), number, GAMMA, 1)
    for s in range(S):
        taken = batch["valid"][s] & (batch["observation"][DESIRED][s, :, 0] >= 0)
        part = float(taken.sum() / batch["valid"][s].sum())
        assert abs(part - share[s]) < 6 * 0.5 / number**0.5
        begins, goals = (batch["observation"][name][s, taken, 0] for name in ("observation", DESIRED))
        for begin in begins.unique():
            t, n = divmod(int(begin) - s * 28 * N, N)
            values, counts = goals[begins == begin].unique(return_counts=True)
            assert values.tolist() == later(history, s, t, n)
            assert (counts - counts.float().mean()).abs().max() < 6 * float(counts.float().mean()) ** 0.5


def test_terminations_stay_where_the_task_does_not_tell_and_everything_at_a_share_of_nothing() -> None:
    memory, _ = filled(28)
    keys = random.make_keys(range(S))
    own = replay.sample(memory, keys, 64, GAMMA)
    all_taken = hindsight.sample(memory, keys, 64, GAMMA, goals=GOALS._replace(terminated=None), share=torch.ones(S))
    assert torch.equal(all_taken["discount"], own["discount"])
    assert not torch.equal(all_taken["reward"], own["reward"])
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0),
        hindsight.sample(memory, keys, 64, GAMMA, goals=GOALS, share=torch.zeros(S)),
        own,
    )


# ---------------------------------------------------------------------------------------------------- tasks and agents


class Reach(gym.Env[Any, Any]):
    """A goal on a line; `compute_terminated` takes one goal at a time, as GoalEnv allows."""

    place = gym.spaces.Box(-1, 1, (1,), np.float64)
    observation_space = gym.spaces.Dict({"observation": place, ACHIEVED: place, DESIRED: place})
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved_goal - desired_goal, axis=-1)

    def compute_terminated(self, achieved_goal: Any, desired_goal: Any, info: Any) -> bool:
        assert achieved_goal.dtype == np.float64
        return bool(np.linalg.norm(achieved_goal - desired_goal) < 0.1)


class Flat(Reach):
    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -float(np.linalg.norm(achieved_goal - desired_goal))


def test_gymnasiums_goals_are_paid_by_the_environment() -> None:
    world = GymnasiumWorld(Reach, (2,), 3)
    goals = goals_of(world)
    achieved = torch.tensor([[[0.0], [0.5], [0.2]], [[0.1], [0.3], [0.3]]])
    desired = torch.full_like(achieved, 0.25)
    assert goals.terminated is not None
    torch.testing.assert_close(goals.reward(achieved, desired), -(achieved - desired).abs().squeeze(-1))
    assert torch.equal(goals.terminated(achieved, desired), (achieved - desired).abs().squeeze(-1) < 0.1)
    ours, theirs = (goals_of(made) for made in (PointReach_world(True), PointReach_world(False)))
    place = 2 * random.uniform(random.make_keys([0])[0], "place", 0, (2, 4, 50, 2)) - 1
    for one, two in zip(ours, theirs):
        assert torch.equal(one(place[0], place[0] + 0.05 * place[1]), two(place[0], place[0] + 0.05 * place[1]))
    with pytest.raises(SettingError, match=r"compute_reward of environment 'Flat' gave shape \(\) for goals \(6, 1\)"):
        goals_of(GymnasiumWorld(Flat, (2,), 3)).reward(achieved, desired)
    world.close()


def PointReach_world(native: bool) -> Any:
    source = PointReach() if native else register.gym_id("PointReach-v0")
    return rl.task(source).world((2,), 2)


SMALL: dict[str, Any] = {"num_envs": 2, "num_steps": 4, "gradient_steps": 4, "batch_size": 16, "capacity": 400,
                         "learning_starts": 32, "hidden_sizes": (8,), "hindsight": "future"}  # fmt: skip
AGENTS = {"sac": rl.SAC(**SMALL), "td3": rl.TD3(**SMALL), "ddpg": rl.DDPG(**SMALL)}


def trained(settings: Any, seeds: int = 2, records: bool = False) -> Any:
    agent, state, world = start(settings, "PointReach-v0", seeds)
    agent.capture = Capture(warm_up=2) if records else None
    for _ in range(6):
        state, _ = agent.iterate(state, world)
    return tree.flatten(state["params"]["weights"])


@pytest.mark.parametrize("name", AGENTS)
def test_agents_learn_in_hindsight_in_any_company(name: str) -> None:
    together, alone, without = (
        trained(AGENTS[name]),
        trained(AGENTS[name], seeds=1),
        trained(replace(AGENTS[name], hindsight="none")),
    )
    assert not torch.equal(together["policy.head.linear.weight"], without["policy.head.linear.weight"])
    for leaf, value in together.items():
        torch.testing.assert_close(value[:1], alone[leaf], rtol=1e-4, atol=1e-5)


def test_recorded_steps_equal_unrecorded_ones() -> None:
    recorded, plain = (trained(AGENTS["ddpg"], records=records) for records in (True, False))
    for leaf, value in recorded.items():
        assert torch.equal(value, plain[leaf])


def test_a_run_that_was_stopped_goes_on_as_the_one_that_was_not(tmp_path: Any) -> None:
    problem = rl.task(register.gym_id("PointReach-v0"))
    given: dict[str, Any] = {"steps": 80, "seeds": 2, "final_episodes": 2}
    whole = rl.train(AGENTS["ddpg"], problem, **given)
    stops = [lambda run, metrics: metrics["env_steps"] == 48]
    assert rl.train(AGENTS["ddpg"], problem, **given, out=tmp_path / "run", callbacks=stops).stopped
    resumed = rl.resume(tmp_path / "run")
    for name in ("params", "optimizer", "replay"):
        tree.map(partial(torch.testing.assert_close, rtol=0, atol=0), resumed.state[name], whole.state[name])


def test_a_learner_that_is_lost_changes_no_other() -> None:
    ends: list[Any] = []
    for spoil in (False, True):
        agent, state, world = start(AGENTS["ddpg"], "PointReach-v0", 2)
        agent.capture = None
        for i in range(8):
            if spoil and i == 5:
                state["params"]["weights"]["policy.head.linear.weight"][1] = float("nan")
            state, _ = agent.iterate(state, world)
        ends.append(state)
    assert ends[0]["active"].tolist() == [True, True] and ends[1]["active"].tolist() == [True, False]
    first, second = (tree.map(lambda x: x[0], end["params"]["weights"]) for end in ends)
    tree.map(partial(torch.testing.assert_close, rtol=0, atol=0), first, second)


@pytest.mark.parametrize("agent", [rl.SAC, rl.TD3, rl.DDPG])
def test_tasks_and_settings_that_cannot_are_refused(agent: Any) -> None:
    with pytest.raises(SpaceError, match=r"needs observations of a Dict with Boxes achieved_goal and desired_goal"):
        start(agent(hindsight="future"), "Pendulum-v1")
    with pytest.raises(SettingError, match="knows no other rewards: leave rewards empty"):
        agent(hindsight="future", rewards=(rl.RND(),))
    with pytest.raises(SettingError, match="hindsight_goals is -1, expected at least 0"):
        agent(hindsight_goals=-1.0)


def test_worlds_that_do_not_tell_are_refused() -> None:
    vector = partial(gym.make_vec, register.gym_id("PointReach-v0"))
    family = TaskFamily("radii", rl.task(PointReach()), {"radius": (0.05, 0.1)})
    for problem, said in (
        (CartPole(), r"'CartPole' has no compute_reward\(achieved_goal, desired_goal, info\)"),
        ("FrozenLake-v1", "has no compute_reward"),
        (family.task(), "differ between environments or episodes"),
        (rl.trials(rl.task(PointReach()), episodes=2), "of single episodes"),
        (lambda num_envs: vector(num_envs=num_envs), "is a VectorEnv, which has none for single ones"),
    ):
        made = problem if isinstance(problem, Task) else rl.task(problem, native=False)  # type: ignore[arg-type]
        world = made.world((), 2)
        with pytest.raises(SettingError, match=said):
            goals_of(world)
        world.close()
