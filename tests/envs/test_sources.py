"""Sources of environments: EnvPool names, user functions and their exceptions, and refused sources."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import rlmeta as rl
from rlmeta.envs.gymnasium.sources import is_envpool
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.envs.native import NATIVE, NativeEnv, Physics
from rlmeta.envs.world import State
from rlmeta.errors import (
    EnvironmentFailedError,
    InexactResumeError,
    MissingExtraError,
    SettingError,
    SpaceError,
    UnknownNameError,
)
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys


class Line(gym.Env[Any, Any]):
    """Environment that counts to 5."""

    observation_space: gym.Space[Any] = spaces.Box(0, 9, (1,), np.float32)
    action_space: gym.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.full(1, self.count, np.float32), 1.0, self.count >= 5, False, {}


@dataclass(frozen=True)
class Still(NativeEnv):
    """Environment without dynamics."""

    max_episode_steps: int | None = 3

    @cached_property
    def observation_space(self) -> gym.Space:
        return spaces.Box(-1, 1, (1,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        return spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        return {"x": noise.new_zeros((*noise.shape[:-1], 1))}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        return state, action.float(), torch.zeros_like(action, dtype=torch.bool)

    def observe(self, state: State) -> Tensor:
        return state["x"].float()


TINY = rl.PPO(num_envs=2, num_steps=8, batch_size=8, num_epochs=1, hidden_sizes=(4,))


def _train(problem: Any) -> Any:
    return rl.train(TINY, problem, budget=rl.Budget(steps=16, eval_episodes=2, final_episodes=2))


# ----------------------------------------------------------------------------------- what `rl.train` and `rl.task` take


@pytest.mark.parametrize(
    "problem",
    [
        Line,
        lambda: Line(),
        lambda num_envs: gym.vector.SyncVectorEnv([Line] * num_envs),
        gym.spec("CartPole-v1"),
        Still,
        Still(),
        "CartPole-v1",
    ],
    ids=["class", "function", "vector function", "spec", "native class", "native", "name"],
)
def test_what_makes_environments_is_trained_on(problem: Any) -> None:
    assert _train(problem).scores.isfinite().all()


class Agents:
    """Environment of several agents, with PettingZoo's interface."""

    possible_agents = ("one", "two")

    def reset(self, seed: int | None = None, options: Any = None) -> Any: ...

    def step(self, actions: Any) -> Any: ...


class OldStyle:
    """Class with the interface of gymnasium.Env that does not extend it."""

    def reset(self) -> Any: ...

    def step(self, action: Any) -> Any: ...


@pytest.mark.parametrize(
    ("problem", "match"),
    [
        (lambda: gym.make("CartPole-v1"), r"already.*rl\.task\('CartPole-v1'\).*lambda: gym\.make\('CartPole-v1'\)"),
        (lambda: gym.make_vec("CartPole-v1", 2), r"vector .*lambda num_envs: gym\.make_vec\('CartPole-v1', num_"),
        (Line, r"environment Line, which is made already.*give a function that makes one, rl\.task\(lambda: \.\.\.\)"),
        (Agents, "several agents, such as PettingZoo's, are not supported"),
        (lambda: [rl.task("CartPole-v1")], r"of type list: rl\.stream"),
        (lambda: 7, "a task can't be 7, expected a name"),
        (lambda: None, "a task can't be None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", [rl.task, _train], ids=["task", "train"])
def test_what_is_no_task_is_told_what_to_give(verb: Any, problem: Any, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        verb(problem())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Agents, "Agents returned Agents.*several agents, such as PettingZoo's, are not supported"),
        (OldStyle, "let its class extend gymnasium.Env"),
        (lambda: rl.stream(["CartPole-v1"]), "pass a TaskStream as it is"),
        (lambda: Still(), "returned Still"),
        (lambda: None, "returned NoneType"),
    ],
)
def test_what_a_function_returned_is_named(make: Any, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        _train(make)


# ------------------------------------------------------------------------------------------ the user's own errors


def _unregistered() -> gym.Env[Any, Any]:
    return gym.make("Inner-v0")


def _broken() -> gym.Env[Any, Any]:
    raise ValueError("the camera is off")


def _missing() -> gym.Env[Any, Any]:
    import no_such_simulator  # type: ignore[import-not-found]  # noqa: F401

    return Line()


def _refused() -> gym.Env[Any, Any]:
    raise SettingError("my own sentence")


def _argument() -> gym.Env[Any, Any]:
    return Line(size=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "error", "cause", "match"),
    [
        (_unregistered, EnvironmentFailedError, gym.error.NameNotFound, "_unregistered failed.*`Inner` doesn't exist"),
        (_broken, EnvironmentFailedError, ValueError, r"ValueError: the camera is off .*sources.py:[0-9]+, in _broken"),
        (_argument, EnvironmentFailedError, TypeError, "_argument failed with TypeError"),
        (_missing, MissingExtraError, ModuleNotFoundError, "no_such_simulator"),
        (_refused, SettingError, type(None), "^my own sentence$"),
    ],
)  # fmt: skip
def test_an_error_in_a_users_function_is_shown_as_it_is(make: Any, error: Any, cause: Any, match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        rl.task(make, name="mine").world((), 1)
    assert isinstance(raised.value.__cause__, cause)
    assert not isinstance(raised.value, UnknownNameError)


def test_an_error_while_a_registered_environment_is_made_is_its_own() -> None:
    gym.register("rlmeta-test/Broken-v0", entry_point=_broken)
    gym.register("rlmeta-test/Inner-v1", entry_point=_unregistered)
    with pytest.raises(EnvironmentFailedError, match=r"environment 'rlmeta-test/Broken-v0' failed.*the camera is off"):
        GymnasiumWorld("rlmeta-test/Broken-v0", (), 1)
    with pytest.raises(EnvironmentFailedError, match="`Inner` doesn't exist"):
        GymnasiumWorld("rlmeta-test/Inner-v1", (), 1)


# --------------------------------------------------------------------------------------------------------- their form


class NoSeed(Line):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class NoInfo(Line):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0]


class InfoIsNone(Line):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], None


class AnyKeyword(Line):
    def reset(self, **settings: Any) -> Any:
        return super().reset(**settings)


class Spaceless(gym.Env[Any, Any]):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any: ...

    def step(self, action: Any) -> Any: ...


class Positional(Line):
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class Forgets(gym.Wrapper[Any, Any, Any, Any]):
    def reset(self) -> Any:  # type: ignore[override]
        return self.env.reset()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (NoSeed, r"'NoSeed': the reset\(\) of NoSeed takes no seed.*reset\(self, \*, seed=None, options=None\)"),
        (lambda: gym.wrappers.TimeLimit(NoSeed(), 3), r"the reset\(\) of NoSeed takes no seed"),
        (lambda: Forgets(Line()), r"the reset\(\) of Forgets takes no seed"),
        (NoInfo, r"'NoInfo' gave ndarray from reset\(\), expected \(observation, info\)"),
        (InfoIsNone, r"'InfoIsNone' gave tuple of ndarray, NoneType from reset\(\)"),
        (Spaceless, "'Spaceless' has no observation_space: set it in its __init__"),
    ],
)
def test_an_environment_of_another_form_is_refused(make: Any, match: str) -> None:
    with pytest.raises(SpaceError, match=match):
        GymnasiumWorld(make, (), 1).reset(make_keys([0])[0])


@pytest.mark.parametrize("make", [AnyKeyword, Positional])
def test_a_seed_may_be_taken_in_any_way(make: Any) -> None:
    world = GymnasiumWorld(make, (), 2)
    assert world.reset(make_keys([0])[0])["observation"].tolist() == [[0], [0]]


# -------------------------------------------------------------------------------------------------------------- EnvPool


def _pool(*shape: int, source: Any = "envpool:CartPole-v1", **settings: Any) -> GymnasiumWorld:
    return GymnasiumWorld(source, shape or (2,), 3, settings=settings)


def _walk(world: GymnasiumWorld, keys: Tensor, steps: int = 40) -> list[dict[str, Any]]:
    """Transitions from the reset on; every learner acts by its step number."""
    state = world.reset(keys)
    seen = [{"observation": world.observation(state)}]
    for t in range(steps):
        state, transition = world.step(state, torch.full((*world.learner_shape, 3), t % 3 // 2))
        seen.append(transition._asdict())
    world.close()
    return seen


def test_without_envpool_the_name_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(MissingExtraError, match="task 'envpool:CartPole-v1' needs envpool"):
        rl.task("envpool:CartPole-v1").world((), 1)


def test_envpools_rows_have_their_own_seeds_and_repeat_them() -> None:
    pytest.importorskip("envpool")
    keys = make_keys([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # EnvPool warns where it ignores a seed
        together, again, alone = _walk(_pool(), keys), _walk(_pool(), keys), _walk(_pool(1), keys[1:])
    first = together[0]["observation"].flatten(0, 1)
    assert len(first.unique(dim=0)) == 6
    for step, other, own in zip(together, again, alone, strict=True):
        for name, leaf in tree.flatten(step).items():
            assert torch.equal(leaf, tree.flatten(other)[name])
            assert torch.equal(leaf[1:], tree.flatten(own)[name])
    invalid = torch.stack([~step["valid"] for step in together[1:]])
    ended = torch.stack([step["terminated"] | step["truncated"] for step in together[1:]])
    assert ended[:-1].any() and torch.equal(invalid[1:], ended[:-1])


def test_no_transition_of_an_envpool_leads_into_another_episode() -> None:
    """Every valid one is a step of the same physics, where an episode ends, too. At the time limit EnvPool sets no
    `terminated`, whatever happened."""
    pytest.importorskip("envpool")
    world, env = _pool(max_episode_steps=12), NATIVE["CartPole-v1"]
    state, generator = world.reset(make_keys([0, 1])), torch.Generator().manual_seed(0)
    ends = {"terminated": 0, "truncated": 0, "both": 0}
    for _ in range(60):
        observation, action = world.observation(state), torch.randint(0, 2, (2, 3), generator=generator)
        moved, _, fell = env.step({"state": observation.double()}, action, torch.empty(2, 3, 0), {})
        state, transition = world.step(state, action)
        valid, truncated = transition.valid, transition.truncated
        assert torch.equal(transition.next_observation[valid], world.observation(state)[valid])
        torch.testing.assert_close(transition.next_observation[valid], moved["state"].float()[valid], rtol=0, atol=1e-5)
        assert torch.equal(transition.terminated[valid], (fell & ~truncated)[valid])
        assert (transition.reward[~valid] == 0).all() and torch.equal(transition.memory_reset, ~valid)
        ends["terminated"] += int(transition.terminated.sum())
        ends["truncated"] += int(truncated.sum())
        ends["both"] += int((fell & truncated & valid).sum())
    world.close()
    assert all(ends.values())


def test_the_time_limits_of_envpool_are_known() -> None:
    pytest.importorskip("envpool")
    limits = {"CartPole-v1": 500, "Pendulum-v1": 200, "Catch-v0": None}
    for name, steps in limits.items():
        world = _pool(source=f"envpool:{name}")
        world.close()
        assert world.max_episode_steps == steps


def test_another_reset_of_an_envpool_takes_other_seeds() -> None:
    pytest.importorskip("envpool")
    world = _pool()
    first = world.reset(make_keys([0, 1]))["observation"]
    other = world.reset(make_keys([2, 1]))["observation"]
    assert not torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
    assert torch.equal(world.reset(make_keys([0, 1]))["observation"], first)
    world.close()


def test_envpool_is_trained_on_by_name_and_resumed_inexactly(tmp_path: Any) -> None:
    pytest.importorskip("envpool")
    budget = rl.Budget(steps=64, eval_episodes=2, final_episodes=2)
    run = rl.train(TINY, "envpool:CartPole-v1", budget=budget, seeds=2, out=tmp_path / "a")
    assert run.scores.isfinite().all() and run.scores[0] != run.scores[1]
    loaded = rl.load(tmp_path / "a")
    assert loaded.evaluate(2).returns.isfinite().all()
    loaded.close()
    with pytest.raises(InexactResumeError, match=r"envpool:CartPole-v1.*inexact"):
        rl.resume(tmp_path / "a")
    assert torch.equal(rl.resume(tmp_path / "a", inexact=True).scores, run.scores)  # it had ended


def test_a_function_is_told_the_seeds_of_an_envpool() -> None:
    envpool = pytest.importorskip("envpool")

    def make(num_envs: int, seed: list[int]) -> Any:
        return envpool.make_gymnasium("CartPole-v1", num_envs=num_envs, seed=seed)

    keys = make_keys([0, 1])
    by_name, by_function = _walk(_pool(), keys, 3), _walk(_pool(source=make), keys, 3)
    for step, other in zip(by_name, by_function, strict=True):
        assert all(torch.equal(leaf, tree.flatten(other)[name]) for name, leaf in tree.flatten(step).items())


def test_an_envpool_whose_seeds_would_be_ignored_is_refused() -> None:
    envpool = pytest.importorskip("envpool")
    pool = envpool.make_gymnasium("CartPole-v1", num_envs=6)
    assert is_envpool(pool) and not is_envpool(gym.make("CartPole-v1"))
    with pytest.raises(SettingError, match="envpool:"):
        rl.task(pool)
    for source in (pool, lambda num_envs: envpool.make_gymnasium("CartPole-v1", num_envs=num_envs)):
        with pytest.raises(SettingError, match="takes its seeds only when it is made: name the task envpool:NAME"):
            _pool(source=source)
    with pytest.raises(SettingError, match="steps 2 of its 6 environments"):
        _pool(
            source=lambda num_envs, seed: envpool.make_gymnasium(
                "CartPole-v1", num_envs=num_envs, batch_size=2, seed=seed
            )
        )
    with pytest.raises(SettingError, match="make_gymnasium"):
        _pool(source=lambda: envpool.make_dm("CartPole-v1", num_envs=6))


@pytest.mark.parametrize(
    ("name", "settings", "error", "match"),
    [
        ("envpool:CartPool-v1", {}, UnknownNameError, "EnvPool environment 'CartPool-v1': did you mean CartPole-v1"),
        ("envpool:Nothing-v99", {}, UnknownNameError, "'Nothing-v99': envpool.list_all_envs"),
        ("envpool:CartPole-v1", {"num_envs": 7}, SettingError, "num_envs is no setting of 'envpool:CartPole-v1'"),
        ("envpool:CartPole-v1", {"seed": 7}, SettingError, "seed is no setting"),
        ("envpool:CartPole-v1", {"size": 7}, SettingError, "cannot be made with {'size': 7}"),
    ],
)  # fmt: skip
def test_names_and_settings_that_envpool_has_not(name: str, settings: Any, error: Any, match: str) -> None:
    pytest.importorskip("envpool")
    with pytest.raises(error, match=match):
        _pool(source=name, **settings)


def test_settings_reach_envpool_and_its_rows_are_its_own() -> None:
    pytest.importorskip("envpool")
    walked = _walk(_pool(max_episode_steps=4), make_keys([0, 1]), 5)
    assert walked[4]["truncated"].all() and not walked[3]["truncated"].any()
    with pytest.raises(SettingError, match=r"is a VectorEnv, which runs its environments itself.*--async"):
        rl.task("envpool:CartPole-v1", mode="async").world((), 2)
