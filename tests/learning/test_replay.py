"""Replay memory: every learner its own, observations stored once, n-step returns that never cross an episode's end."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import random
from rlmeta.learning import replay

S, C, N, T = 3, 16, 2, 4
GAMMA = torch.tensor([0.9, 0.5, 0.99])


def history_of(total, seed=0, ends=0.15):
    """What happened in `total` time steps, `[S, total, N]`; every observation is a number of its own, and a step's
    successor is the next step's observation unless the episode ended."""
    g = torch.Generator().manual_seed(seed)
    observation = torch.arange(S * total * N, dtype=torch.float32).reshape(S, total, N, 1)
    terminated, truncated = (torch.rand(S, total, N, generator=g) < ends for _ in range(2))
    following = torch.cat([observation[:, 1:], observation[:, -1:] + 0.25], 1)
    final = (terminated | truncated).unsqueeze(-1)
    return {
        "observation": observation,
        "next_observation": torch.where(final, observation + 0.5, following),
        "action": torch.randint(0, 5, (S, total, N), generator=g),
        "terminated": terminated,
        "truncated": truncated,
        "valid": torch.rand(S, total, N, generator=g) < 0.9,
        "reward": torch.rand(S, total, N, generator=g),
    }


def empty(history, capacity=C):
    kept = {n: h for n, h in history.items() if n != "next_observation"}
    memory = {n: torch.zeros(S, capacity, *h.shape[2:], dtype=h.dtype) for n, h in kept.items()}
    return {**memory, "written": torch.zeros(S, N, dtype=torch.int64)}


def filled(total, seed=0, ends=0.15, capacity=C):
    """A memory after `total` time steps of a made-up history, and the history itself."""
    history = history_of(total, seed, ends)
    memory = empty(history, capacity)
    for start in range(0, total, T):
        rollout = {n: h[:, start : start + T] for n, h in history.items()}
        memory = replay.insert(memory, rollout, rollout["reward"], 1)
    return memory, history


def stored(history, s, env, total, capacity=C):
    """The time steps of an environment that are still in the memory: those of its newest C - 1 rows."""
    ended = history["terminated"] | history["truncated"]
    rows, row = {}, 0
    for t in range(total):
        rows[t] = row
        row += 2 if ended[s, t, env] else 1
    return {t for t, at in rows.items() if at >= row - (capacity - 1)}


@pytest.mark.parametrize(("total", "n"), [(8, 1), (8, 3), (28, 1), (28, 3), (28, 5)])
def test_sampled_transitions_are_those_of_a_brute_force_walk(total, n):
    memory, history = filled(total)
    batch = replay.sample(memory, random.make_keys(range(S)), 64, GAMMA, n)
    seen = set()
    for s in range(S):
        for b in range(64):
            if not batch["valid"][s, b]:
                continue
            flat = int(batch["observation"][s, b, 0]) - s * total * N
            t, env = divmod(flat, N)
            seen.add((s, t, env))
            assert t in stored(history, s, env, total) and t <= total - 1
            reward, weight, last = 0.0, 1.0, t
            for k in range(n):
                last = t + k
                reward += weight * float(history["reward"][s, last, env])
                weight *= float(GAMMA[s]) * float(~history["terminated"][s, last, env])
                if history["terminated"][s, last, env] or history["truncated"][s, last, env]:
                    break
            assert float(batch["reward"][s, b]) == pytest.approx(reward, rel=1e-5)
            assert float(batch["discount"][s, b]) == pytest.approx(weight, rel=1e-5)
            assert torch.equal(batch["next_observation"][s, b], history["next_observation"][s, last, env])
            assert batch["action"][s, b] == history["action"][s, t, env]
            assert history["valid"][s, t, env]
    assert len({t for _, t, _ in seen}) > 2


def test_every_stored_transition_is_drawn_equally_often():
    memory, history = filled(28)
    batch = replay.sample(memory, random.make_keys(range(S)), 48_000, GAMMA, 1)
    for s in range(S):
        expected = {
            float(history["observation"][s, t, env, 0])
            for env in range(N)
            for t in stored(history, s, env, 28)
            if history["valid"][s, t, env]
        }
        drawn = batch["observation"][s].flatten()[batch["valid"][s]]
        values, counts = drawn.unique(return_counts=True)
        assert set(values.tolist()) == expected
        mean = len(drawn) / len(expected)
        assert (counts - mean).abs().max() < 6 * mean**0.5
        assert batch["valid"][s].float().mean() > 0.95  # 4 rows of which none holds a step


def test_a_minibatch_for_every_key_at_once_equals_one_after_another():
    memory, _ = filled(28)
    keys = random.fold(random.make_keys(range(S)), torch.arange(5).unsqueeze(-1))
    together = replay.sample(memory, keys, 16, GAMMA, 3)
    for number, key in enumerate(keys):
        for name, value in replay.sample(memory, key, 16, GAMMA, 3).items():
            assert torch.equal(together[name][number], value)


def test_a_learner_draws_the_same_in_any_company():
    memory, _ = filled(28)
    keys = random.make_keys(range(S))
    together = replay.sample(memory, keys, 16, GAMMA, 3)
    alone = replay.sample({n: m[1:2] for n, m in memory.items()}, keys[1:2], 16, GAMMA[1:2], 3)
    for name, value in alone.items():
        assert torch.equal(together[name][1:2], value)


def test_nothing_crosses_a_cut():
    first, second = history_of(8, ends=0.0), history_of(8, seed=1, ends=0.0)
    memory = replay.insert(empty(first, 40), first, first["reward"], 1)
    memory = replay.cut(replay.cut(memory, 1), 1)  # a second one finds nothing to end
    second |= {name: second[name] + 1000 for name in ("observation", "next_observation")}
    memory = replay.insert(memory, second, second["reward"], 1)
    batch = replay.sample(memory, random.make_keys(range(S)), 400, GAMMA, 3)
    old = (batch["observation"] < 1000) & batch["valid"].unsqueeze(-1)
    assert old.any() and (batch["next_observation"][old] < 1000).all()
    newest = first["next_observation"][:, -1]
    assert torch.isin(newest, batch["next_observation"]).all()
    assert (memory["written"] == 17).all()


def test_observations_are_stored_once():
    memory, _ = filled(8)
    assert [name for name in memory if "observation" in name] == ["observation"]


def test_a_cut_of_some_environments_leaves_the_others():
    first = history_of(8, ends=0.0)
    memory = replay.insert(empty(first, 40), first, first["reward"], 1)
    rows = torch.tensor([[True, False]]).expand(S, N)
    memory = replay.cut(memory, 1, rows)
    assert memory["written"].tolist() == [[9, 8]] * S
    assert memory["truncated"].sum((0, 1)).tolist() == [S, 0]
