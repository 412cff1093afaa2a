"""World of gymnasium environments: seeds, worker processes, resuming, action masks, refused sources."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from rlmeta.envs.gymnasium.world import GymnasiumWorld, episode_seed
from rlmeta.envs.world import Transition
from rlmeta.errors import (
    CheckpointError,
    EnvironmentFailedError,
    InexactResumeError,
    MissingExtraError,
    SettingError,
    SpaceError,
    UnknownNameError,
)
from rlmeta.functional import random, tree

KEYS = random.make_keys([0, 1])
Factory = Callable[..., GymnasiumWorld]


@pytest.fixture
def world_of() -> Iterator[Factory]:
    """Fixture: a factory of worlds, which are closed at the end of the test."""
    worlds: list[GymnasiumWorld] = []

    def make(source: Any, learner_shape: tuple[int, ...] = (2,), num_envs: int = 2, **rest: Any) -> GymnasiumWorld:
        worlds.append(GymnasiumWorld(source, learner_shape, num_envs, **rest))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


class Toy(gym.Env[Any, Any]):
    """A seeded random walk of one float64 that ends by chance, or after `limit` steps."""

    observation_space: gym.Space[Any] = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gym.Space[Any] = spaces.Discrete(3)

    def __init__(self, limit: int = 10**9, **attributes: Any) -> None:
        self.limit, self.count = limit, 0
        self.__dict__.update(attributes)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.count = self.np_random.normal(), 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.x, self.count = self.x + float(np.sum(action)) + self.np_random.normal(), self.count + 1
        ended = bool(self.np_random.uniform() < 0.1)
        return self._observe(), np.float64(self.x), ended, self.count >= self.limit, {}

    def _observe(self) -> Any:
        return np.array([self.x], np.float32)


def _actions(world: GymnasiumWorld, t: int, keys: Tensor = KEYS) -> Any:
    """Random actions of step t, which depend on each learner's key alone."""
    space = world.action_space
    if isinstance(space, spaces.Discrete):
        return random.integers(keys, "action", t, (world.num_envs,), int(space.n))
    return random.normal(keys, "action", t, (world.num_envs, *(space.shape or ())))


def _run(world: GymnasiumWorld, state: Any, steps: range, keys: Tensor = KEYS) -> tuple[Any, list[Transition]]:
    transitions = []
    for t in steps:
        state, transition = world.step(state, _actions(world, t, keys))
        transitions.append(transition)
    return state, transitions


def _equal(a: Any, b: Any) -> bool:
    flat_a, flat_b = tree.flatten(a), tree.flatten(b)
    return list(flat_a) == list(flat_b) and all(torch.equal(leaf, flat_b[name]) for name, leaf in flat_a.items())


def _same_story(a: list[Transition], b: list[Transition]) -> bool:
    return len(a) == len(b) and all(_equal(x._asdict(), y._asdict()) for x, y in zip(a, b))


def _copy(state: Any) -> Any:
    return tree.map(torch.clone, state)


# ---------------------------------------------------------------------------------------------------- shapes and seeds


@pytest.mark.parametrize("shape", [(), (2,), (3,), (2, 2)])
def test_every_leaf_of_state_and_transition_starts_with_learners_and_environments(
    shape: tuple[int, ...], world_of: Factory
) -> None:
    world = world_of("CartPole-v1", shape, 3)
    keys = random.make_keys(range(int(np.prod(shape)))).view(shape)
    state = world.reset(keys)
    state, (transition,) = _run(world, state, range(1), keys)
    leaves = [*tree.leaves(state), *tree.leaves(transition._asdict())]
    assert all(leaf.shape[: len(shape) + 1] == (*shape, 3) for leaf in leaves)
    assert state["actions"].shape == (*shape, 3, 500) and state["actions"].dtype == torch.uint8
    assert transition.reward.dtype == torch.float32 and transition.observation.dtype == torch.float32
    flags = transition.terminated, transition.truncated, transition.valid, transition.memory_reset
    assert all(flag.dtype == torch.bool for flag in flags) and world.exact_resume
    assert world.observation(state) is state["observation"]


def test_rows_belong_to_learners_in_order(world_of: Factory) -> None:
    """Row r is environment r % N of learner r // N."""
    world = world_of(lambda: Toy(action_space=spaces.Box(-9, 9, (), np.float32), np_random=None), (2,), 3)
    state = world.reset(KEYS)
    before = state["observation"].clone()
    action = torch.arange(6.0).view(2, 3)
    noise = {}
    for row, seed in enumerate(state["seed"].flatten().tolist()):
        generator = np.random.default_rng(seed)
        noise[row] = generator.normal(), generator.normal()
    _, transition = world.step(state, action)
    for row in range(6):
        first, second = noise[row]
        assert before[row // 3, row % 3].item() == np.float32(first)
        assert transition.next_observation[row // 3, row % 3].item() == np.float32(first + row + second)


def test_episodes_start_from_their_seeds(world_of: Factory) -> None:
    """Episodes equal those of gymnasium with `state["seed"]`, and no two seeds are equal."""
    world, alone = world_of("CartPole-v1", (2,), 3), gym.make("CartPole-v1")
    state = world.reset(KEYS)
    seen = set()
    for t in range(120):
        for row in (state["elapsed"] == 0).nonzero().tolist():
            learner, env = row
            seed, episode = int(state["seed"][learner, env]), int(state["episode"][learner, env])
            assert 0 <= seed < 2**31 and seed not in seen
            assert seed == int(episode_seed(state["key"][learner, env], episode))
            seen.add(seed)
            assert np.array_equal(alone.reset(seed=seed)[0], state["observation"][learner, env].numpy())
        state, transitions = _run(world, state, range(t, t + 1))
        assert torch.equal(state["elapsed"] == 0, transitions[0].memory_reset)
    assert len(seen) == int((state["episode"] + 1).sum()) - int((state["elapsed"] == 0).sum()) > 20


def test_episode_seeds_are_distinct() -> None:
    keys = random.fold(random.fold(random.make_keys(range(10)), "environment").unsqueeze(-1), torch.arange(8))
    seeds = episode_seed(keys.unsqueeze(-1), torch.arange(20))
    assert seeds.unique().numel() == seeds.numel() == 1600
    assert seeds.min() >= 0 and seeds.max() < 2**31 and seeds.float().mean() / 2**30 == pytest.approx(1, abs=0.05)


def test_a_learner_does_not_see_its_company(world_of: Factory) -> None:
    keys = random.make_keys([4, 5, 6])
    together, alone = world_of(Toy, (3,), 2), world_of(Toy, (1,), 2)
    _, many = _run(together, together.reset(keys), range(40), keys)
    _, single = _run(alone, alone.reset(keys[1:2]), range(40), keys[1:2])
    for a, b in zip(many, single):
        assert _equal(tree.map(lambda leaf: leaf[1:2], a._asdict()), b._asdict())


def test_reset_again_starts_over(world_of: Factory) -> None:
    world = world_of(Toy)
    _, first = _run(world, world.reset(KEYS), range(30))
    _, second = _run(world, world.reset(KEYS), range(30))
    assert _same_story(first, second)
    _, other = _run(world, world.reset(KEYS + 1), range(30))
    assert not _same_story(first, other)


def test_what_a_step_returned_does_not_change_later(world_of: Factory) -> None:
    world = world_of(Toy)
    state = world.reset(KEYS)
    observation = world.observation(state)
    kept = [(observation, observation.clone())]
    for t in range(30):
        state, transition = world.step(state, _actions(world, t))
        kept += [(leaf, leaf.clone()) for leaf in tree.leaves(transition._asdict())]
    assert all(torch.equal(leaf, then) for leaf, then in kept)


# ------------------------------------------------------------------------------------------------ ends of an episode


def test_time_limit_truncates_and_both_flags_may_be_set(world_of: Factory) -> None:
    class Ends(Toy):
        def step(self, action: Any) -> Any:
            observation, reward, _, _, info = super().step(action)
            return observation, reward, bool(action == 1 and self.count == 4), False, info

    gym.register("rlmeta-test/Ends-v0", entry_point=Ends, max_episode_steps=4)
    world = world_of("rlmeta-test/Ends-v0")
    state, action = world.reset(KEYS), torch.tensor([[0, 1], [1, 0]])
    for _ in range(3):
        state, transition = world.step(state, action)
        assert not (transition.terminated | transition.truncated).any()
    state, transition = world.step(state, action)
    assert transition.truncated.all() and transition.terminated.tolist() == [[False, True], [True, False]]
    assert state["actions"].shape == (2, 2, 4) and not state["elapsed"].any()
    assert not torch.equal(transition.observation, transition.next_observation)


def test_not_finite_observations_and_rewards_pass(world_of: Factory) -> None:
    class NotFinite(Toy):
        def step(self, action: Any) -> Any:
            return np.array([np.nan], np.float32), np.inf, False, False, {}

    world = world_of(NotFinite)
    with pytest.warns(UserWarning, match="NotFinite"):
        _, transition = world.step(world.reset(KEYS), torch.zeros(2, 2, dtype=torch.int64))
    assert transition.observation.isnan().all() and transition.reward.isinf().all()


def test_info_and_options_are_left_alone(world_of: Factory) -> None:
    info = {"action_mask": np.ones(3, np.int8), "other": [1]}

    class Keeps(Toy):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            assert options is None
            return super().reset(seed=seed)[0], info

        def step(self, action: Any) -> Any:
            return (*super().step(action)[:4], info)

    world = world_of(Keeps)
    _run(world, world.reset(KEYS), range(30))
    assert list(info) == ["action_mask", "other"] and info["other"] == [1]


# -------------------------------------------------------------------------------------------------- worker processes


class Nested(Toy):
    """Environment with dictionary observations and Tuple actions, which keeps an action."""

    action_space = spaces.Tuple([spaces.Discrete(2, start=3), spaces.Box(-1, 1, (2,), np.float64)])
    observation_space = spaces.Dict(
        x=spaces.Box(-np.inf, np.inf, (1,)), last=spaces.Tuple([spaces.Box(-1, 1, (2,), np.float64)])
    )
    last: Any = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.last = np.zeros(2)
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        observation = {"x": super()._observe(), "last": (self.last,)}
        self.last = action[1]
        return observation, *super().step(action[0])[1:]

    def _observe(self) -> Any:
        return {"x": super()._observe(), "last": (self.last,)}


def _nested_actions(t: int) -> dict[str, Tensor]:
    return {"0": random.integers(KEYS, "a", t, (3,), 2), "1": random.normal(KEYS, "b", t, (3, 2))}


def test_workers_tell_the_same_story(world_of: Factory) -> None:
    stories, states = [], []
    for settings in ({}, {"mode": "async", "workers": 2}):
        world = world_of(Nested, (2,), 3, max_log=30, **settings)
        state, story = world.reset(KEYS), []
        for t in range(40):
            state, transition = world.step(state, _nested_actions(t))
            story.append(transition)
        stories.append(story)
        states.append(state)
        world.close()
    assert _same_story(*stories) and _equal(*states)
    assert any(transition.terminated.any() for transition in stories[0])


@pytest.mark.parametrize("workers", [1, 3, 9, None])
def test_any_number_of_workers(workers: int | None, world_of: Factory) -> None:
    sync, parallel = world_of(Toy, (2,), 2), world_of(Toy, (2,), 2, mode="async", workers=workers)
    a, b = (_run(world, world.reset(KEYS), range(12))[1] for world in (sync, parallel))
    assert _same_story(a, b)


def _fails(at: int, how: str) -> Callable[[], gym.Env]:
    class Fails(Toy):
        def step(self, action: Any) -> Any:
            result = super().step(action)
            if self.count == at and how == "raise":
                raise ZeroDivisionError("the wheel came off")
            if self.count == at and how == "die":
                os._exit(7)
            if self.count == at and how == "shape":
                return np.zeros((1, 1), np.float32), *result[1:]
            return result[0], 0.0, False, False, {}

    return Fails


def test_exception_of_a_worker_surfaces_with_its_traceback(world_of: Factory) -> None:
    world = world_of(_fails(3, "raise"), mode="async", workers=2)
    state, _ = _run(world, world.reset(KEYS), range(2))
    with pytest.raises(EnvironmentFailedError, match="Fails' in row 0 failed with ZeroDivisionError: the whe") as error:
        world.step(state, _actions(world, 2))
    assert "rows 0 to 1:\nTraceback" in error.value.__notes__[0] and "in step\n" in error.value.__notes__[0]
    with pytest.raises((EnvironmentFailedError, SettingError)):
        world.step(state, _actions(world, 3))
    with pytest.raises(EnvironmentFailedError, match="closed"):
        world.reset(KEYS)


def test_space_errors_of_a_worker_stay_space_errors(world_of: Factory) -> None:
    world = world_of(_fails(1, "shape"), mode="async", workers=2)
    with pytest.raises(SpaceError, match=r"Fails.*\(1, 1\).*\(1,\)"):
        world.step(world.reset(KEYS), _actions(world, 0))


def test_a_worker_that_dies_is_reported(world_of: Factory) -> None:
    world = world_of(_fails(1, "die"), mode="async", workers=2)
    with pytest.raises(EnvironmentFailedError, match="rows 0 to 1, died with exit code 7"):
        world.step(world.reset(KEYS), _actions(world, 0))


def test_failure_while_starting_closes_the_others() -> None:
    parent = os.getpid()

    class Broken(Toy):
        def __init__(self) -> None:
            if os.getpid() != parent:
                raise OSError("no display")
            super().__init__()

    before = set(_children())
    with pytest.raises(EnvironmentFailedError, match="no display"):
        GymnasiumWorld(Broken, (2,), 2, mode="async", workers=2)
    assert set(_children()) <= before


def _children() -> list[int]:
    import multiprocessing

    return [process.pid or 0 for process in multiprocessing.active_children()]


def test_close_ends_the_workers_and_may_be_repeated(world_of: Factory) -> None:
    before = set(_children())
    world = world_of(Toy, mode="async", workers=2)
    world.reset(KEYS)
    assert len(set(_children()) - before) == 3, "two workers and their guard"
    world.close()
    world.close()
    assert set(_children()) <= before


def test_a_forgotten_world_ends_its_workers() -> None:
    before = set(_children())
    world = GymnasiumWorld(Toy, (2,), 2, mode="async", workers=2)
    assert set(_children()) - before
    del world
    assert set(_children()) <= before


_SCRIPT = """
import signal

import torch
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.functional import random

def step_forever():
    global world, state
    world = GymnasiumWorld("CartPole-v1", (1,), 4, mode="async", workers=2)
    state = world.reset(random.make_keys([0]))
    print(*(process.pid for process in world._rows._processes), flush=True)
    while True:
        state, _ = world.step(state, torch.zeros(1, 4, dtype=torch.int64))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    try:
        step_forever()
    except KeyboardInterrupt:
        try:
            world.step(state, torch.zeros(1, 4, dtype=torch.int64))
            print("stepped", flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)
        world.close()
    step_forever()
"""


def test_workers_end_with_their_parent_and_print_nothing(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group, a kill the parent alone."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    interrupted = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    # Interrupted between two steps the world still steps; within one it says that it is out of step.
    assert process.stdout.readline().split() in (["SettingError"], ["stepped"])
    orphaned = [int(pid) for pid in process.stdout.readline().split()]
    assert len({*interrupted, *orphaned}) == 6 and not any(_alive(pid) for pid in interrupted)
    assert all(_alive(pid) for pid in orphaned)
    process.kill()
    out, err = process.communicate(timeout=20)
    assert err == "" and out == ""
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in orphaned):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("name", "envs"), [("LunarLander-v3", 2), ("CartPole-v1", 3)])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_restored_world_continues_as_the_uninterrupted_one(name: str, envs: int, mode: Any, world_of: Factory) -> None:
    world = world_of(name, (2,), envs)
    state, _ = _run(world, world.reset(KEYS), range(300))
    saved = _copy(state)
    ended, straight = _run(world, state, range(300, 500))
    assert saved["elapsed"].max() > 10 and saved["episode"].min() > 0

    fresh = world_of(name, (2,), envs, mode=mode)
    restored = fresh.restore(_copy(saved))
    assert _equal(restored, saved)
    again, resumed = _run(fresh, restored, range(300, 500))
    assert _same_story(straight, resumed)
    assert _equal(ended, again)


def test_restore_of_continuous_actions_replays_what_was_executed(world_of: Factory) -> None:
    """Actions outside the bounds, in float64: the log has the executed actions."""
    box = spaces.Box(-0.3, 0.3, (2,), np.float64)
    world, fresh = (world_of(lambda: Toy(action_space=box), max_log=100) for _ in range(2))
    state = world.reset(KEYS)
    for t in range(25):
        state, _ = world.step(state, random.normal(KEYS, "action", t, (2, 2), torch.float64))
    saved = _copy(state)
    assert _equal(fresh.restore(_copy(saved)), saved)
    assert _same_story(_run(world, state, range(25, 60))[1], _run(fresh, saved, range(25, 60))[1])


def test_learners_may_be_taken_out_and_continued(world_of: Factory) -> None:
    keys = random.make_keys([4, 5, 6])
    world = world_of(Toy, (3,), 2)
    state, _ = _run(world, world.reset(keys), range(20), keys)
    part = tree.map(lambda leaf: leaf[[2, 0]].clone(), state)
    fresh = world_of(Toy, (2,), 2)
    _, some = _run(fresh, fresh.restore(part), range(20, 40), keys[[2, 0]])
    _, every = _run(world, state, range(20, 40), keys)
    for a, b in zip(every, some):
        assert _equal(tree.map(lambda leaf: leaf[[2, 0]], a._asdict()), b._asdict())


def test_restore_in_place_rewinds(world_of: Factory) -> None:
    world = world_of(Toy)
    state, _ = _run(world, world.reset(KEYS), range(10))
    saved = _copy(state)
    _, first = _run(world, state, range(10, 40))
    _, second = _run(world, world.restore(saved), range(10, 40))
    assert _same_story(first, second)


class Forgetful(Toy):
    """Random walk that, in every second environment, also depends on the number of earlier episodes."""

    instances = 0
    seen = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).instances += 1
        self.honest = self.instances % 2 == 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.seen += 1
        self.x += 0 if self.honest else self.seen
        return self._observe(), {}


def test_environment_that_cannot_be_replayed_is_reported(world_of: Factory) -> None:
    world = world_of(Forgetful)
    state, _ = _run(world, world.reset(KEYS), range(30))
    saved = _copy(state)
    with pytest.raises(InexactResumeError, match=r"2 of 4 rows .*Forgetful.*another observation.*--inexact"):
        world.restore(_copy(saved))
    with pytest.raises(SettingError, match="restore"):
        world.step(_copy(saved), _actions(world, 30))

    state = world.restore(_copy(saved), inexact=True)
    kept = state["episode"] == saved["episode"]
    assert int(kept.sum()) == 2
    assert torch.equal(state["episode"][~kept], saved["episode"][~kept] + 1) and not state["elapsed"][~kept].any()
    for name in state:
        assert torch.equal(state[name][kept], saved[name][kept])
    assert torch.equal(state["seed"], episode_seed(state["key"], state["episode"]))
    _run(world, state, range(30, 40))


def test_episode_that_ends_early_in_its_replay_is_reported(world_of: Factory) -> None:
    """The observation does not reveal the difference."""

    class Shortens(Toy):
        lives = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.lives += 1
            return super().reset(seed=seed)

        def step(self, action: Any) -> Any:
            return *super().step(action)[:2], False, self.lives > 1 and self.count == 2, {}

    world = world_of(Shortens)
    state, _ = _run(world, world.reset(KEYS), range(5))
    with pytest.raises(InexactResumeError, match="4 of 4"):
        world.restore(state)


def test_episode_that_terminates_in_its_replay_is_reported(world_of: Factory) -> None:
    class Dies(Toy):
        lives = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.lives += 1
            return super().reset(seed=seed)

        def step(self, action: Any) -> Any:
            return *super().step(action)[:2], self.lives > 1 and self.count == 5, False, {}

    world = world_of(Dies)
    state, _ = _run(world, world.reset(KEYS), range(5))
    with pytest.raises(InexactResumeError, match="4 of 4"):
        world.restore(state)


def test_close_closes_every_environment(world_of: Factory) -> None:
    closed: list[int] = []

    class Closes(Toy):
        def close(self) -> None:
            closed.append(id(self))

    world = world_of(Closes)
    looked_at = len(closed)
    world.close()
    assert len(set(closed[looked_at:])) == 4


def test_log_that_is_too_short_is_reported(world_of: Factory) -> None:
    class Endless(Toy):
        def step(self, action: Any) -> Any:
            result = super().step(action)
            return *result[:2], bool(action == 2), False, {}

    world = world_of(Endless, max_log=5)
    state = world.reset(KEYS)
    for t in range(8):
        state, _ = world.step(state, torch.tensor([[0, 1], [2, 2 if t == 3 else 1]]))
    assert state["elapsed"].tolist() == [[8, 8], [0, 4]]
    with pytest.raises(InexactResumeError, match=r"2 of 4.*8 steps long and only 5 were kept"):
        world.restore(_copy(state))
    fresh = world.restore(_copy(state), inexact=True)
    assert fresh["elapsed"].tolist() == [[0, 0], [0, 4]] and fresh["episode"].tolist() == [[1, 1], [8, 1]]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_env_cannot_be_replayed(mode: AutoresetMode, world_of: Factory) -> None:
    def make() -> SyncVectorEnv:
        return SyncVectorEnv([Toy] * 4, autoreset_mode=mode)

    world = world_of(make)
    state, _ = _run(world, world.reset(KEYS), range(30))
    assert not world.exact_resume and "actions" not in state
    fresh = world_of(make)
    with pytest.raises(InexactResumeError, match=r"resets its environments itself.*--inexact"):
        fresh.restore(_copy(state))
    started = fresh.restore(_copy(state), inexact=True)
    assert torch.equal(started["episode"], state["episode"] + 1) and not started["elapsed"].any()
    assert torch.equal(started["seed"], episode_seed(state["key"], started["episode"]))
    expected = [Toy().reset(seed=seed)[0] for seed in started["seed"].flatten().tolist()]
    assert np.array_equal(started["observation"].flatten(0, 1).numpy(), np.stack(expected))
    _, (first, *_) = _run(fresh, started, range(30, 40))
    assert first.valid.all()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: tree.map(lambda leaf: leaf[:1], s),
        lambda s: {**s, "observation": s["observation"][..., :3]},
        lambda s: {**s, "actions": s["actions"][..., :10]},
        lambda s: {name: leaf for name, leaf in s.items() if name != "actions"},
        lambda s: {**s, "physics": s["seed"]},
        lambda s: {**s, "observation": {"a": s["observation"]}},
    ],
)
def test_state_of_another_world_is_refused(change: Any, world_of: Factory) -> None:
    world = world_of("CartPole-v1")
    with pytest.raises(CheckpointError, match="another"):
        world.restore(change(world.reset(KEYS)))


def test_stale_state_is_refused(world_of: Factory) -> None:
    world = world_of(Toy)
    old = _copy(world.reset(KEYS))
    state, _ = _run(world, _copy(old), range(3))
    with pytest.raises(SettingError, match="restore"):
        world.step(old, _actions(world, 3))
    _run(world, _copy(state), range(3, 4))


def test_interrupted_step_asks_for_restore(world_of: Factory) -> None:
    world = world_of(_fails(3, "raise"))
    state, _ = _run(world, world.reset(KEYS), range(2))
    saved = _copy(state)
    with pytest.raises(EnvironmentFailedError, match="ZeroDivisionError"):
        world.step(state, _actions(world, 2))
    with pytest.raises(SettingError, match="restore"):
        world.step(saved, _actions(world, 2))
    assert _equal(world.restore(_copy(saved)), saved)


# -------------------------------------------------------------------------------------------------------- action masks


class Masked(Toy):
    """Environment that allows action a at count c if (a + c) is not divisible by 3, with a choice of mask sources."""

    def __init__(self, says: str, actions: Any = None) -> None:
        super().__init__(limit=7)
        self.says = says
        self.action_space = actions or spaces.Discrete(3)
        if says == "observation":
            self.observation_space = spaces.Dict(pos=Toy.observation_space, action_mask=spaces.MultiBinary(3))
        if says == "method":
            self.action_masks = self.allowed

    def allowed(self) -> Any:
        assert self.count < 10**6
        return (np.arange(3) + self.count) % 3 != 0

    def _observe(self) -> Any:
        self.shown = super()._observe() * 0 + self.count
        return self.shown if self.says != "observation" else {"pos": self.shown, "action_mask": self.allowed()}

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.allowed().astype(np.int8)} if self.says == "info" else {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], self._info()

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, _ = super().step(action)
        return observation, float(self.allowed()[0]), terminated, truncated, {} if terminated else self._info()


@pytest.mark.parametrize("vector", [None, *AutoresetMode], ids=str)
@pytest.mark.parametrize("says", ["method", "info", "observation"])
def test_action_masks_are_part_of_the_observation(says: str, vector: Any, world_of: Factory) -> None:
    make = lambda: Masked(says)  # noqa: E731 - a class would be one per case
    world = world_of(make if vector is None else SyncVectorEnv([make] * 4, autoreset_mode=vector))
    assert isinstance(world.observation_space, spaces.Dict)
    assert world.observation_space["action_mask"] == spaces.MultiBinary(3)
    inner = "pos" if says == "observation" else "observation"
    assert set(world.observation_space.spaces) == {inner, "action_mask"}
    state, ends = world.reset(KEYS), 0
    for t in range(40):
        state, transition = world.step(state, _actions(world, t))
        for seen, final in ((transition.observation, False), (transition.next_observation, True)):
            count, mask = seen[inner].long(), seen["action_mask"]
            expected = ((torch.arange(3) + count) % 3 != 0).long()
            assert mask.shape == (2, 2, 3) and mask.dtype == torch.int64
            # a terminal state may allow everything; NEXT_STEP shows it as the observation too
            excused = transition.terminated if final or vector is AutoresetMode.NEXT_STEP else torch.zeros(2, 2).bool()
            if final and vector is AutoresetMode.SAME_STEP and says == "method":  # it was reset before it can be asked
                excused = excused | transition.truncated
            assert ((mask == expected) | (excused.unsqueeze(-1) & (mask == 1))).all()
        ends += int(transition.truncated.sum())
    assert ends > 3


@pytest.mark.parametrize("mode", AutoresetMode)
def test_masks_in_a_list_of_infos(mode: AutoresetMode, world_of: Factory) -> None:
    """Equal to those in a dictionary of infos, in every row and step."""
    stories = []
    for wrap in (lambda env: env, gym.wrappers.vector.DictInfoToList):
        world = world_of(wrap(SyncVectorEnv([lambda: Masked("info")] * 4, autoreset_mode=mode)))
        assert "action_mask" in world.observation_space.spaces  # type: ignore[attr-defined]
        stories.append(_run(world, world.reset(KEYS), range(30))[1])
    assert _same_story(*stories)
    assert any((step.observation["action_mask"] == 0).any() for step in stories[0])


def test_masks_of_actions_that_are_not_counted_from_zero(world_of: Factory) -> None:
    """Masks and the actions of agents are counted from 0, wherever the space begins."""

    class FromOne(Masked):
        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action) and self.allowed()[action - 1]
            return super().step(action)

    world = world_of(lambda: FromOne("info", spaces.Discrete(3, start=1)))
    state = world.reset(KEYS)
    for _ in range(20):
        allowed = world.observation(state)["action_mask"]
        state, _ = world.step(state, allowed.argmax(-1))


@pytest.mark.parametrize("vector", [None, AutoresetMode.SAME_STEP], ids=str)
def test_a_dictionary_that_shows_no_mask_gets_that_of_the_infos(vector: Any, world_of: Factory) -> None:
    class InDict(Masked):
        observation_space = spaces.Dict(pos=Toy.observation_space)

        def _observe(self) -> Any:
            return {"pos": super()._observe()}

    def make() -> gym.Env:
        return InDict("info")

    world = world_of(make if vector is None else SyncVectorEnv([make] * 4, autoreset_mode=vector))
    shown = world.reset(KEYS)["observation"]
    assert set(shown) == {"observation", "action_mask"} and set(shown["observation"]) == {"pos"}
    assert (shown["action_mask"] == 0).any()


@pytest.mark.parametrize("vector", [None, AutoresetMode.SAME_STEP], ids=str)
def test_a_mask_that_is_shown_twice_is_read_once(vector: Any, world_of: Factory) -> None:
    class Twice(Masked):
        def _info(self) -> dict[str, Any]:
            return {"action_mask": np.zeros(3, np.int8)}

    def make() -> gym.Env:
        return Twice("observation")

    world = world_of(make if vector is None else SyncVectorEnv([make] * 4, autoreset_mode=vector))
    assert set(world.observation_space.spaces) == {"pos", "action_mask"}  # type: ignore[attr-defined]
    assert world.reset(KEYS)["observation"]["action_mask"].any()


@pytest.mark.parametrize("vector", [None, AutoresetMode.SAME_STEP], ids=str)
def test_infos_do_not_mask_actions_that_are_not_counted(vector: Any, world_of: Factory) -> None:
    def make() -> gym.Env:
        return Masked("info", spaces.Box(-1, 1, (3,)))

    world = world_of(make if vector is None else SyncVectorEnv([make] * 4, autoreset_mode=vector))
    assert world.observation_space == Toy.observation_space


def test_a_vector_env_may_have_masks_of_its_own(world_of: Factory) -> None:
    class Own(SyncVectorEnv):
        def action_masks(self) -> Any:
            return np.array([[1, 0, 0]] * 4)

    world = world_of(Own([Toy] * 4, autoreset_mode=AutoresetMode.SAME_STEP))
    assert world.reset(KEYS)["observation"]["action_mask"].flatten(0, 1).tolist() == [[1, 0, 0]] * 4


def test_mask_of_several_choices_and_its_limits(world_of: Factory) -> None:
    several = spaces.MultiDiscrete([2, 1])
    world = world_of(lambda: Masked("info", several))
    assert world.observation_space["action_mask"] == spaces.MultiBinary(3)  # type: ignore[index]
    with pytest.raises(SpaceError, match="masked"):
        world_of(lambda: Masked("method", spaces.Box(-1, 1, (3,))))
    with pytest.raises(SpaceError, match=r"shape \(3,\)"):
        bad = world_of(lambda: Masked("method", spaces.Discrete(4)))
        bad.reset(KEYS)


def test_mask_that_goes_missing_is_refused(world_of: Factory) -> None:
    class Loses(Masked):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:2], False, False, {}

    for source in (lambda: Loses("info"), SyncVectorEnv([lambda: Loses("info")] * 4)):
        world = world_of(source)
        with pytest.raises(SpaceError, match="action_mask"):
            world.step(world.reset(KEYS), _actions(world, 0))


# ------------------------------------------------------------------------------------------------- what is refused


def _with(**attributes: Any) -> Callable[[], gym.Env]:
    return lambda: Toy(**attributes)


def _returning(step: Any = None, reset: Any = None) -> Callable[[], gym.Env]:
    class Returns(Toy):
        def step(self, action: Any) -> Any:
            return super().step(action) if step is None else step

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            result = super().reset(seed=seed)
            return result if reset is None or seed == 0 else reset  # the first look is at seed 0

    return Returns


_fine = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_returning(step=(np.zeros(2, np.float32), 0, False, False, {})), r"Returns.*\(2,\).*\(1,\)"),
        (_returning(step=(np.zeros(1, "U3"), 0, False, False, {})), r"Returns.*<U3.*float32"),
        (_returning(step=(np.zeros(2, np.float32), 0, True, False, {})), r"Returns.*\(2,\).*\(1,\)"),
        (_returning(step=(_fine, 0, False, {})), "4 values"),
        (_returning(step=(_fine, np.zeros(2), False, False, {})), "reward"),
        (_returning(step=(_fine, None, False, False, {})), "reward None"),
        (_returning(reset=_fine), r"ndarray from reset"),
        (_returning(reset=(np.zeros(2, np.float32), {})), r"\(2,\).*\(1,\)"),
    ],
)
def test_environment_that_breaks_its_word_is_named(make: Any, match: str, world_of: Factory) -> None:
    world = world_of(make)
    with pytest.raises(SpaceError, match=match):
        world.step(world.reset(KEYS), _actions(world, 0))


@pytest.mark.parametrize("odd", [None, "a", np.zeros(2), np.zeros((0,)), [1.0]])
@pytest.mark.parametrize("column", [1, 2, 3])
def test_the_value_of_the_row_that_is_odd_is_named(odd: Any, column: int, world_of: Factory) -> None:
    class Odd(Toy):
        def step(self, action: Any) -> Any:
            result = list(super().step(action))
            if action == 2:
                result[column] = odd
            elif column > 1:
                result[column] = False
            return tuple(result)

    world = world_of(Odd)
    with pytest.raises(SpaceError) as error:
        world.step(world.reset(KEYS), torch.tensor([[0, 0], [2, 0]]))
    name = ("", "reward", "terminated", "truncated")[column]
    assert f"'Odd' gave {name} {odd!r} from step()" in str(error.value)


def test_wrong_actions_reach_no_environment(world_of: Factory) -> None:
    world = world_of(Toy)
    state = world.reset(KEYS)
    for action in (torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2), torch.full((2, 2), 3)):
        with pytest.raises(SpaceError):
            world.step(state, action)
    _run(world, state, range(5))


@pytest.mark.parametrize("key", [KEYS[0], KEYS[:1], KEYS.float(), random.make_keys([0, 1, 2])])
def test_wrong_keys_are_refused(key: Tensor, world_of: Factory) -> None:
    with pytest.raises(SettingError, match="key"):
        world_of(Toy).reset(key)


@pytest.mark.parametrize(
    ("make", "settings", "error", "match"),
    [
        ("CartPool-v1", {}, UnknownNameError, "CartPole-v1"),
        ("CartPole-v99", {}, UnknownNameError, "CartPole-v1"),
        ("nonexistent_module:Thing-v0", {}, MissingExtraError, "nonexistent_module"),
        ("CartPole-v1", {"settings": {"size": 7}}, SettingError, "size"),
        (Toy(), {}, SettingError, "function that makes one"),
        (7, {}, SettingError, "int"),
        (lambda: 7, {}, SettingError, "returned int"),
        ("CartPole-v1", {"mode": "threads"}, SettingError, "threads"),
        ("CartPole-v1", {"workers": 2}, SettingError, "async"),
        ("CartPole-v1", {"mode": "async", "workers": 0}, SettingError, "workers is 0"),
        ("CartPole-v1", {"num_envs": 0}, SettingError, "num_envs is 0"),
        ("CartPole-v1", {"max_log": 0}, SettingError, "max_log 0"),
        (SyncVectorEnv([Toy] * 4), {"settings": {"a": 1}}, SettingError, "settings"),
        (_with(observation_space=spaces.Text(3)), {}, SpaceError, "observation space.*Text"),
        (_with(action_space=spaces.Sequence(spaces.Discrete(2))), {}, SpaceError, "action space.*Sequence"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, settings: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        GymnasiumWorld(make, **{"learner_shape": (2,), "num_envs": 2, **settings})


def test_factory_must_make_a_new_environment_each_time() -> None:
    only = Toy()
    with pytest.raises(SettingError, match="twice"):
        GymnasiumWorld(lambda: only, (), 2)


def test_factory_must_make_equal_spaces() -> None:
    sizes = iter(range(2, 9))
    with pytest.raises(SpaceError, match="different spaces"):
        GymnasiumWorld(lambda: Toy(action_space=spaces.Discrete(next(sizes))), (), 2)
    sizes = iter(range(2, 9))
    with pytest.raises(SpaceError, match="different spaces"):
        GymnasiumWorld(lambda: Toy(observation_space=spaces.Discrete(next(sizes))), (), 2)


def test_settings_reach_the_environment(world_of: Factory) -> None:
    for source in (Toy, "rlmeta-test/Toy-v0"):
        if isinstance(source, str):
            gym.register(source, entry_point=Toy)
        world = world_of(source, settings={"limit": 3})
        _, transitions = _run(world, world.reset(KEYS), range(3))
        done = [transition.terminated | transition.truncated for transition in transitions]
        assert torch.stack(done).any(0).all()


@pytest.mark.parametrize(
    ("make", "capacity"),
    [
        ("CartPole-v1", 500),
        (lambda: gym.wrappers.TimeLimit(Toy(), 12), 12),
        (lambda: gym.make("CartPole-v1", max_episode_steps=30), 30),
        (Toy, 77),
    ],
)
def test_log_holds_an_episode(make: Any, capacity: int, world_of: Factory) -> None:
    assert world_of(make, max_log=77).reset(KEYS)["actions"].shape == (2, 2, capacity)


def test_time_limit_in_settings(world_of: Factory) -> None:
    assert world_of("CartPole-v1", settings={"max_episode_steps": 9}).reset(KEYS)["actions"].shape == (2, 2, 9)
