"""MinAtar's games against trajectories of the minatar package 1.0.15, and against its random policy's returns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.native import NATIVE, Asterix, Breakout, NativeWorld, SpaceInvaders
from rlmeta.envs.native.base import _where
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from tests.envs.record_minatar import GAMES, PATH, SEGMENTS, STEPS, noise_of

NAMES = [f"{game}-v{version}" for game in GAMES for version in (0, 1)]
# mean return of a uniformly random policy in 1,000 episodes of the package, and its standard error
RANDOM = {
    "Asterix-v0": (0.47, 0.03),
    "Asterix-v1": (0.50, 0.03),
    "Breakout-v0": (0.50, 0.02),
    "Breakout-v1": (0.42, 0.02),
    "SpaceInvaders-v0": (2.90, 0.08),
    "SpaceInvaders-v1": (4.10, 0.10),
}


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(PATH) as file:
        return {entry.removeprefix(f"{name}/"): file[entry] for entry in file.files if entry.startswith(f"{name}/")}


def column(values: np.ndarray) -> Tensor:
    """`[STEPS, SEGMENTS, ...]` of a column of a trajectory."""
    tensor = torch.from_numpy(values)
    return tensor.unflatten(0, (SEGMENTS, STEPS)).transpose(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_package(name: str) -> None:
    """Observations, rewards, ends and hidden states, eight stretches of a long trajectory side by side."""
    env, known = NATIVE[f"MinAtar/{name}"], recorded(name)
    shape = env.observation_space.shape
    assert shape is not None
    bits = np.unpackbits(known["observation"])[: SEGMENTS * STEPS * math.prod(shape)]
    observations = column(bits.reshape(-1, *shape))
    actions, rewards, ends, resets = (column(known[part]) for part in ("action", "reward", "ended", "reset"))
    state, last = (
        {part.removeprefix(side): torch.from_numpy(x) for part, x in known.items() if part.startswith(side)}
        for side in ("start/", "end/")
    )
    for t in range(STEPS):
        noise = torch.stack([noise_of("step", segment * STEPS + t, env.step_noise) for segment in range(SEGMENTS)])
        state, reward, ended = env.step(state, actions[t].long(), noise, {})
        assert torch.equal(env.observe(state), observations[t]), t
        assert torch.equal(reward, rewards[t].float()) and torch.equal(ended, ends[t]), t
        first = torch.stack([noise_of("reset", int(count), env.reset_noise) for count in resets[t]])
        state = _where(ended, env.restart(state, first, {}), state)
    for leaf, value in last.items():
        shown = state["present"] if leaf in ("column", "rightward", "gold") else torch.tensor(True)
        assert torch.equal(state[leaf] * shown, value * shown), leaf


def test_the_trajectories_go_far() -> None:
    """Through difficulties, refilled walls and waves; every flag is seen on both sides."""
    asterix, breakout, invaders = (recorded(f"{game}-v1") for game in GAMES)
    assert asterix["end/move_speed"].min() < 5 and asterix["end/spawn_speed"].min() < 7
    assert invaders["end/move_interval"].min() < 12
    grown = np.diff(np.unpackbits(breakout["observation"]).reshape(-1, 100, 4)[..., 3].sum(1, dtype=int))
    assert ((grown > 20) & ~breakout["ended"][:-1] & (np.arange(1, len(grown) + 1) % STEPS > 0)).sum() >= 2  # refilled
    for known in (asterix, breakout, invaders):
        assert known["ended"].sum() >= 2 and known["reward"].sum() > 20


@pytest.mark.parametrize("name", NAMES)
def test_random_play_scores_what_it_scores_in_the_package(name: str) -> None:
    """First episodes of 500 rows; 4 standard errors of both."""
    env, count = NATIVE[f"MinAtar/{name}"], 500
    world, key = NativeWorld(env, (), count), torch.tensor(3)
    state, total, playing = world.reset(key), torch.zeros(count), torch.ones(count, dtype=torch.bool)
    for t in range(1500):
        action = random.integers(key, "actions", t, (count,), env.action_space.n)  # type: ignore[attr-defined]
        state, transition = world.step(state, action)
        total += transition.reward * playing
        playing &= ~transition.terminated
        if not playing.any():
            break
    assert not playing.any()
    expected, error = RANDOM[name]
    assert abs(float(total.mean()) - expected) < 4 * math.hypot(error, float(total.std()) / math.sqrt(count))


def test_aliens_that_land_end_the_episode() -> None:
    """In the last row they do so when they would turn, or meet the cannon; otherwise they march on."""
    env, noise = SpaceInvaders(sticky_action_prob=0.0), torch.full((3, 1), 0.5, dtype=torch.float64)
    state = env.reset(noise[:, :0], {})
    aliens = torch.zeros(3, 10, 10, dtype=torch.bool)
    aliens[0, 9, 0] = aliens[1, 9, 3] = aliens[2, 9, 6] = aliens[:, 2, 5] = True  # they move left; the cannon is at 5
    state.update(aliens=aliens.flatten(1), move_timer=torch.zeros(3, dtype=torch.int64))
    new, _, terminated = env.step(state, torch.zeros(3, dtype=torch.int64), noise, {})
    assert terminated.tolist() == [True, False, True]
    assert new["direction"].tolist() == [1, -1, -1] and new["move_timer"].tolist() == [1, 1, 1]


def test_the_last_action_outlives_an_episode() -> None:
    """In the package a sticky first step repeats the last action of the episode before."""
    env = Breakout(sticky_action_prob=1.0)
    state = env.reset(torch.tensor([[0.2]], dtype=torch.float64), {})
    state["last_action"] = torch.tensor([3])
    state = env.restart(state, torch.tensor([[0.7]], dtype=torch.float64), {})
    assert int(state["ball"]) == 39
    new, _, _ = env.step(state, torch.tensor([1]), torch.tensor([[0.5]], dtype=torch.float64), {})
    assert int(new["paddle"]) == 5 and int(new["last_action"]) == 3
    world, ended = NativeWorld(Breakout(sticky_action_prob=0.0), (), 1), False
    state = world.reset(torch.tensor(0))
    while not ended:
        state, transition = world.step(state, torch.tensor([2]))
        ended = bool(transition.terminated)
    assert int(state["env"]["last_action"]) == 3 and int(state["elapsed"]) == 0


def test_stickiness_may_differ_by_learner() -> None:
    world = NativeWorld(Breakout(), (2,), 3, {"sticky_action_prob": torch.tensor([0.0, 1.0])})
    state, _ = world.step(world.reset(random.make_keys([0, 1])), torch.ones(2, 3, dtype=torch.int64))
    assert state["env"]["paddle"].tolist() == [[3] * 3, [4] * 3]


@pytest.mark.parametrize("cls", [Asterix, Breakout, SpaceInvaders])
def test_a_stickiness_that_is_no_probability_is_refused(cls: type[Breakout]) -> None:
    with pytest.raises(SettingError, match=r"sticky_action_prob=1.5: expected a probability"):
        cls(sticky_action_prob=1.5)


def test_a_run_is_found_again_with_its_action_set(tmp_path: Path) -> None:
    """Stopped and resumed, it ends as the one that was not."""
    constant = {"learning_rate_schedule": "constant", "clip_range_schedule": "constant"}
    agent = rl.PPO(num_envs=2, num_steps=8, batch_size=16, hidden_sizes=(4,), **constant)
    task = rl.task("MinAtar/Breakout-v0", max_episode_steps=20)
    whole = rl.train(agent, task, steps=96, seeds=2, final_episodes=2)
    assert whole.world.observation_space.shape == (10, 10, 4)
    rl.train(agent, task, steps=48, seeds=2, final_episodes=2, out=tmp_path / "run").close()
    again = rl.resume(tmp_path / "run", steps=96)
    assert again.world.action_space.n == 6 and torch.equal(again.scores, whole.scores)
    both = [tree.flatten({"world": run.state["world"], "params": run.state["params"]}) for run in (whole, again)]
    assert [name for name, leaf in both[0].items() if not torch.equal(leaf, both[1][name])] == []
