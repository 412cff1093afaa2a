"""Autoreset modes: all kinds of gymnasium environments give the same transitions for the same episodes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random
from rlmeta.functional.returns import discounts, generalized_advantage
from tests.envs.counter_env import BOTH, TERMINATE, TRUNCATE, CounterEnv, schedule, step_and_episode

EPISODES = 5
GAMMA, LAMBDA = 0.9, 0.8

gym.register("rlmeta-test/Counter-v0", entry_point=CounterEnv, max_episode_steps=100)


def _vector(mode: AutoresetMode, rows: int, nested: bool, kind: type = SyncVectorEnv, **settings: Any) -> VectorEnv:
    return kind([lambda: CounterEnv(nested)] * rows, autoreset_mode=mode, **settings)


KINDS: dict[str, Any] = {
    "id": lambda rows, nested: {"make": "rlmeta-test/Counter-v0", "settings": {"nested": nested}},
    "spec": lambda rows, nested: {"make": gym.spec("rlmeta-test/Counter-v0"), "settings": {"nested": nested}},
    "factory": lambda rows, nested: {"make": lambda: CounterEnv(nested)},
    "async": lambda rows, nested: {"make": lambda: CounterEnv(nested), "mode": "async", "workers": 2},
    "next step": lambda rows, nested: {"make": _vector(AutoresetMode.NEXT_STEP, rows, nested)},
    "same step": lambda rows, nested: {"make": _vector(AutoresetMode.SAME_STEP, rows, nested)},
    "disabled": lambda rows, nested: {"make": _vector(AutoresetMode.DISABLED, rows, nested)},
    "not copied": lambda rows, nested: {"make": _vector(AutoresetMode.SAME_STEP, rows, nested, copy=False)},
    "vector factory": lambda rows, nested: {"make": lambda num_envs: _vector(AutoresetMode.DISABLED, num_envs, nested)},
    "foreign workers": lambda rows, nested: {"make": _vector(AutoresetMode.SAME_STEP, rows, nested, AsyncVectorEnv)},
}
CASES = [
    (kind, shape)
    for kind in KINDS
    for shape in ([((2,), 2)] if kind in ("async", "foreign workers") else [((2,), 2), ((3,), 3), ((), 4), ((2, 1), 2)])
]


def _rollout(world: GymnasiumWorld) -> dict[str, Tensor]:
    """Roll out the schedule until every row has `EPISODES` whole episodes; all tensors `[*L, T, N]`."""
    axes = len(world.learner_shape)
    batch = (*world.learner_shape, world.num_envs)
    row = torch.arange(int(np.prod(batch))).view(batch)
    state = world.reset(random.make_keys(range(int(np.prod(world.learner_shape)))).view(world.learner_shape))
    ended, steps = torch.zeros(batch, dtype=torch.int64), []
    while (ended < EPISODES).any():
        step, episode = step_and_episode(world.observation(state))
        state, transition = world.step(state, schedule(row, step, episode))
        next_step, next_episode = step_and_episode(transition.next_observation)
        seen_step, seen_episode = step_and_episode(transition.observation)
        steps.append(
            {
                "step": step,
                "episode": episode,
                "next_step": next_step,
                "next_episode": next_episode,
                "seen_step": seen_step,
                "seen_episode": seen_episode,
                "reward": transition.reward,
                "terminated": transition.terminated,
                "truncated": transition.truncated,
                "valid": transition.valid,
                "memory_reset": transition.memory_reset,
            }
        )
        ended += transition.terminated | transition.truncated
    assert len(steps) < 200
    return {name: torch.stack([row[name] for row in steps], axes) for name in steps[0]}


def _value(step: Tensor, episode: Tensor) -> Tensor:
    return torch.sin(3 * step + 1.7 * episode) + 0.3 * step


def _advantages(rollout: dict[str, Tensor]) -> Tensor:
    return generalized_advantage(
        rollout["reward"].double(),
        discounts(GAMMA, rollout["terminated"], torch.float64),
        _value(rollout["step"], rollout["episode"]),
        _value(rollout["next_step"], rollout["next_episode"]),
        rollout["terminated"] | rollout["truncated"] | ~rollout["valid"],
        LAMBDA,
    )


def _by_row(rollout: dict[str, Tensor], column: Tensor) -> list[Tensor]:
    """Values of each row at its valid steps within whole episodes."""
    take = rollout["valid"] & (rollout["episode"] < EPISODES)
    columns, takes = column.movedim(-2, -1).flatten(0, -2), take.movedim(-2, -1).flatten(0, -2)
    return [values[mask] for values, mask in zip(columns, takes)]


def _expected(row: int) -> dict[str, list[float]]:
    """Expected transitions of a row, computed without any environment; advantages by their definition as a sum."""
    story: dict[str, list[float]] = {name: [] for name in ("step", "episode", "reward", "terminated", "truncated")}
    advantages: list[float] = []
    for episode in range(EPISODES):
        length, kind = 1 + (3 * row + 5 * episode) % 7, 1 + (row + episode) % 3
        deltas = []
        for step in range(length):
            last = step == length - 1
            terminated, truncated = last and kind in (TERMINATE, BOTH), last and kind in (TRUNCATE, BOTH)
            reward = 10.0 * episode + step + 1
            for name, value in zip(story, (step, episode, reward, terminated, truncated)):
                story[name].append(float(value))
            steps = torch.tensor([step, step + 1], dtype=torch.float64)
            here, there = _value(steps, torch.full_like(steps, episode)).tolist()
            deltas.append(reward + GAMMA * (not terminated) * there - here)
        advantages += [sum((GAMMA * LAMBDA) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]
    return {**story, "advantage": advantages}


@pytest.mark.parametrize("nested", [False, True], ids=["box", "dict"])
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_no_transition_crosses_an_episode(kind: str, shape: tuple[tuple[int, ...], int], nested: bool) -> None:
    learner_shape, num_envs = shape
    rows = int(np.prod(learner_shape)) * num_envs
    world = GymnasiumWorld(learner_shape=learner_shape, num_envs=num_envs, **KINDS[kind](rows, nested))
    try:
        rollout = _rollout(world)
    finally:
        world.close()
    valid, ended = rollout["valid"], rollout["terminated"] | rollout["truncated"]
    assert torch.equal(rollout["next_episode"][valid], rollout["episode"][valid])
    assert torch.equal(rollout["next_step"][valid], rollout["step"][valid] + 1)
    assert not ended[~valid].any() and not rollout["reward"][~valid].any()
    assert torch.equal(rollout["next_episode"][~valid], rollout["seen_episode"][~valid])
    # what is seen next: the successor, or the first observation of the next episode, and then memory is cleared
    begins = rollout["memory_reset"]
    assert torch.equal(begins, rollout["seen_step"] == 0)
    assert torch.equal(rollout["seen_step"][~begins], rollout["next_step"][~begins])
    assert torch.equal(rollout["seen_episode"][begins], rollout["episode"][begins] + 1)
    if kind == "next step":
        assert torch.equal(~valid[..., 1:, :], ended[..., :-1, :]) and torch.equal(begins, ~valid)
    else:
        assert valid.all() and torch.equal(begins, ended)

    advantages = _by_row(rollout, _advantages(rollout))
    columns = {name: _by_row(rollout, rollout[name].double()) for name in ("step", "episode", "reward")}
    flags = {name: _by_row(rollout, rollout[name].double()) for name in ("terminated", "truncated")}
    for row in range(rows):
        expected = _expected(row)
        for name, column in {**columns, **flags}.items():
            assert column[row].tolist() == expected[name], name
        torch.testing.assert_close(
            advantages[row], torch.tensor(expected["advantage"], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_advantages_are_identical_in_all_modes() -> None:
    by_kind = {}
    for kind in ("factory", "next step", "same step", "disabled"):
        world = GymnasiumWorld(learner_shape=(2,), num_envs=2, **KINDS[kind](4, False))
        rollout = _rollout(world)
        by_kind[kind] = torch.cat(_by_row(rollout, _advantages(rollout)))
        world.close()
    reference = by_kind.pop("factory")
    for kind, advantages in by_kind.items():
        assert torch.equal(advantages, reference), kind


# ------------------------------------------------------------------------------------------------- what is refused


class _Batched(SyncVectorEnv):
    """VectorEnv with infos, metadata and calls that a test can inspect and change."""

    def __init__(self, mode: AutoresetMode, rows: int = 2, nested: bool = False) -> None:
        super().__init__([lambda: CounterEnv(nested)] * rows, autoreset_mode=mode)
        self.calls: list[tuple[Any, Any]] = []
        self.final: Any = None

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.calls.append((seed, options if options is None else {k: v.copy() for k, v in options.items()}))
        return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        *result, infos = super().step(actions)
        if self.final is not None and "final_obs" in infos:
            infos["final_obs"] = self.final(infos["final_obs"])
        return *result, infos


def _end_first(world: GymnasiumWorld) -> Any:
    state = world.reset(random.make_keys([0])[0])
    return world.step(state, torch.tensor([TERMINATE, 0]))


@pytest.mark.parametrize("mode", [None, "Sometimes", 3, "missing"])
def test_unknown_autoreset_mode_is_refused(mode: Any) -> None:
    env = _Batched(AutoresetMode.SAME_STEP)
    env.metadata = {} if mode == "missing" else {"autoreset_mode": mode}
    expected = "declares no autoreset mode" if mode in (None, "missing") else repr(mode)
    with pytest.raises(SettingError, match=expected):
        GymnasiumWorld(env, (), 2)


def test_what_was_made_for_a_refused_world_is_closed_and_what_was_given_is_not() -> None:
    created: list[_Batched] = []

    def make() -> _Batched:
        created.append(_Batched(AutoresetMode.SAME_STEP, 3))
        return created[-1]

    for settings in ({"mode": "async"}, {}):  # refused for its mode, refused for its size
        with pytest.raises(SettingError):
            GymnasiumWorld(make, (), 2, **settings)
        assert created[-1].closed
        passed = _Batched(AutoresetMode.SAME_STEP, 3)
        with pytest.raises(SettingError):
            GymnasiumWorld(passed, (), 2, **settings)
        assert not passed.closed
        passed.close()


def test_mode_may_be_named_by_its_value() -> None:
    env = _Batched(AutoresetMode.NEXT_STEP)
    env.metadata = {"autoreset_mode": "NextStep"}
    _, transition = _end_first(world := GymnasiumWorld(env, (), 2))
    assert not transition.memory_reset.any() and transition.terminated.tolist() == [True, False]
    world.close()


@pytest.mark.parametrize("rows", [1, 3])
def test_wrong_number_of_environments_is_refused(rows: int) -> None:
    with pytest.raises(SettingError, match=f"has {rows} environments, expected 2"):
        GymnasiumWorld(_Batched(AutoresetMode.SAME_STEP, rows), (2,), 1)


def test_vector_env_has_no_worker_processes_of_ours() -> None:
    with pytest.raises(SettingError, match="VectorEnv"):
        GymnasiumWorld(_Batched(AutoresetMode.SAME_STEP), (), 2, mode="async")


@pytest.mark.parametrize(
    "final",
    [lambda f: f, list, lambda f: np.stack([np.zeros(2, np.float32) if o is None else o for o in f])],
    ids=["object array", "list", "dense array"],
)
def test_final_observations_of_every_form(final: Any) -> None:
    env = _Batched(AutoresetMode.SAME_STEP)
    env.final = final
    _, transition = _end_first(GymnasiumWorld(env, (), 2))
    assert transition.next_observation.tolist() == [[1, 0], [1, 0]]
    assert transition.observation.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("final", "match"),
    [
        (lambda f: np.array([None, None]), "_Batched.*row 0.*hole"),
        (lambda f: [np.zeros(3, np.float32)] * 2, r"_Batched.*\(3,\)"),
    ],
    ids=["hole", "shape"],
)
def test_missing_or_misshapen_final_observation_is_refused(final: Any, match: str) -> None:
    env = _Batched(AutoresetMode.SAME_STEP)
    env.final = final
    with pytest.raises(SpaceError, match=match):
        _end_first(GymnasiumWorld(env, (), 2))


def test_final_observations_as_a_dictionary_of_arrays() -> None:
    env = _Batched(AutoresetMode.SAME_STEP, nested=True)
    env.final = lambda f: {
        "step": np.array([[7], [0]], np.float32),
        "more": (np.array([3.0, 0.0]), np.array([7, 0])),
        "_step": np.array([True, False]),
    }
    _, transition = _end_first(GymnasiumWorld(env, (), 2))
    step, episode = step_and_episode(transition.next_observation)
    assert step.tolist() == [7, 1] and episode.tolist() == [3, 0]


def test_final_observations_as_a_list_of_dictionaries() -> None:
    """An entry per row, as with dictionary observations; None where no episode ended."""
    env = _Batched(AutoresetMode.SAME_STEP, nested=True)
    finals: list[Any] = []
    env.final = lambda f: finals.append(list(f)) or finals[-1]
    _, transition = _end_first(GymnasiumWorld(env, (), 2))
    (rows,) = finals
    assert isinstance(rows[0], dict) and rows[1] is None
    step, episode = step_and_episode(transition.next_observation)
    assert step.tolist() == [1, 1] and episode.tolist() == [0, 0]
    step, episode = step_and_episode(transition.observation)
    assert step.tolist() == [0, 1] and episode.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("final", "match"),
    [
        (lambda f: [{"step": f[0]["step"]}, None], "_Batched' gave an observation without 'more"),
        (lambda f: [7, None], "_Batched' gave an observation without"),
        (lambda f: [None, None], "_Batched' ended row 0 but left a hole"),
    ],
)
def test_a_list_of_other_things_than_dictionaries_is_refused(final: Any, match: str) -> None:
    env = _Batched(AutoresetMode.SAME_STEP, nested=True)
    env.final = final
    with pytest.raises(SpaceError, match=match):
        _end_first(GymnasiumWorld(env, (), 2))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_infos_may_be_a_list_of_dictionaries(mode: AutoresetMode, nested: bool) -> None:
    """As from gymnasium's DictInfoToList, where rows without an entry lack its key."""
    plain = GymnasiumWorld(_vector(mode, 4, nested), (2,), 2)
    listed = GymnasiumWorld(gym.wrappers.vector.DictInfoToList(_vector(mode, 4, nested)), (2,), 2)
    first, second = _rollout(plain), _rollout(listed)
    assert all(torch.equal(column, second[name]) for name, column in first.items())
    plain.close()
    listed.close()


def test_same_step_without_final_observations_is_refused() -> None:
    class Without(_Batched):
        def step(self, actions: Any) -> Any:
            return *super().step(actions)[:4], {}

    with pytest.raises(SpaceError, match="final_obs"):
        _end_first(GymnasiumWorld(Without(AutoresetMode.SAME_STEP), (), 2))


def test_reset_forgets_the_pending_reset_of_next_step() -> None:
    world = GymnasiumWorld(_Batched(AutoresetMode.NEXT_STEP), (), 2)
    _end_first(world)
    _, transition = _end_first(world)
    assert transition.valid.all() and not transition.memory_reset.any()
    assert transition.next_observation.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_seeds_are_those_that_were_given(mode: AutoresetMode) -> None:
    """A VectorEnv that resets its environments itself gets no further seeds."""
    world = GymnasiumWorld(_Batched(mode), (), 2)
    state = world.reset(random.make_keys([0])[0])
    seeds = state["seed"].clone()
    for _ in range(3):
        state, _ = world.step(state, torch.tensor([TERMINATE, 0]))
    assert state["episode"][0] > 0 and torch.equal(state["seed"], seeds)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_columns_of_another_shape_are_refused(place: int) -> None:
    class Misshapen(_Batched):
        def step(self, actions: Any) -> Any:
            result = list(super().step(actions))
            result[place] = result[place][:, None]
            return tuple(result)

    name = ("", "reward", "terminated", "truncated")[place]
    with pytest.raises(SpaceError, match=rf"gave {name} of shape \(2, 1\), expected \(2,\)"):
        _end_first(GymnasiumWorld(Misshapen(AutoresetMode.SAME_STEP), (), 2))


def test_disabled_resets_with_fresh_options_and_own_seeds() -> None:
    env = _Batched(AutoresetMode.DISABLED)
    world = GymnasiumWorld(env, (), 2)
    state = world.reset(random.make_keys([0])[0])
    env.calls.clear()
    for _ in range(2):
        state, _ = world.step(state, torch.tensor([TERMINATE, 0]))
    state, _ = world.step(state, torch.tensor([0, BOTH]))
    masks = [options["reset_mask"].tolist() for _, options in env.calls]
    assert masks == [[True, False], [True, False], [False, True]]
    assert env.calls[0][0][0] != env.calls[1][0][0]
    assert state["seed"].tolist() == [env.calls[1][0][0], env.calls[2][0][1]]
    assert state["episode"].tolist() == [2, 1] and state["elapsed"].tolist() == [1, 0]


def test_vector_env_that_takes_one_seed_only() -> None:
    class OneSeed(_Batched):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            if isinstance(seed, list):
                raise gym.error.Error("seed must be an integer")
            return super().reset(seed=seed, options=options)

    env = OneSeed(AutoresetMode.DISABLED)
    with pytest.warns(UserWarning, match="'OneSeed' takes one seed for all its rows"):
        state, transition = _end_first(GymnasiumWorld(env, (), 2))
    assert isinstance(env.calls[-2][0], int) and env.calls[-1][0] is None
    assert transition.observation.tolist() == [[0, 1], [1, 0]] and state["seed"][0] == env.calls[-2][0]


def test_gymnasiums_own_batched_environment() -> None:
    """CartPoleVectorEnv takes one seed, is NEXT_STEP, and is written by hand rather than made of single ones."""
    world = GymnasiumWorld(lambda num_envs: gym.make_vec("CartPole-v1", num_envs), (2,), 3)
    with pytest.warns(UserWarning, match="'CartPole-v1' takes one seed"):
        state = world.reset(random.make_keys([0, 1]))
    ended = torch.zeros(2, 3, dtype=torch.bool)
    for _ in range(60):
        state, transition = world.step(state, torch.ones(2, 3, dtype=torch.int64))
        assert torch.equal(~transition.valid, ended) and torch.equal(transition.memory_reset, ended)
        assert (transition.observation[ended].abs() <= 0.05).all()
        ended = transition.terminated | transition.truncated
    assert state["episode"].min() >= 4 and not world.exact_resume
