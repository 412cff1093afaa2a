"""NativeWorld: rows, keys, episodes, physics and transitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlmeta.data.spaces import Layout
from rlmeta.envs.native import (
    NATIVE,
    Bandit,
    CartPole,
    FrozenLake,
    GridWorld,
    MountainCar,
    NativeEnv,
    NativeWorld,
    Pendulum,
    Physics,
    TabularMDP,
)
from rlmeta.envs.native.base import _NoiseCache
from rlmeta.envs.native.trials import TrialWorld
from rlmeta.envs.world import State, Transition
from rlmeta.errors import SettingError, SpaceError, UnknownNameError
from rlmeta.functional import random, tree
from rlmeta.functional.random import fold, make_keys
from rlmeta.functional.tree import Tree


@dataclass(frozen=True)
class Clock(NativeEnv):
    """Environment that observes its step number and ends at `end`, or at once by action 1."""

    end: float = 5.0
    max_episode_steps: int | None = None

    reset_noise = 1
    step_noise = 2

    @property
    def observation_space(self) -> gym.Space:
        return gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    @property
    def action_space(self) -> gym.Space:
        return gym.spaces.Discrete(2)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        return {"time": torch.zeros_like(noise[..., 0]), "mark": noise[..., 0], "seen": noise.new_zeros(noise.shape)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        time = state["time"] + 1
        seen = noise[..., :1] - noise[..., 1:]
        ended = (time >= physics.get("end", self.end)) | (action == 1)
        return {"time": time, "mark": state["mark"], "seen": seen}, time.float(), ended

    def observe(self, state: State) -> Tensor:
        return torch.stack((state["time"], state["mark"]), -1).float()


def random_actions(world: NativeWorld, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = (count, *world.learner_shape, world.num_envs)
    if isinstance(world.action_space, gym.spaces.Discrete):
        return torch.randint(int(world.action_space.n), rows, generator=generator)
    assert world.action_space.shape is not None
    return torch.randn(*rows, *world.action_space.shape, generator=generator)


def roll(world: NativeWorld, state: State, actions: Tensor) -> tuple[State, list[Transition]]:
    transitions = []
    for action in actions:
        state, transition = world.step(state, action)
        transitions.append(transition)
    return state, transitions


def same(a: Any, b: Any) -> bool:
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# ------------------------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("shape", [((), 1), ((), 3), ((2,), 2), ((2, 3), 2)])
def test_shapes_and_types(name: str, shape: tuple[tuple[int, ...], int]) -> None:
    learners, count = shape
    world = NativeWorld(NATIVE[name], learners, count)
    key = make_keys(range(math.prod(learners))).reshape(learners)
    state = world.reset(key)
    rows = (*learners, count)
    layout = Layout(world.observation_space)
    forms = [((*rows, *leaf.shape), str(leaf.stored)) for leaf in layout.leaves]

    def form_of(observation: Tree) -> list[tuple[tuple[int, ...], str]]:
        parts = layout.unnest(observation, "an observation")
        return [(tuple(part.shape), str(part.dtype).removeprefix("torch.")) for part in parts]

    assert all(leaf.shape[: len(rows)] == rows for leaf in tree.leaves(state))
    assert form_of(world.observation(state)) == forms
    state, transition = world.step(state, random_actions(world, 1)[0])
    assert all(leaf.shape[: len(rows)] == rows for leaf in tree.leaves(state))
    assert form_of(transition.observation) == form_of(transition.next_observation) == forms
    assert transition.reward.shape == rows and transition.reward.dtype == torch.float32
    for flag in (transition.terminated, transition.truncated, transition.valid, transition.memory_reset):
        assert flag.shape == rows and flag.dtype == torch.bool
    assert transition.valid.all()
    assert same(world.observation(state), transition.observation)


def test_observations_lie_in_the_space() -> None:
    for name, env in NATIVE.items():
        world = NativeWorld(env, (), 4)
        _, transitions = roll(world, world.reset(make_keys([1])[0]), random_actions(world, 60))
        for transition in transitions:
            for row in range(4):
                shown = tree.map(
                    lambda x, i=row: x[i].numpy() if x.dim() > 1 else int(x[i]), transition.next_observation
                )
                assert env.observation_space.contains(shown), name


# ---------------------------------------------------------------------------------------------- episodes and resets


def test_an_episode_that_ends_starts_the_next_at_once() -> None:
    world = NativeWorld(Clock(end=3.0), (), 2)
    state = world.reset(make_keys([4])[0])
    first = world.observation(state)
    actions = torch.tensor([[0, 1], [0, 0], [0, 0], [0, 0]])
    _, (a, b, c, d) = roll(world, state, actions)
    assert [t.terminated.tolist() for t in (a, b, c, d)] == [
        [False, True],
        [False, False],
        [True, False],
        [False, True],
    ]
    assert all(torch.equal(t.memory_reset, t.terminated | t.truncated) for t in (a, b, c, d))
    assert [t.next_observation[:, 0].tolist() for t in (a, b, c, d)] == [[1, 1], [2, 1], [3, 2], [1, 3]]
    assert [t.observation[:, 0].tolist() for t in (a, b, c, d)] == [[1, 0], [2, 1], [0, 2], [1, 0]]
    assert [t.reward.tolist() for t in (a, b, c, d)] == [[1, 1], [2, 1], [3, 2], [1, 3]]
    assert a.next_observation[1, 1] == first[1, 1] != a.observation[1, 1]  # the new episode has its own mark
    assert b.observation[1, 1] == a.observation[1, 1] and c.observation[0, 1] != first[0, 1]
    assert b.observation is b.next_observation


@pytest.mark.parametrize(("end", "both"), [(4.0, True), (9.0, False)])
def test_truncation_at_the_limit_with_or_without_termination(end: float, both: bool) -> None:
    world = NativeWorld(Clock(end=end, max_episode_steps=4), (), 1)
    _, transitions = roll(world, world.reset(make_keys([0])[0]), torch.zeros(9, 1, dtype=torch.int64))
    assert [bool(t.truncated) for t in transitions] == [False, False, False, True] * 2 + [False]
    assert [bool(t.terminated) for t in transitions] == [False, False, False, both] * 2 + [False]
    assert [bool(t.memory_reset) for t in transitions] == [False, False, False, True] * 2 + [False]
    assert transitions[3].next_observation[0, 0] == 4 and transitions[3].observation[0, 0] == 0


def test_episode_and_elapsed_count() -> None:
    world = NativeWorld(Clock(end=3.0), (2,), 2)
    state, _ = roll(world, world.reset(make_keys([0, 1])), torch.zeros(7, 2, 2, dtype=torch.int64))
    assert torch.equal(state["episode"], torch.full((2, 2), 2))
    assert torch.equal(state["elapsed"], torch.full((2, 2), 1))
    assert torch.equal(state["step_count"], torch.full((2, 2), 7))


CONTROLLERS = {
    "CartPole-v1": lambda o: int(3 * o[2] + o[3] + 0.3 * o[1] + 0.1 * o[0] > 0),
    "MountainCar-v0": lambda o: 1,
    "MountainCarContinuous-v0": lambda o: np.array([0.1 if o[1] > 0 else -0.2]),
    "Acrobot-v1": lambda o: 1,
    "Pendulum-v1": lambda o: np.array([2.0 * np.sign(o[2])]),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_whole_episodes_equal_gymnasium_and_end_at_the_same_step(name: str) -> None:
    """With the same initial state and controller, up to gymnasium's time limit.

    The states are made equal after every step: what rounding leaves between them would grow, for a pole is unstable.
    """
    world = NativeWorld(NATIVE[name], (), 1)
    state = world.reset(make_keys([5])[0])
    reference = gym.make(name, disable_env_checker=True)
    observation, _ = reference.reset(seed=0)
    inner: Any = reference.unwrapped
    observation = world.observation(state)[0].numpy()
    length, ended = 0, False
    while not ended:
        action = CONTROLLERS[name](observation)
        inner.state = state["env"]["state"][0].numpy().copy()
        observation, reward, terminated, truncated, _ = reference.step(action)
        state, transition = world.step(state, torch.as_tensor(action).unsqueeze(0))
        np.testing.assert_array_equal(transition.next_observation[0], observation)
        assert transition.reward[0] == np.float32(reward)
        assert bool(transition.terminated) == terminated and bool(transition.truncated) == truncated
        length, ended = length + 1, terminated or truncated
    assert truncated and not terminated and length == NATIVE[name].max_episode_steps


# ---------------------------------------------------------------------------------------------------- random numbers


def reference_rollout(env: NativeEnv, key: Tensor, row: int, actions: Tensor) -> list[Tensor]:
    """Reference rollout of a row by a loop: next observations, observations, rewards and ends."""
    key = fold(key, row)
    episode, elapsed, out = 0, 0, []

    def uniform(stream: str, counter: int, width: int) -> Tensor:
        return random.uniform(key, stream, counter, (width,), torch.float64).unsqueeze(0)

    state = env.reset(uniform("environment/reset", 0, env.reset_noise), {})
    for step, action in enumerate(actions):
        noise = uniform("environment/step", step, env.step_noise)
        state, reward, terminated = env.step(state, action.unsqueeze(0), noise, {})
        final = env.observe(state)
        elapsed += 1
        truncated = env.max_episode_steps is not None and elapsed >= env.max_episode_steps
        if bool(terminated) or truncated:
            episode, elapsed = episode + 1, 0
            state = env.reset(uniform("environment/reset", episode, env.reset_noise), {})
        out.append(torch.cat([x.double().flatten() for x in (final, env.observe(state), reward, terminated)]))
    return out


@pytest.mark.parametrize(
    "env",
    [CartPole(max_episode_steps=2), Clock(end=2.0), FrozenLake(max_episode_steps=7), GridWorld(slip=0.5), Bandit()],
    ids=lambda env: type(env).__name__,
)
def test_rows_equal_a_loop_that_draws_one_number_at_a_time(env: NativeEnv) -> None:
    """150 steps use more counters than are drawn ahead, in step and, where episodes are short, in reset."""
    learners, count = 2, 3
    world = NativeWorld(env, (learners,), count)
    keys = make_keys([3, 8])
    actions = random_actions(world, 150)
    _, transitions = roll(world, world.reset(keys), actions)
    for learner in range(learners):
        for row in range(count):
            expected = reference_rollout(env, keys[learner], row, actions[:, learner, row])
            for step, transition in enumerate(transitions):
                got = torch.cat([x[learner, row].double().flatten() for x in (
                    transition.next_observation, transition.observation, transition.reward, transition.terminated
                )])  # fmt: skip
                assert torch.equal(got, expected[step]), (learner, row, step)


@pytest.mark.parametrize("rows", [1, 30, 3000])
def test_what_is_drawn_ahead_is_what_would_be_drawn(rows: int) -> None:
    """With few rows, and with too many to draw ahead; counters advance, stay, jump and go back."""
    cache = _NoiseCache("stream", 4, rows)
    assert cache.counters == {1: 64, 30: 64, 3000: 2}[rows]
    key, counters = make_keys(range(rows)), torch.arange(rows)
    for counter in (0, 1, 1, 63, 64, 200, 190, 0, 2**33):
        counters.copy_(torch.arange(rows) + counter)  # in place, as whoever consumes a state may write
        assert torch.equal(cache.at(key, counters), random.uniform(key, "stream", counters, (4,), torch.float64))
    key.add_(1)
    assert torch.equal(cache.at(key, counters), random.uniform(key, "stream", counters, (4,), torch.float64))


def test_no_two_rows_seeds_or_episodes_share_a_first_state() -> None:
    world = NativeWorld(CartPole(max_episode_steps=1), (4,), 4)
    state = world.reset(make_keys(range(4)))
    seen = [world.observation(state)]
    for _ in range(40):
        state, transition = world.step(state, torch.zeros(4, 4, dtype=torch.int64))
        seen.append(transition.observation)
    firsts = torch.stack(seen).flatten(0, 2)
    assert len(firsts.unique(dim=0)) == len(firsts) == 41 * 16


def test_first_states_and_steps_draw_from_named_streams_and_depend_on_the_key() -> None:
    world = NativeWorld(Clock(), (), 1)
    a, b = world.reset(make_keys([0])[0]), world.reset(make_keys([1])[0])
    assert a["env"]["mark"] != b["env"]["mark"]
    assert torch.equal(a["env"]["mark"], world.reset(make_keys([0])[0])["env"]["mark"])
    after = world.step(a, torch.zeros(1, dtype=torch.int64))[0]["env"]["seen"]
    noise = random.uniform(fold(make_keys([0])[0], 0), "environment/step", 0, (2,), torch.float64)
    assert after.item() == (noise[0] - noise[1]).item()


def test_start_goes_to_any_episode() -> None:
    world = NativeWorld(CartPole(max_episode_steps=2), (2,), 2)
    key = make_keys([0, 1])
    state, _ = roll(world, world.reset(key), torch.zeros(6, 2, 2, dtype=torch.int64))
    assert same(state, world.start(key, 3))
    mixed = world.start(key, torch.tensor([3, 0]))
    assert torch.equal(world.observation(mixed)[:, 0], world.observation(state)[:, 0])
    assert torch.equal(world.observation(mixed)[:, 1], world.observation(world.reset(key))[:, 1])


def test_episodes_started_apart_do_not_share_their_steps_noise() -> None:
    world = NativeWorld(Clock(), (), 1)
    act = torch.zeros(1, dtype=torch.int64)
    seen = [world.step(world.start(make_keys([0])[0], e), act)[0]["env"]["seen"].item() for e in range(4)]
    assert len(set(seen)) == 4


# ------------------------------------------------------------------------------------------------------ independence


@given(
    name=st.sampled_from(sorted(NATIVE)),
    seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    count=st.integers(1, 4),
    steps=st.integers(1, 40),
)
def test_a_learner_is_the_same_alone_and_in_company(name: str, seeds: list[int], count: int, steps: int) -> None:
    env = NATIVE[name]
    together = NativeWorld(env, (len(seeds),), count)
    actions = random_actions(together, steps, seeds[0])
    state, transitions = roll(together, together.reset(make_keys(seeds)), actions)
    for learner, seed in enumerate(seeds):
        alone = NativeWorld(env, (), count)
        own, own_transitions = roll(alone, alone.reset(make_keys([seed])[0]), actions[:, learner])
        assert same(tree.map(lambda x, i=learner: x[i], state), own)
        for a, b in zip(transitions, own_transitions):
            assert same(tree.map(lambda x, i=learner: x[i], a._asdict()), b._asdict())


@given(count=st.integers(1, 3), extra=st.integers(1, 3), steps=st.integers(1, 30))
def test_a_row_is_the_same_whatever_their_number(count: int, extra: int, steps: int) -> None:
    few, many = NativeWorld(CartPole(), (2,), count), NativeWorld(CartPole(), (2,), count + extra)
    actions = random_actions(many, steps)
    a, _ = roll(few, few.reset(make_keys([0, 1])), actions[:, :, :count])
    b, _ = roll(many, many.reset(make_keys([0, 1])), actions)
    assert same(a, tree.map(lambda x: x[:, :count], b))


@pytest.mark.parametrize("name", NATIVE)
def test_a_saved_state_goes_on_as_the_one_that_was_not(name: str) -> None:
    world = NativeWorld(NATIVE[name], (2,), 2)
    actions = random_actions(world, 45)
    state, _ = roll(world, world.reset(make_keys([0, 1])), actions[:20])
    saved = {path: leaf.clone() for path, leaf in tree.flatten(state).items()}
    state, transitions = roll(world, state, actions[20:])
    fresh = NativeWorld(NATIVE[name], (2,), 2)
    assert fresh.exact_resume
    resumed, resumed_transitions = roll(fresh, fresh.restore(tree.unflatten(saved)), actions[20:])
    assert same(state, resumed)
    assert all(same(a._asdict(), b._asdict()) for a, b in zip(transitions, resumed_transitions))


def test_two_states_may_take_turns_in_one_world() -> None:
    """Random numbers drawn ahead for one state are not used for the other."""
    world = NativeWorld(Clock(end=2.0), (), 2)
    act = torch.zeros(2, dtype=torch.int64)
    a, b = world.reset(make_keys([0])[0]), world.reset(make_keys([1])[0])
    for _ in range(5):
        a, _ = world.step(a, act)
        b, _ = world.step(b, act)
    for seed, state in ((0, a), (1, b)):
        alone = NativeWorld(Clock(end=2.0), (), 2)
        assert same(roll(alone, alone.reset(make_keys([seed])[0]), act.expand(5, 2))[0], state)


def test_going_back_in_time_gives_the_same_again() -> None:
    world = NativeWorld(Clock(end=2.0), (), 2)
    actions = torch.zeros(60, 2, dtype=torch.int64)
    start = world.reset(make_keys([0])[0])
    first, _ = roll(world, start, actions)
    again, _ = roll(world, start, actions)
    assert same(first, again)


def test_step_leaves_the_state_it_is_given() -> None:
    for env in NATIVE.values():
        world = NativeWorld(env, (), 3, {name: value for name, value in env.constants().items() if not value.dim()})
        state = world.reset(make_keys([0])[0])
        kept = tree.map(torch.clone, state)
        roll(world, state, random_actions(world, 1))
        assert same(state, kept)


def test_inference_mode_gives_the_same_and_leaves_nothing_behind() -> None:
    actions = torch.zeros(20, 2, dtype=torch.int64)
    plain = NativeWorld(Clock(end=3.0), (), 2)
    expected, _ = roll(plain, plain.reset(make_keys([0])[0]), actions)
    world = NativeWorld(Clock(end=3.0), (), 2)
    with torch.inference_mode():
        state, _ = roll(world, world.reset(make_keys([0])[0]), actions)
    assert same(state, expected)
    after, transition = world.step(state, actions[0])
    assert not any(leaf.is_inference() for leaf in (after["env"]["seen"], transition.observation, transition.reward))


# ----------------------------------------------------------------------------------------------------------- physics


def test_physics_of_one_value_a_row_equals_worlds_of_those_constants() -> None:
    """S = N = 3, where a value on the wrong axis would go unnoticed by its shape."""
    gravity = torch.linspace(1, 20, 9, dtype=torch.float64).reshape(3, 3)
    world = NativeWorld(CartPole(), (3,), 3, {"gravity": gravity, "length": torch.tensor([0.3, 0.5, 0.9])})
    actions = random_actions(world, 30)
    state, transitions = roll(world, world.reset(make_keys(range(3))), actions)
    assert torch.equal(state["physics"]["gravity"], gravity)
    for learner in range(3):
        for row in range(3):
            length = float(torch.tensor([0.3, 0.5, 0.9])[learner])
            alone = NativeWorld(CartPole(gravity=float(gravity[learner, row]), length=length), (3,), 3)
            _, expected = roll(alone, alone.reset(make_keys(range(3))), actions)
            for a, b in zip(transitions, expected):
                torch.testing.assert_close(a.next_observation[learner, row], b.next_observation[learner, row])
                assert a.memory_reset[learner, row] == b.memory_reset[learner, row]


def test_physics_given_per_learner_or_as_a_number_reaches_every_row() -> None:
    for given_value in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])):
        world = NativeWorld(Clock(), (2,), 2, {"end": given_value})
        state = world.reset(make_keys([0, 1]))
        assert state["physics"]["end"].dtype == torch.float64
        _, transition = world.step(state, torch.zeros(2, 2, dtype=torch.int64))
        assert transition.terminated.tolist() == [[True, True], [False, False]]
    state = NativeWorld(Clock(), (2,), 2, {"end": 1.0}).reset(make_keys([0, 1]))
    assert torch.equal(state["physics"]["end"], torch.ones(2, 2, dtype=torch.float64))


def test_physics_is_redrawn_when_an_episode_starts_and_kept_until_it_ends() -> None:
    def redraw(key: Tensor) -> dict[str, Tensor]:
        return {"end": random.integers(key, "end", 0, (1,), 4)[..., 0].double() + 1}

    world = NativeWorld(Clock(), (2,), 2, redraw)
    keys = make_keys([0, 1])
    state = world.reset(keys)
    lengths: dict[tuple[int, int], list[int]] = {(i, j): [] for i in range(2) for j in range(2)}
    for _ in range(40):
        state, transition = world.step(state, torch.zeros(2, 2, dtype=torch.int64))
        for i, j in transition.terminated.nonzero().tolist():
            lengths[i, j].append(int(transition.next_observation[i, j, 0]))
    for (i, j), seen in lengths.items():
        row = fold(fold(keys[i], j), "environment/physics")
        expected = [int(redraw(fold(row, episode))["end"]) for episode in range(len(seen))]
        assert seen == expected and len(set(seen)) > 1


def test_physics_of_a_table_is_one_table_a_row() -> None:
    """A deterministic two-state MDP, and one row in which its actions are swapped."""
    to = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    env = TabularMDP(to, torch.zeros(2, 2), start=torch.tensor([1.0, 0.0]))
    world = NativeWorld(env, (), 2, {"probability": torch.stack((to, to.flip(1)))})
    _, transition = world.step(world.reset(make_keys([0])[0]), torch.tensor([1, 1]))
    assert transition.next_observation.tolist() == [1, 0]


def test_a_state_that_is_written_to_does_not_change_the_worlds_physics() -> None:
    world = NativeWorld(Clock(), (), 2, {"end": torch.tensor([1.0, 2.0])})
    world.reset(make_keys([0])[0])["physics"]["end"].zero_()
    assert world.reset(make_keys([0])[0])["physics"]["end"].tolist() == [1.0, 2.0]


# ----------------------------------------------------------------------------------------------------------- actions


def test_box_actions_are_clipped_to_the_bounds() -> None:
    world = NativeWorld(NATIVE["MountainCarContinuous-v0"], (), 3)
    state = world.reset(make_keys([0])[0])
    _, wild = world.step(state, torch.tensor([[7.0], [-7.0], [0.5]]))
    _, tame = world.step(state, torch.tensor([[1.0], [-1.0], [0.5]]))
    assert same(wild._asdict(), tame._asdict())
    np.testing.assert_allclose(wild.reward, [-0.1, -0.1, -0.025], rtol=1e-6)
    pendulum = NativeWorld(Pendulum(), (), 2)
    state = pendulum.reset(make_keys([0])[0])
    _, wild = pendulum.step(state, torch.tensor([[9.0], [-9.0]]))
    assert same(wild._asdict(), pendulum.step(state, torch.tensor([[2.0], [-2.0]]))[1]._asdict())


# ------------------------------------------------------------------------------------------------------------ errors


def test_mistakes_are_named() -> None:
    with pytest.raises(SettingError, match="num_envs=0"):
        NativeWorld(CartPole(), (), 0)
    with pytest.raises(SettingError, match=r"learner_shape=\(0,\)"):
        NativeWorld(CartPole(), (0,), 1)
    with pytest.raises(UnknownNameError, match="constant of CartPole 'gravty': did you mean gravity"):
        NativeWorld(CartPole(), (), 1, {"gravty": 1.0})
    with pytest.raises(UnknownNameError, match="max_episode_steps"):
        NativeWorld(CartPole(), (), 1, {"max_episode_steps": 1.0})
    with pytest.raises(
        SettingError, match=r"'gravity' has shape \(3,\): expected that of a prefix of the rows \(2, 3\)"
    ):
        NativeWorld(CartPole(), (2,), 3, {"gravity": torch.ones(3)})
    with pytest.raises(SettingError, match=r"'mean' has shape \(2,\).*own \(10,\)"):
        NativeWorld(Bandit(), (2,), 3, {"mean": torch.ones(2)})
    with pytest.raises(SettingError, match=r"key of shape \(3,\) for learners \(2,\)"):
        NativeWorld(CartPole(), (2,), 1).reset(make_keys(range(3)))
    with pytest.raises(SettingError, match="'force' has shape"):
        NativeWorld(MountainCar(), (2,), 2, lambda key: {"force": key[..., :1].double()}).reset(make_keys([0, 1]))

    class Shifted(Clock):
        action_space = gym.spaces.Discrete(2, start=1)

    with pytest.raises(SpaceError, match=r"Discrete\(n\) from 0 or Box, not in Discrete\(2, start=1\)"):
        NativeWorld(Shifted())


# -------------------------------------------------------------------------------- actions and results that don't fit


class Puck(Clock):
    """User environment with a Box of unusual shape and bounds."""

    action_space = gym.spaces.Box(np.array([-1, -np.inf], np.float32), np.array([np.inf, 2], np.float32))  # type: ignore[assignment]

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        assert action.dtype == torch.float64
        return state, action.sum(-1).float(), action[..., 0] > 10

    reset_noise, step_noise = 1, 0


ROWS = (2, 3)


@pytest.mark.parametrize("shape", [(), (3,), (2,), (6,), (2, 1), (3, 2), (2, 3, 1), (2, 3, 2), (1, 2, 3)])
@pytest.mark.parametrize("env", [*NATIVE.values(), Clock(), Puck(), TabularMDP([[[1.0]]], [[0.0]])], ids=repr)
def test_an_action_of_another_shape_is_refused(env: NativeEnv, shape: tuple[int, ...]) -> None:
    world = NativeWorld(env, (2,), 3)
    space = world.action_space
    state, kind = world.reset(make_keys([0, 1])), torch.int64 if isinstance(space, gym.spaces.Discrete) else None
    action = torch.zeros(shape, dtype=kind)
    if shape == (*ROWS, *(space.shape or ())):
        assert world.step(state, action)[1].reward.shape == ROWS
        return
    with pytest.raises(SpaceError, match=r"an action for \w+ is of shape .*expected a tensor \(2, 3"):
        world.step(state, action)


@pytest.mark.parametrize("env", [env for env in NATIVE.values() if isinstance(env.action_space, gym.spaces.Discrete)])
def test_an_action_that_there_is_not_is_refused(env: NativeEnv) -> None:
    world, count = NativeWorld(env, (2,), 3), int(env.action_space.n)  # type: ignore[attr-defined]
    state, legal = world.reset(make_keys([0, 1])), torch.zeros(ROWS, dtype=torch.int64)
    for wrong in (-1, count, 7 if count < 7 else 99, -(2**40)):
        action = legal.clone()
        action[1, 2] = wrong
        with pytest.raises(SpaceError, match=f"the action {wrong} for .* is not in its space Discrete"):
            world.step(state, action)
    for wrong_kind in (legal.float(), legal.double() + 0.9, legal.to(torch.complex64)):
        with pytest.raises(SpaceError, match=r"has dtype .*expected whole numbers"):
            world.step(state, wrong_kind)
    for other in (legal.tolist(), {"a": legal}, legal.numpy()):
        with pytest.raises(SpaceError, match="expected a tensor"):
            world.step(state, other)  # type: ignore[arg-type]
    for kind in (torch.int64, torch.int32, torch.uint8, torch.bool):  # every whole number is one
        assert same(world.step(state, legal.to(kind))[1]._asdict(), world.step(state, legal)[1]._asdict())
    if count > 1:
        most = torch.full(ROWS, count - 1)
        assert same(world.step(state, most.to(torch.int8))[1]._asdict(), world.step(state, most)[1]._asdict())


def test_box_actions_are_clipped_to_bounds_of_which_some_are_infinite() -> None:
    world = NativeWorld(Puck(), (2,), 3)
    state = world.reset(make_keys([0, 1]))
    action = torch.tensor([-5.0, -5.0]).expand(2, 3, 2)
    assert world.step(state, action)[1].reward.unique().tolist() == [-6]
    assert world.step(state, -3 * action)[1].reward.unique().tolist() == [17]
    assert world.step(state, (-3 * action).long())[1].reward.unique().tolist() == [17]
    with pytest.raises(SpaceError, match="expected numbers"):
        world.step(state, action.to(torch.complex64))


class Wrong(Clock):
    """Base of environments with a fault."""

    reset_noise, step_noise = 1, 0

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        return state, self.reward(action.float()), self.terminated(action == 9)

    def observe(self, state: State) -> Tensor:
        return self.seen(torch.stack((state["time"], state["mark"]), -1).float())

    reward = terminated = seen = staticmethod(lambda x: x)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("reward", lambda x: x.unsqueeze(-1), r"reward as torch.float32 of shape \(2, 3, 1\), expected"),
        ("reward", lambda x: x[0], r"reward as torch.float32 of shape \(3,\)"),
        ("reward", lambda x: x.double(), "reward as torch.float64"),
        ("reward", lambda x: x.long(), "reward as torch.int64"),
        ("terminated", lambda x: x.float(), "terminated as torch.float32"),
        ("terminated", lambda x: x.any(), r"terminated as torch.bool of shape \(\)"),
        ("seen", lambda x: x[..., 0], r"observation as torch.float32 of shape \(2, 3\)"),
        ("seen", lambda x: x.double(), r"observation as torch.float64"),
        ("seen", lambda x: {"a": x}, r"observation as nothing|observation a as"),
    ],
)
def test_an_environment_of_ones_own_that_gives_another_form_is_refused(part: str, change: Any, match: str) -> None:
    env = type("Mine", (Wrong,), {part: staticmethod(change)})()
    world = NativeWorld(env, (2,), 3)
    with pytest.raises(SpaceError, match="Mine gave " + match):
        world.step(world.reset(make_keys([0, 1])), torch.zeros(ROWS, dtype=torch.int64))
    fine = NativeWorld(Wrong(), (2,), 3)
    fine.step(fine.reset(make_keys([0, 1])), torch.zeros(ROWS, dtype=torch.int64))


@pytest.mark.parametrize("name", ["MinAtar/Asterix-v1", "MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1", "Catch-v0"])
def test_a_deferred_step_leaves_the_successors_for_one_observation(name: str) -> None:
    """As a rollout of the same actions that observes at every step, where episodes end, too."""
    env, key = NATIVE[name], make_keys([0, 1])
    plain, late = NativeWorld(env, (2,), 3), NativeWorld(env, (2,), 3)
    assert late.defers and not NativeWorld(NATIVE["CartPole-v1"]).defers
    assert not TrialWorld(env, (), 1, episodes=2).defers
    state, other = plain.reset(key), late.reset(key)
    seen, successors, ends = [], [], 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        action = torch.randint(0, int(env.action_space.n), (2, 3), generator=generator)  # type: ignore[attr-defined]
        state, transition = plain.step(state, action)
        noise, _ = late.predraw_noise(other)
        other, deferred = late.step(other, action, noise, deferred=True)
        assert deferred.observation == {}
        assert torch.equal(late.observation(other), transition.observation)
        seen.append(transition.next_observation)
        successors.append(deferred.next_observation)
        ends += int(transition.memory_reset.sum())
    at_once = late.observe(tree.map(lambda *steps: torch.stack(steps, 1), *successors))
    assert torch.equal(at_once, torch.stack(seen, 1)) and ends > 0
