"""The native control environments against gymnasium's own, transition by transition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.native import (
    NATIVE,
    Acrobot,
    CartPole,
    MountainCar,
    MountainCarContinuous,
    NativeEnv,
    NativeWorld,
    Pendulum,
)
from rlmeta.errors import SettingError
from rlmeta.functional.random import make_keys

COUNT = 3000
CONTROL = ("CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1", "Pendulum-v1")


def states(name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """States on both sides of every threshold, wall and clip."""
    span = {
        "CartPole-v1": [2.6, 3.0, 0.25, 3.0],
        "MountainCar-v0": [0.9, 0.07],
        "MountainCarContinuous-v0": [0.9, 0.07],
        "Acrobot-v1": [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
        "Pendulum-v1": [3 * math.pi, 8.0],
    }[name]
    centre = np.array([-0.3, 0.0]) if name.startswith("MountainCar") else 0.0
    return rng.uniform(-1, 1, (count, len(span))) * span + centre


def actions(env: NativeEnv, count: int, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env.action_space, gym.spaces.Discrete):
        return rng.integers(env.action_space.n, size=count)
    return rng.uniform(-1.5, 1.5, (count, 1)) * env.action_space.high  # beyond the bounds, too


def gym_step(env: Any, state: np.ndarray, action: Any) -> tuple[np.ndarray, np.ndarray, float, bool]:
    env.reset(seed=0)
    env.state = state.copy()
    observation, reward, terminated, truncated, _ = env.step(action)
    assert not truncated
    return np.array(env.state), observation, reward, terminated


def compare(
    env: NativeEnv,
    name: str,
    reference: Callable[[int], Any],
    physics: dict[str, Tensor] | None = None,
    count: int = COUNT,
    seed: int = 0,
) -> None:
    """`reference(i)` is gymnasium's environment of row i."""
    rng = np.random.default_rng(seed)
    state, action = states(name, count, rng), actions(env, count, rng)
    new, reward, terminated = env.step(
        {"state": torch.tensor(state)}, torch.tensor(action), torch.empty(count, 0), physics or {}
    )
    observation = env.observe(new)
    assert new["state"].dtype == torch.float64 and observation.dtype == reward.dtype == torch.float32
    assert observation.shape == (count, *env.observation_space.shape) and reward.shape == terminated.shape == (count,)
    expected = [gym_step(reference(i), state[i], action[i]) for i in range(count)]
    gym_state, gym_observation, gym_reward, gym_terminated = (np.stack(column) for column in zip(*expected))
    tolerance = 1e-6 if gym_state.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(new["state"].numpy(), gym_state, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(observation.numpy(), gym_observation)
    np.testing.assert_array_equal(reward.numpy(), gym_reward.astype(np.float32))
    np.testing.assert_array_equal(terminated.numpy(), gym_terminated)
    if name != "Pendulum-v1":
        assert 0.02 < gym_terminated.mean() < 0.9


@pytest.mark.parametrize("name", CONTROL)
def test_transitions_equal_gymnasium(name: str) -> None:
    reference = gym.make(name).unwrapped
    compare(NATIVE[name], name, lambda i: reference)


def test_cartpole_semi_implicit_equals_gymnasium() -> None:
    reference: Any = gym.make("CartPole-v1").unwrapped
    reference.kinematics_integrator = "semi-implicit"
    compare(CartPole(kinematics_integrator="semi-implicit"), "CartPole-v1", lambda i: reference, count=500)


def test_cartpole_sutton_barto_reward_equals_gymnasium() -> None:
    reference = gym.make("CartPole-v1", sutton_barto_reward=True).unwrapped
    compare(CartPole(sutton_barto_reward=True), "CartPole-v1", lambda i: reference, count=500)


def test_acrobot_nips_equals_gymnasium() -> None:
    reference: Any = gym.make("Acrobot-v1").unwrapped
    reference.book_or_nips = "nips"
    compare(Acrobot(book_or_nips="nips"), "Acrobot-v1", lambda i: reference, count=500)


def test_keyword_arguments_equal_gymnasium() -> None:
    mountain = gym.make("MountainCar-v0", goal_velocity=0.02).unwrapped
    compare(MountainCar(goal_velocity=0.02), "MountainCar-v0", lambda i: mountain, count=500)
    continuous = gym.make("MountainCarContinuous-v0", goal_velocity=0.02).unwrapped
    compare(MountainCarContinuous(goal_velocity=0.02), "MountainCarContinuous-v0", lambda i: continuous, count=500)
    pendulum = gym.make("Pendulum-v1", g=9.81).unwrapped
    compare(Pendulum(g=9.81), "Pendulum-v1", lambda i: pendulum, count=500)


# how gymnasium's attributes follow from constants of ours
ATTRIBUTES: dict[str, dict[str, str]] = {
    "CartPole-v1": {
        "gravity": "gravity", "masscart": "masscart", "masspole": "masspole", "length": "length",
        "force_mag": "force_mag", "tau": "tau", "x_threshold": "x_threshold",
        "theta_threshold": "theta_threshold_radians",
    },
    "MountainCar-v0": {
        "min_position": "min_position", "max_position": "max_position", "max_speed": "max_speed",
        "goal_position": "goal_position", "goal_velocity": "goal_velocity", "force": "force", "gravity": "gravity",
    },
    "MountainCarContinuous-v0": {
        "min_position": "min_position", "max_position": "max_position", "max_speed": "max_speed",
        "goal_position": "goal_position", "goal_velocity": "goal_velocity", "power": "power",
        "max_action": "max_action",
    },
    "Acrobot-v1": {
        "dt": "dt", "link_length_1": "LINK_LENGTH_1", "link_mass_1": "LINK_MASS_1", "link_mass_2": "LINK_MASS_2",
        "link_com_1": "LINK_COM_POS_1", "link_com_2": "LINK_COM_POS_2", "link_moi": "LINK_MOI",
        "max_vel_1": "MAX_VEL_1", "max_vel_2": "MAX_VEL_2", "torque": "torque",
    },
    "Pendulum-v1": {
        "g": "g", "mass": "m", "length": "l", "dt": "dt", "max_speed": "max_speed", "max_torque": "max_torque",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("per_row", [True, False])
def test_changed_constants_equal_gymnasium(name: str, per_row: bool) -> None:
    """All constants changed at once: a value per row through physics, or in the dataclass."""
    count, rng = 400, np.random.default_rng(7)
    env = NATIVE[name]
    fields = ATTRIBUTES[name]
    scale = {field: rng.uniform(0.8, 1.25, count if per_row else 1) for field in fields}
    values = {field: (getattr(env, field) or 0.01) * scale[field] for field in fields}
    reference: Any = gym.make(name).unwrapped

    def with_constants_of_row(i: int) -> Any:
        for field, attribute in fields.items():
            setattr(reference, attribute, float(values[field][i % len(values[field])]))
        if name == "CartPole-v1":
            reference.total_mass = reference.masscart + reference.masspole
            reference.polemass_length = reference.masspole * reference.length
        if name == "MountainCarContinuous-v0":
            reference.min_action = -reference.max_action
        if name == "Acrobot-v1":
            reference.AVAIL_TORQUE = [-reference.torque, 0.0, reference.torque]
        return reference

    if per_row:
        physics = {field: torch.tensor(value) for field, value in values.items()}
        compare(env, name, with_constants_of_row, physics, count)
    else:
        changed = dataclasses.replace(env, **{field: float(value[0]) for field, value in values.items()})
        compare(changed, name, with_constants_of_row, None, count)


def test_constants_that_gymnasium_hard_codes_do_something() -> None:
    state = {"state": torch.tensor([[0.3, 0.2, 0.1, 0.1]], dtype=torch.float64)}
    stand = torch.tensor([1])
    heavy, _, _ = Acrobot(gravity=20.0).step(state, stand, torch.empty(1, 0), {})
    same, _, _ = Acrobot().step(state, stand, torch.empty(1, 0), {"gravity": torch.tensor([20.0], dtype=torch.float64)})
    torch.testing.assert_close(heavy["state"], same["state"])
    assert not torch.allclose(heavy["state"], Acrobot().step(state, stand, torch.empty(1, 0), {})[0]["state"])
    up = {"state": torch.tensor([[math.pi, 0.0, 0.0, 0.0]], dtype=torch.float64)}
    assert Acrobot(target_height=1.9).step(up, stand, torch.empty(1, 0), {})[2].item()
    assert not Acrobot(target_height=2.1).step(up, stand, torch.empty(1, 0), {})[2].item()
    car = {"state": torch.tensor([[-0.5, 0.0]], dtype=torch.float64)}
    weightless = MountainCarContinuous(gravity=0.0).step(car, torch.zeros(1, 1, dtype=torch.float64), stand, {})[0]
    assert torch.equal(weightless["state"], car["state"])


@pytest.mark.parametrize("name", CONTROL)
def test_first_states_cover_gymnasiums(name: str) -> None:
    """Noise from 0 to 1 spans the range in which gymnasium draws initial states."""
    env = NATIVE[name]
    reference: Any = gym.make(name).unwrapped

    class Ends:
        def __init__(self, share: float) -> None:
            self.share = share

        def uniform(self, low: Any, high: Any, size: Any = None) -> Any:
            value = np.asarray(low) + self.share * (np.asarray(high) - np.asarray(low))
            return np.broadcast_to(value, size if size is not None else np.shape(low)).astype(np.float64)

    for share in (0.0, 0.3, 1.0):
        reference.reset(seed=0)
        reference.np_random = Ends(share)
        reference.reset()
        ours = env.reset(torch.full((2, env.reset_noise), share, dtype=torch.float64), {})["state"]
        tolerance = 1e-7 if name == "Acrobot-v1" else 1e-15  # gymnasium rounds Acrobot's first state to float32
        np.testing.assert_allclose(ours.numpy(), np.stack([reference.state] * 2), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("env", "physics", "bounds"),
    [
        (CartPole(), {"initial_range": [0.1, 0.2]}, [[0.1] * 4, [0.2] * 4]),
        (Acrobot(), {"initial_range": [0.3, 0.2]}, [[0.3] * 4, [0.2] * 4]),
        (Pendulum(), {"initial_angle": [1.0, 2.0], "initial_velocity": [0.5, 3.0]}, [[1.0, 0.5], [2.0, 3.0]]),
        (MountainCar(), {"initial_low": [-1.0, -0.6], "initial_high": [-0.8, 0.2]}, [[-0.8, 0.0], [0.2, 0.0]]),
    ],
)
def test_first_state_reads_physics(env: NativeEnv, physics: dict[str, list[float]], bounds: list[list[float]]) -> None:
    rows = {name: torch.tensor(value, dtype=torch.float64) for name, value in physics.items()}
    highest = env.reset(torch.ones(2, env.reset_noise, dtype=torch.float64), rows)["state"]
    torch.testing.assert_close(highest, torch.tensor(bounds, dtype=torch.float64))
    lowest = env.reset(torch.zeros(2, env.reset_noise, dtype=torch.float64), rows)["state"]
    if "initial_low" in physics:
        torch.testing.assert_close(lowest[:, 0], rows["initial_low"])
    else:
        torch.testing.assert_close(lowest, -highest)


@pytest.mark.parametrize("name", CONTROL)
def test_spaces_and_limits_equal_gymnasium(name: str) -> None:
    reference = gym.make(name)
    assert NATIVE[name].observation_space == reference.observation_space
    assert NATIVE[name].action_space == reference.action_space
    assert reference.spec is not None and NATIVE[name].max_episode_steps == reference.spec.max_episode_steps


@pytest.mark.parametrize("name", CONTROL)
def test_any_leading_shape(name: str) -> None:
    """[2, 3, 4] rows equal the same 24 rows flat."""
    env, rng = NATIVE[name], np.random.default_rng(3)
    state, action = torch.tensor(states(name, 24, rng)), torch.tensor(actions(env, 24, rng))
    flat, flat_reward, flat_end = env.step({"state": state}, action, torch.empty(24, 0), {})
    shaped, reward, end = env.step(
        {"state": state.reshape(2, 3, 4, -1)}, action.reshape(2, 3, 4, *action.shape[1:]), torch.empty(2, 3, 4, 0), {}
    )
    assert torch.equal(shaped["state"].reshape(flat["state"].shape), flat["state"])
    assert torch.equal(reward.flatten(), flat_reward) and torch.equal(end.flatten(), flat_end)


@pytest.mark.parametrize("name", CONTROL)
def test_step_writes_to_nothing_it_is_given(name: str) -> None:
    env, rng = NATIVE[name], np.random.default_rng(3)
    state, action = torch.tensor(states(name, 8, rng)), torch.tensor(actions(env, 8, rng)).double()
    physics = {key: value.expand(8).clone() for key, value in env.constants().items()}
    kept = [x.clone() for x in (state, action, *physics.values())]
    env.step({"state": state}, action, torch.empty(8, 0), {})
    env.step({"state": state}, action, torch.empty(8, 0), physics)
    assert all(torch.equal(x, y) for x, y in zip(kept, (state, action, *physics.values())))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(SettingError, match="kinematics_integrator='rk4'"):
        CartPole(kinematics_integrator="rk4")
    with pytest.raises(SettingError, match="book_or_nips='paper'"):
        Acrobot(book_or_nips="paper")


def test_noisy_cartpole_is_cartpole_with_normal_noise_clipped_to_its_space() -> None:
    """POPGym's NoisyPositionOnlyCartPole: the poles go as without noise, what is seen differs by normal numbers."""
    plain = NativeWorld(CartPole(observe_velocities=False), (), 2000)
    noisy = NativeWorld(CartPole(observe_velocities=False, observation_noise=0.3, step_reward=0.005), (), 2000)
    key, action = make_keys([0])[0], torch.ones(2000, dtype=torch.int64)
    (state, loud), differences = (plain.reset(key), noisy.reset(key)), []
    # a width of 4 and one of 6 give other numbers
    state["env"]["state"] = loud["env"]["state"]
    high = torch.tensor([4.8, 0.41887903])
    for _ in range(5):
        seen, expected = noisy.observation(loud), (plain.observation(state) + loud["env"]["noise"]).float()
        inside = expected.abs() < high
        torch.testing.assert_close(seen[inside], expected[inside])
        assert bool((seen.abs()[~inside] == high.expand_as(seen)[~inside]).all()) and bool((~inside).any())
        differences.append(loud["env"]["noise"])
        (state, expected_step), (loud, step) = plain.step(state, action), noisy.step(loud, action)
        torch.testing.assert_close(loud["env"]["state"], state["env"]["state"])
        assert torch.equal(step.reward, expected_step.reward * 0.005)
    noise = torch.stack(differences)
    assert float(noise.mean().abs()) < 0.01 and float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert len(noise.unique()) == noise.numel()
    with pytest.raises(SettingError, match=r"observation_noise=0\.0: expected a standard deviation"):
        CartPole(observation_noise=0.0)


@pytest.mark.parametrize("kind", ["positions", "noisy"])
@pytest.mark.parametrize(
    ("level", "positions", "noise"), [("easy", 200, 0.1), ("medium", 400, 0.2), ("hard", 600, 0.3)]
)
def test_popgyms_cartpoles_have_their_lengths_and_pay_1_in_all(
    kind: str, level: str, positions: int, noise: float
) -> None:
    env: Any = rl.task(f"CartPole-{kind}-{level}").source
    assert env.max_episode_steps == (positions if kind == "positions" else 200) and not env.observe_velocities
    assert env.max_episode_steps * env.step_reward == pytest.approx(1)
    assert env.observation_noise == (noise if kind == "noisy" else None)


def test_a_step_of_cartpole_pays_what_physics_says() -> None:
    world = NativeWorld(CartPole(), (), 2, {"step_reward": torch.tensor(0.5)})
    _, transition = world.step(world.reset(make_keys([0])[0]), torch.zeros(2, dtype=torch.int64))
    assert transition.reward.tolist() == [0.5, 0.5]
