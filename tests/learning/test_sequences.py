"""Replay memory of sequences, against a history kept step by step."""

from __future__ import annotations

import gymnasium as gym
import torch

from rlmeta.functional import random, tree
from rlmeta.learning import replay, sequences
from tests.learning.test_replay import GAMMA, N, S, T, history_of

C, LENGTH = 16, 5


class Space:
    shape = ()


class World:
    """As much of a world as a memory begins with."""

    learner_shape, num_envs, action_space = (S,), N, Space()
    observation_space = gym.spaces.Box(-1, 1, (1,))

    def observation(self, state):
        return torch.zeros(S, N, 1)


def filled(total, seed=0, ends=0.15, capacity=C):
    """A memory after `total` steps, with states that tell the number of their step, and the history itself."""
    history = history_of(total, seed, ends)
    history["memory_reset"] = history["terminated"] | history["truncated"]
    history["last"] = torch.rand(S, total, N, 2)
    clock = torch.arange(total, dtype=torch.float32).reshape(1, -1, 1, 1).expand(S, total, N, 1)
    inputs = {"observation": torch.zeros(S, N, 1), "last": torch.zeros(S, N, 2)}
    memory = sequences.init(World(), {}, capacity, T, {**inputs, "hidden": {"q": {"h": torch.zeros(S, N, 1)}}})
    for start in range(0, total, T):
        rollout = {name: value[:, start : start + T] for name, value in history.items()}
        reset = rollout["memory_reset"]
        begins = torch.cat((torch.zeros_like(reset[:, :1]), reset[:, :-1]), 1)
        now = {"observation": rollout["observation"], "last": rollout["last"], "begins": begins}
        hidden = {"q": {"h": clock[:, start]}}
        following = {"observation": rollout["next_observation"], "last": rollout["last"] + 10.0}
        memory = sequences.insert(memory, rollout, {**now, "hidden": hidden}, following, rollout["reward"], 1)
    return memory, history


def rows_of(history, s, env, total):
    """The rows of an environment: (step, or None of a final observation; the observation; what was seen; begins)."""
    rows, begins = [], False
    for t in range(total):
        rows.append((t, history["observation"][s, t, env], history["last"][s, t, env], begins))
        begins = bool(history["memory_reset"][s, t, env])
        if begins:
            rows.append((None, history["next_observation"][s, t, env], history["last"][s, t, env] + 10.0, False))
    last = total - 1
    rows.append((None, history["next_observation"][s, last, env], history["last"][s, last, env] + 10.0, False))
    return rows


def test_a_sequence_is_what_happened_from_the_start_of_a_rollout_with_the_state_it_began_with():
    total, count = 28, 400
    memory, history = filled(total, ends=0.05)
    keys = torch.stack([random.make_keys(range(i, i + S)) for i in (0, 7)])
    batch = sequences.sample(memory, keys, count, LENGTH, GAMMA, burn_in=1)
    steps, following = batch["observation"], batch["next_observation"]
    before = {name: value for name, value in steps.items() if name != "hidden"}
    tree.map(torch.testing.assert_close, following["before"], before)
    assert following["hidden"] is steps["hidden"] and batch["action"].shape == (2, S, LENGTH * count)
    shaped = {name: x.unflatten(2, (LENGTH, count)) for name, x in steps.items() if name != "hidden"}
    after = {name: following[name].unflatten(2, (LENGTH, count)) for name in ("observation", "last")}
    told = {n: batch[n].unflatten(2, (LENGTH, count)) for n in ("action", "reward", "discount", "valid")}
    drawn = set()
    for k, s, i in [(k, s, i) for k in range(2) for s in range(S) for i in range(0, count, 8)]:
        env = int(shaped["observation"][k, s, 0, i, 0].long() % N)
        rows, began = rows_of(history, s, env, total), int(steps["hidden"]["q"]["h"][k, s, i, 0])
        at = next(j for j, row in enumerate(rows) if row[0] == began)
        assert began % T == 0 and at >= len(rows) - C
        drawn.add((s, env, began))
        for j in range(LENGTH):
            t, observation, last, begins = rows[at + j]
            assert shaped["observation"][k, s, j, i].equal(observation)
            assert shaped["last"][k, s, j, i].equal(last) and bool(shaped["begins"][k, s, j, i]) == begins
            if t is None:
                assert not told["valid"][k, s, j, i]
                continue
            assert bool(told["valid"][k, s, j, i]) == (j >= 1 and bool(history["valid"][s, t, env]))
            assert told["action"][k, s, j, i] == history["action"][s, t, env]
            assert told["reward"][k, s, j, i] == history["reward"][s, t, env]
            assert told["discount"][k, s, j, i] == GAMMA[s] * ~history["terminated"][s, t, env]
            assert after["observation"][k, s, j, i].equal(history["next_observation"][s, t, env])
    expected = set()
    for s, env in [(s, env) for s in range(S) for env in range(N)]:
        rows = rows_of(history, s, env, total)
        for at, row in enumerate(rows):
            if row[0] is not None and row[0] % T == 0 and len(rows) - C <= at and at + LENGTH < len(rows):
                expected.add((s, env, row[0]))
    assert drawn == expected


def test_a_state_that_was_left_for_another_task_is_reset():
    memory, _ = filled(8, ends=0.0)
    assert not memory["resets"].any()
    before = memory["written"].clone()
    memory = replay.cut(memory, 1)
    assert memory["resets"].all() and (memory["written"] == before + 1).all()
