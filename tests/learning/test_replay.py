"""Replay memory: every learner its own, n-step returns that never cross an episode's end."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import random
from rlmeta.learning import replay

S, C, N, T = 3, 12, 2, 4


def filled(total, seed=0):
    """A memory after `total` time steps of a made-up history, and the history itself `[S, total, N]`."""
    g = torch.Generator().manual_seed(seed)
    history = {
        "observation": torch.arange(S * total * N, dtype=torch.float32).reshape(S, total, N, 1),
        "action": torch.randint(0, 5, (S, total, N), generator=g),
        "terminated": torch.rand(S, total, N, generator=g) < 0.15,
        "truncated": torch.rand(S, total, N, generator=g) < 0.15,
        "valid": torch.rand(S, total, N, generator=g) < 0.9,
        "reward": torch.rand(S, total, N, generator=g),
    }
    history["next_observation"] = history["observation"] + 0.5
    memory = {n: torch.zeros(S, C, *h.shape[2:], dtype=h.dtype) for n, h in history.items()}
    for start in range(0, total, T):
        rollout = {n: h[:, start : start + T] for n, h in history.items()}
        memory = replay.insert(memory, rollout, rollout["reward"], start, 1)
    return memory, history


@pytest.mark.parametrize(("total", "n"), [(8, 1), (8, 3), (28, 1), (28, 3), (28, 5)])
def test_sampled_transitions_are_those_of_a_brute_force_walk(total, n):
    memory, history = filled(total)
    gamma = torch.tensor([0.9, 0.5, 0.99])
    batch = replay.sample(memory, random.make_keys(range(S)), 64, total, gamma, n)
    seen = set()
    for s in range(S):
        for b in range(64):
            flat = int(batch["observation"][s, b, 0]) - s * total * N
            t, env = divmod(flat, N)
            seen.add((s, t, env))
            assert max(0, total - C) <= t <= total - n
            reward, weight, last = 0.0, 1.0, t
            for k in range(n):
                last = t + k
                reward += weight * float(history["reward"][s, last, env])
                weight *= float(gamma[s]) * float(~history["terminated"][s, last, env])
                if history["terminated"][s, last, env] or history["truncated"][s, last, env]:
                    break
            assert float(batch["reward"][s, b]) == pytest.approx(reward, rel=1e-5)
            assert float(batch["discount"][s, b]) == pytest.approx(weight, rel=1e-5)
            assert torch.equal(batch["next_observation"][s, b], history["next_observation"][s, last, env])
            assert batch["action"][s, b] == history["action"][s, t, env]
            assert batch["valid"][s, b] == history["valid"][s, t, env]
    assert len({t for _, t, _ in seen}) > 2


def test_every_stored_transition_is_drawn_equally_often():
    memory, _ = filled(28)
    keys = random.fold(random.make_keys(range(S)).unsqueeze(-1), torch.arange(1))[:, 0]
    batch = replay.sample(memory, keys, 48_000, 28, torch.full((S,), 0.9), 1)
    for s in range(S):
        counts = batch["observation"][s].flatten().unique(return_counts=True)[1]
        assert len(counts) == C * N
        assert (counts - 2000).abs().max() < 6 * 2000**0.5


def test_a_learner_draws_the_same_in_any_company():
    memory, _ = filled(28)
    keys, gamma = random.make_keys(range(S)), torch.full((S,), 0.9)
    together = replay.sample(memory, keys, 16, 28, gamma, 3)
    alone = replay.sample({n: m[1:2] for n, m in memory.items()}, keys[1:2], 16, 28, gamma[1:2], 3)
    for name, value in alone.items():
        assert torch.equal(together[name][1:2], value)
