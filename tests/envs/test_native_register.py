"""Native environments registered with gymnasium: they pass its checker, and a single one equals a row of a vector."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from rlmeta.envs.native import NATIVE, register
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional import tree

assert register  # importing it registers the ids


def row_of(observation: Any, row: int) -> Any:
    """Observation of a row."""
    return tree.map(lambda part: part[row], observation)


def equal(a: Any, b: Any) -> bool:
    """Whether two observations are equal, those of a discrete space as numbers."""
    first, second = tree.flatten(a), tree.flatten(b)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.filterwarnings("ignore:.*WARN.*")
def test_gymnasiums_checker_passes(name: str) -> None:
    env = gym.make(register.gym_id(name))
    assert env.spec is not None and env.spec.max_episode_steps == NATIVE[name].max_episode_steps
    check_env(env.unwrapped)
    assert gym.spec(register.gym_id(name)).vector_entry_point is not None
    if name in gym.registry:
        assert env.spec.reward_threshold == gym.spec(name).reward_threshold


@pytest.mark.parametrize("name", NATIVE)
def test_a_single_environment_equals_the_row_of_a_vector_of_the_same_seed(name: str) -> None:
    """Through autoresets and time limits: 150 steps of at most 20 an episode."""
    vector = gym.make_vec(register.gym_id(name), num_envs=3, max_episode_steps=20)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    singles = [gym.make(register.gym_id(name), max_episode_steps=20) for _ in range(3)]
    observation, _ = vector.reset(seed=11)
    assert vector.observation_space.contains(observation)
    for i, single in enumerate(singles):
        assert equal(single.reset(seed=11 + i)[0], row_of(observation, i))
    vector.action_space.seed(0)
    ends = 0
    for _ in range(150):
        actions = vector.action_space.sample()
        observation, reward, terminated, truncated, infos = vector.step(actions)
        assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == np.bool_
        done = terminated | truncated
        ends += done.sum()
        assert ("final_obs" in infos) == done.any()
        for i, single in enumerate(singles):
            own, r, end, cut, _ = single.step(actions[i])
            assert (r, end, cut) == (reward[i], terminated[i], truncated[i])
            if done[i]:
                assert equal(own, infos["final_obs"][i])
                assert infos["_final_obs"][i]
                if not single.unwrapped._world.env.step_noise:
                    own = single.reset()[0]
                    assert equal(own, row_of(observation, i))
                else:
                    own = single.reset()[0]
            elif not single.unwrapped._world.env.step_noise:
                assert equal(own, row_of(observation, i))
        if done.any() and singles[0].unwrapped._world.env.step_noise:
            return  # a reset() starts a new stretch of the steps' noise, an autoreset goes on with the old
    assert ends >= 7


def test_seeds_decide_everything() -> None:
    env = gym.make("rlmeta/CartPole-v1")
    first, second = env.reset(seed=3)[0], env.reset()[0]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(env.reset(seed=3)[0], first)
    np.testing.assert_array_equal(env.reset()[0], second)
    assert not np.array_equal(env.reset(seed=4)[0], first)
    assert not np.array_equal(gym.make("rlmeta/CartPole-v1").reset()[0], gym.make("rlmeta/CartPole-v1").reset()[0])
    vector: Any = gym.make_vec("rlmeta/CartPole-v1", num_envs=3)
    by_number, by_list = vector.reset(seed=3)[0], vector.reset(seed=[3, 9, None])[0]
    np.testing.assert_array_equal(by_number[0], by_list[0])
    assert not np.array_equal(by_number[2], by_list[2])
    assert len(np.unique(vector.reset()[0], axis=0)) == 3
    vector.reset(seed=3)
    np.testing.assert_array_equal(vector.reset()[0], (vector.reset(seed=3), vector.reset())[1][0])


def test_what_is_returned_is_the_callers_to_keep() -> None:
    """Writing into an observation changes no environment."""
    for name in ("CliffWalking-v1", "CartPole-v1"):
        vector = gym.make_vec(register.gym_id(name), num_envs=2)
        observation, _ = vector.reset(seed=0)
        kept = observation.copy()
        observation[:] = 0
        after = vector.step(np.array([0, 0]))[0]
        vector.reset(seed=0)
        np.testing.assert_array_equal(vector.step(np.array([0, 0]))[0], after)
        assert not np.array_equal(kept, observation)
        after[:] = 0
        again = vector.step(np.array([0, 0]))[0]
        vector.reset(seed=0)
        vector.step(np.array([0, 0]))
        np.testing.assert_array_equal(vector.step(np.array([0, 0]))[0], again)


def test_episode_statistics_of_gymnasium_work() -> None:
    vector = RecordEpisodeStatistics(gym.make_vec("rlmeta/CartPole-v1", num_envs=2, max_episode_steps=5))
    vector.reset(seed=0)
    for step in range(5):
        infos = vector.step(np.array([step % 2, step % 2]))[-1]
    episode = infos["episode"] if "episode" in infos else infos["final_info"]["episode"]
    np.testing.assert_array_equal(episode["r"], [5.0, 5.0])
    np.testing.assert_array_equal(episode["l"], [5, 5])


def test_constants_and_specs() -> None:
    light: Any = gym.make("rlmeta/CartPole-v1", constants={"gravity": 1.6})
    assert light.unwrapped._world.env.gravity == 1.6
    again: Any = gym.make(gym.envs.registration.EnvSpec.from_json(light.spec.to_json()))
    assert again.unwrapped._world.env.gravity == 1.6
    many: Any = gym.make_vec("rlmeta/CartPole-v1", num_envs=2, constants={"gravity": 1.6}, max_episode_steps=7)
    assert many.unwrapped._world.env.gravity == 1.6 and many.unwrapped._world.env.max_episode_steps == 7
    assert gym.make("rlmeta.envs.native.register:rlmeta/Bandit-v0").spec is not None


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match="constant of CartPole-v1 'gravty': did you mean gravity"):
        gym.make("rlmeta/CartPole-v1", constants={"gravty": 1.6})
    with pytest.raises(UnknownNameError, match="native environment 'CartPole-v2': did you mean CartPole-v1"):
        register.NativeGymEnv("CartPole-v2")
    with pytest.raises(SettingError, match="render_mode='human'"):
        register.NativeGymEnv("CartPole-v1", render_mode="human")
    with pytest.raises(SettingError, match="render_mode='human'"):
        register.NativeVectorEnv("CartPole-v1", render_mode="human")
    single, vector = register.NativeGymEnv("CartPole-v1"), register.NativeVectorEnv("CartPole-v1", 2)
    with pytest.raises(SettingError, match="before the first reset"):
        single.step(0)
    with pytest.raises(SettingError, match="before the first reset"):
        vector.step(np.array([0, 0]))
    with pytest.raises(SettingError, match="3 seeds for 2 environments"):
        vector.reset(seed=[1, 2, 3])
    single.reset(seed=0)
    vector.reset(seed=0)
    with pytest.raises(SettingError, match=r"action 2: expected one of Discrete\(2\)"):
        single.step(2)
    with pytest.raises(SettingError, match="expected one of MultiDiscrete"):
        vector.step(np.array([0, 5]))
