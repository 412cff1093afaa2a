"""Atari and MiniGrid by their protocols, and MuJoCo: spaces, frames, lives, and exact resume by replay."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.envs.gymnasium import protocols
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.kinds import evaluated
from rlmeta.errors import MissingExtraError, RlmetaError, SettingError, UnknownNameError
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys


def play(world: Any, state: Any, steps: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    transitions = []
    space = world.action_space
    for _ in range(steps):
        if isinstance(space, gym.spaces.Discrete):
            action = torch.randint(int(space.n), (2, world.num_envs), generator=generator)
        else:
            action = 2 * torch.rand(2, world.num_envs, *space.shape, generator=generator) - 1
        state, transition = world.step(state, action)
        transitions.append(transition)
    return state, transitions


def same(a: Any, b: Any) -> bool:
    first, second = tree.flatten(a), tree.flatten(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def resumes_exactly(name: str, settings: dict[str, Any], steps: int) -> None:
    world = GymnasiumWorld(name, (2,), 1, settings=settings)
    state, _ = play(world, world.reset(make_keys([0, 1])), steps)
    saved = tree.map(torch.clone, state)
    state, expected = play(world, state, steps, seed=1)
    world.close()
    fresh = GymnasiumWorld(name, (2,), 1, settings=settings)
    again, transitions = play(fresh, fresh.restore(saved), steps, seed=1)
    fresh.close()
    assert same(state, again) and all(same(a._asdict(), b._asdict()) for a, b in zip(expected, transitions))


# -------------------------------------------------------------------------------------------------------------- Atari


def test_atari_is_seen_and_played_by_the_protocol() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    env = protocols.maker("atari:Pong-v5", {})()
    assert env.observation_space.shape == (4, 84, 84) and env.observation_space.dtype == np.uint8
    assert env.action_space.n == 6  # type: ignore[attr-defined]
    ale: Any = env.unwrapped.ale  # type: ignore[attr-defined]
    assert ale.getFloat("repeat_action_probability") == 0.25
    first, _ = env.reset(seed=0)
    assert all(np.array_equal(first[0], frame) for frame in first)
    frames = ale.getEpisodeFrameNumber()
    second, *_ = env.step(0)
    assert ale.getEpisodeFrameNumber() == frames + 4
    assert np.array_equal(second[:3], first[1:]) and second.max() > 100
    env.close()
    settings = {"full_action_space": True, "sticky": 0.0, "frame_stack": 2, "screen_size": 42, "max_episode_steps": 7}
    env = protocols.maker("atari:ALE/Pong-v5", settings)()
    assert env.observation_space.shape == (2, 42, 42) and env.action_space.n == 18  # type: ignore[attr-defined]
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(7)] == [False] * 6 + [True]
    env.close()


def test_a_lost_life_may_end_an_episode_and_rewards_are_the_games() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    lengths, rewards = {}, set()
    task = rl.task("atari:SpaceInvaders-v5", settings={"terminal_on_life_loss": True, "sticky": 0.0})
    for ends in (False, True):  # evaluation plays whole games
        env = protocols.maker(str(task.source), task.settings if ends else evaluated(task).settings)()
        env.reset(seed=0)
        for lengths[ends] in range(2000):  # stand still and fire
            _, reward, terminated, _, info = env.step(1)
            rewards.add(float(reward))
            if terminated:
                break
        assert info["lives"] == (2 if ends else 0)
        env.close()
    assert lengths[True] < lengths[False] < 1999 and max(rewards) >= 5


def test_what_helps_training_alone_is_left_out_of_every_task_of_a_stream_in_evaluation() -> None:
    pong = rl.task("envpool:Pong-v5", settings={"episodic_life": True, "reward_clip": True, "noop_max": 5})
    atari, cart = rl.task("atari:Pong-v5", settings={"terminal_on_life_loss": True}), rl.task("CartPole-v1")
    stream = evaluated(rl.stream([pong, atari, cart]))
    whole = {"episodic_life": False, "reward_clip": False, "noop_max": 5}
    assert [task.settings for task in stream.tasks] == [whole, {"terminal_on_life_loss": False}, {}]
    assert evaluated(cart) is cart and evaluated("anything else") == "anything else"


def test_atari_resumes_exactly() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    resumes_exactly("atari:Breakout-v5", {"max_episode_steps": 60}, 45)


def test_an_agent_trains_on_atari_and_is_saved_as_data(tmp_path: Any) -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    settings = {"frame_stack": 2, "screen_size": 24, "max_episode_steps": 12, "terminal_on_life_loss": True}
    task = rl.task("atari:Pong-v5", settings=settings)
    agent = rl.PPO(num_envs=1, num_steps=8, batch_size=8, hidden_sizes=(4,))
    run = rl.train(agent, task, steps=16, seeds=1, out=tmp_path / "run", final_episodes=1)
    for world, ends in ((run.experiment.world(1), True), (run.evaluation_world(1), False)):
        assert world._rows.envs[0].get_wrapper_attr("terminal_on_life_loss") is ends
        world.close()
    run.close()
    again = rl.load(tmp_path / "run")
    assert again.experiment.problem.describe() == task.describe()
    again.close()


# ----------------------------------------------------------------------------------------------------------- MiniGrid


@pytest.mark.parametrize("observation", ["image", "flat"])
def test_minigrids_observations_are_small_bytes(observation: str) -> None:
    pytest.importorskip("minigrid")
    env = protocols.maker("minigrid:DoorKey-5x5-v0", {"observation": observation})()
    seen, _ = env.reset(seed=0)
    space: Any = env.observation_space
    assert space.contains(seen) and seen.dtype == np.uint8
    assert seen.shape == ((7, 7, 3) if observation == "image" else (7 * 7 * 3 + 96 * 28,))
    assert space.high.reshape(-1)[:3].tolist() == [10, 5, 2] and int(space.high.max()) == 10
    for _ in range(250):  # its own limit, 10 x 5 x 5
        seen, _, terminated, truncated, _ = env.step(6)  # "done" does nothing
        assert space.contains(seen) and not terminated
    assert truncated
    env.close()


def test_minigrid_resumes_exactly() -> None:
    pytest.importorskip("minigrid")
    resumes_exactly("minigrid:DoorKey-5x5-v0", {"max_episode_steps": 30}, 40)


# ------------------------------------------------------------------------------------------------------------- MuJoCo


@pytest.mark.parametrize("name", ["Hopper-v5", "HalfCheetah-v5"])
def test_mujoco_resumes_exactly(name: str) -> None:
    pytest.importorskip("mujoco")
    resumes_exactly(name, {}, 40)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("atari:Pong-v5", "ale_py", "atari"),
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("minigrid:DoorKey-5x5-v0", "minigrid", "minigrid"),
        ("MiniGrid-DoorKey-5x5-v0", "minigrid", "minigrid"),
        ("envpool:Pong-v5", "envpool", "envpool"),
    ],
)
def test_a_missing_extra_is_one_sentence(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install 'rlmeta\[{extra}\]'"):
        rl.task(name).world((), 1)


def test_mistakes_are_named() -> None:
    for settings, match in (({"sticky": 2.0}, "expected a probability"), ({"frame_stack": 0}, "frame_stack")):
        with pytest.raises(SettingError, match=match):
            protocols.Atari(**settings)
    with pytest.raises(RlmetaError, match="observation"):
        protocols.MiniGrid(observation="text")  # type: ignore[arg-type]
    pytest.importorskip("minigrid")
    with pytest.raises(UnknownNameError, match="did you mean minigrid:DoorKey-5x5-v0"):
        protocols.maker("minigrid:DoorKay-5x5-v0", {})
    with pytest.raises(
        SettingError, match="setting of minigrid:DoorKey-5x5-v0 'observatoin': did you mean observation"
    ):
        protocols.maker("minigrid:DoorKey-5x5-v0", {"observatoin": "flat"})
