"""Stacks of frames in a replay memory: each frame is stored once, and what is drawn is as if whole stacks were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from hypothesis import given, settings
from hypothesis import strategies as st

import rlmeta as rl
from rlmeta.data.spaces import FrameStack
from rlmeta.envs.gymnasium.world import GymnasiumWorld
from rlmeta.functional import random, tree
from rlmeta.learning import prioritised, replay, sequences
from rlmeta.learning.replay import PRIORITY

S, N, T, C = 2, 2, 4, 14
GAMMA = torch.tensor([0.9, 0.5])
ROWS = torch.tensor([[True, False]] * S)
"""Environments whose episodes are cut."""


def world(kind: type[Box], k: int, nested: bool) -> Any:
    """As much of a world as a memory begins with, whose observations are stacks of k frames."""
    stack: gym.Space = kind(0, 255, (k, 2, 3), np.uint8)
    if nested:
        stack = Dict({"screen": stack, "score": kind(0, 9, (k,), np.float32), "mask": MultiBinary(2)})
    seen = shown(torch.zeros(S, N, k, 2, 3, dtype=torch.uint8), nested)
    return SimpleNamespace(
        learner_shape=(S,),
        num_envs=N,
        observation=lambda state: seen,
        observation_space=stack,
        action_space=Discrete(5),
    )


def shown(stack, nested):
    mask = (stack[..., -1, 0, :2] > 99).long()
    return {"screen": stack, "score": stack[..., 1, 1].float(), "mask": mask} if nested else stack


def stacked(now, following, begins, k):
    """Stacks of the last k frames `[S, total, N, k, ...]` at every step, and after it, walked through step by step."""
    seen, after = (torch.zeros(*now.shape[:3], k, *now.shape[3:], dtype=now.dtype) for _ in range(2))
    for s, e in np.ndindex(S, N):
        for t in range(now.shape[1]):
            fresh = t == 0 or bool(begins[s, t, e])
            queue = [now[s, t, e]] * k if fresh else [*queue[1:], now[s, t, e]]  # noqa: F821
            seen[s, t, e] = torch.stack(queue)
            after[s, t, e] = torch.stack([*queue[1:], following[s, t, e]])
    return seen, after


def history(total, k, seed, ends, nested, cut_at):
    """What happened in `total` steps; before the step `cut_at` the environments in ROWS begin anew, untold."""
    g = torch.Generator().manual_seed(seed)
    now, final = torch.randint(0, 256, (2, S, total + 1, N, 2, 3), generator=g, dtype=torch.uint8)
    terminated, truncated = (torch.rand(S, total, N, generator=g) < ends for _ in range(2))
    over = terminated | truncated
    begins = torch.cat((torch.ones(S, 1, N, dtype=torch.bool), over), 1)
    begins[:, cut_at] |= ROWS
    following = torch.where(begins[:, 1:, :, None, None], final[:, 1:], now[:, 1:])
    seen, after = stacked(now[:, :-1], following, begins, k)
    return {
        "observation": shown(seen, nested),
        "next_observation": shown(after, nested),
        "action": torch.randint(0, 5, (S, total, N), generator=g),
        "terminated": terminated,
        "truncated": truncated,
        "valid": torch.ones_like(over),
        "memory_reset": over,
        "reward": torch.rand(S, total, N, generator=g),
    }


def inserted(memories, told, cut_at, insert):
    """Memories after all rollouts of a history."""
    for start in range(0, told["reward"].shape[1], T):
        if start == cut_at:
            memories = [replay.cut(memory, 1, ROWS) for memory in memories]
        rollout = tree.map(lambda x: x.narrow(1, start, T), told)  # noqa: B023
        memories = [insert(memory, rollout) for memory in memories]
    return memories


def same(a, b, counts=...):
    """Whether two trees are equal bit for bit, where something `counts`."""
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n][counts], b[n][counts]) for n in a)


def numbered(memory):
    """Number of every row of the ring `[S, C, N]`, counted from the first that was written."""
    capacity, newest = memory["reward"].shape[1], memory["written"].unsqueeze(1) - 1
    return newest - (newest - torch.arange(capacity).unsqueeze(-1)) % capacity


CASES = {
    "rollouts": st.integers(1, 9),
    "k": st.integers(1, 4),
    "ends": st.sampled_from([0.0, 0.1, 0.4]),
    "nested": st.booleans(),
    "cut": st.integers(0, 8),
    "seed": st.integers(0, 999),
}


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 3), **CASES)
def test_what_is_drawn_is_what_a_memory_of_whole_stacks_gives(rollouts, k, n, ends, nested, cut, seed):
    both = [replay.init(world(kind, k, nested), {}, C, prioritised=True) for kind in (FrameStack, Box)]
    cut_at = min(cut, rollouts - 1) * T
    told = history(rollouts * T, k, seed, ends, nested, cut_at)
    once, whole = inserted(
        both, told, cut_at, lambda memory, rollout: replay.insert(memory, rollout, rollout["reward"], 1)
    )
    key = random.fold(random.make_keys([seed, seed + 1]), torch.arange(2).unsqueeze(-1))
    drawn, expected = (replay.sample(memory, key, 16, GAMMA, n) for memory in (once, whole))
    assert torch.equal(drawn["valid"], expected["valid"]) and same(drawn, expected, drawn["valid"])
    rows = [
        sorted((s, e, int(i)) for s, e in np.ndindex(S, N) for i in numbered(m)[s, m[PRIORITY][s, :, e] > 0, e])
        for m in (once, whole)
    ]
    assert rows[0] == rows[1] and rows[0]
    fixed = prioritised.fixed(once, GAMMA, torch.ones(S), torch.ones(S))
    batch = prioritised.Prioritised(16, n).draw(prioritised.moving(once, n), fixed, key[0])
    env = batch["place"] % N
    number = numbered(once).flatten(1).gather(1, batch["place"])
    expected = replay.transitions(whole, number, env, GAMMA, n)
    assert same({name: batch[name] for name in expected}, expected, batch["valid"])


@settings(max_examples=8, deadline=None)
@given(**CASES)
def test_sequences_are_those_of_a_memory_of_whole_stacks(rollouts, k, ends, nested, cut, seed):
    def empty(kind):
        inputs = {"observation": world(kind, k, nested).observation({}), "last": torch.zeros(S, N, 2)}
        return sequences.init(world(kind, k, nested), {}, C, T, {**inputs, "hidden": {"h": torch.zeros(S, N, 1)}})

    def insert(memory, rollout):
        begins = torch.zeros_like(rollout["memory_reset"])
        now = {"observation": rollout["observation"], "last": torch.zeros(S, T, N, 2), "begins": begins}
        following = {"observation": rollout["next_observation"], "last": torch.ones(S, T, N, 2)}
        now["hidden"] = {"h": rollout["reward"][:, 0].unsqueeze(-1)}
        return sequences.insert(memory, rollout, now, following, rollout["reward"], 1)

    cut_at = min(cut, rollouts - 1) * T
    told = history(rollouts * T, k, seed, ends, nested, cut_at)
    once, whole = inserted([empty(FrameStack), empty(Box)], told, cut_at, insert)
    key = random.make_keys([seed, seed + 1]).unsqueeze(0)
    drawn, expected = (sequences.sample(memory, key, 8, T, GAMMA) for memory in (once, whole))
    for batch in (drawn, expected):
        batch.update({name: batch[name].where(batch["valid"], 0) for name in ("action", "reward", "discount")})
    assert same(drawn, expected)


class Frames(gym.Env[Any, Any]):
    """Frames of random bytes; an action may end the episode."""

    observation_space: gym.Space[Any] = Box(0, 255, (84, 84), np.uint8)
    action_space = Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._frame(), {}

    def _frame(self):
        return self.np_random.integers(0, 256, self.observation_space.shape, dtype=np.uint8)

    def step(self, action):
        return self._frame(), 1.0, bool(action == 0), False, {}


class Small(Frames):
    observation_space = Box(0, 255, (8, 8), np.uint8)


def declared(env, k=4, kind=FrameStack):
    stacked_env = gym.wrappers.FrameStackObservation(env, k)
    stacked_env.observation_space = kind(0, 255, stacked_env.observation_space.shape, np.uint8)
    return gym.wrappers.TimeLimit(stacked_env, 6)


def test_a_hundred_thousand_stacks_of_four_frames_take_less_than_a_gigabyte():
    live = GymnasiumWorld(lambda: declared(Frames()), (1,), 1)
    seen = {"observation": torch.empty(1, 1, 4, 84, 84, dtype=torch.uint8, device="meta")}
    for made in (True, False):
        memory = replay.init(live, seen, 100_000, prioritised=made)
        size = sum(leaf.nbytes for leaf in tree.leaves(memory))
        assert 0.7e9 < size < 0.72e9
    live.close()


def test_stacks_are_those_that_gymnasium_makes():
    live = GymnasiumWorld(lambda: declared(Small()), (S,), N)
    state = live.reset(random.make_keys([0, 1]))
    memories = [replay.init(live, state, 40), replay.init(world(Box, 4, False), {}, 40)]
    memories[1]["observation"] = torch.zeros(S, 40, N, 4, 8, 8, dtype=torch.uint8)
    for step in range(60):
        seen, action = live.observation(state), random.integers(random.make_keys([2, 3]), "action", step, (N,), 4)
        state, transition = live.step(state, action)
        row = {**transition._asdict(), "observation": seen, "action": action}
        row = tree.map(lambda x: x.unsqueeze(1), row)
        memories = [replay.insert(memory, row, row["reward"], 1) for memory in memories]
    live.close()
    once, whole = (replay.sample(memory, random.make_keys([4, 5]), 64, GAMMA, 3) for memory in memories)
    assert memories[0]["observation"].shape == (S, 43, N, 8, 8)
    assert same(once, whole, once["valid"]) and once["valid"].float().mean() > 0.8


def test_a_run_resumes_bit_for_bit(tmp_path):
    agent = rl.DQN(num_envs=2, gradient_steps=1, capacity=60, learning_starts=16, batch_size=8, hidden_sizes=(8,))
    budget = rl.Budget(steps=96, final_episodes=1, eval_every=10**6, log_points=16)
    problem = rl.task(lambda: declared(Small()))
    whole = rl.train(agent, problem, budget=budget, seeds=2, threads=1)
    stop = [lambda run, line: line["iteration"] >= 8]
    part = rl.train(agent, problem, budget=budget, seeds=2, threads=1, out=tmp_path / "run", callbacks=stop)
    assert part.env_steps < whole.env_steps
    again = rl.resume(tmp_path / "run", env=problem)
    for name in ("params", "replay", "optimizer"):
        assert same(again.state[name], whole.state[name])
    assert whole.state["replay"]["observation"].shape == (2, 33, 2, 8, 8)
