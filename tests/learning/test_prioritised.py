"""Prioritised replay: frequencies in proportion to priorities, weights, new transitions, and what is never drawn."""

from __future__ import annotations

import pytest
import torch

from rlmeta.functional import random, tree
from rlmeta.learning import prioritised, replay
from rlmeta.learning.prioritised import Prioritised
from rlmeta.learning.replay import LARGEST, PRIORITY
from tests.learning.test_replay import GAMMA, C, N, S, T, empty, history_of

HYPER = {
    "gamma": GAMMA,
    "priority_exponent": torch.tensor([0.5, 1.0, 0.6]),
    "importance_exponent": torch.tensor([0.4, 1.0, 0.0]),
}


def fixed_at(progress, memory, learners=slice(None)):
    gamma, alpha, start = (HYPER[name][learners] for name in HYPER)
    return prioritised.fixed(memory, gamma, alpha, start + (1 - start) * progress)


def with_priorities(memory):
    rows = memory["reward"].shape
    return {**memory, PRIORITY: torch.zeros(rows), LARGEST: torch.zeros(S)}


def filled(total, capacity=C, ends=0.15, priorities=True):
    history = history_of(total, ends=ends)
    memory = with_priorities(empty(history, capacity))
    for start in range(0, total, T):
        rollout = {n: h[:, start : start + T] for n, h in history.items()}
        memory = replay.insert(memory, rollout, rollout["reward"], 1)
    if priorities:
        drawn = torch.rand(memory[PRIORITY].shape, generator=torch.Generator().manual_seed(3)) + 0.05
        memory[PRIORITY] = torch.where(memory[PRIORITY] > 0, drawn, 0.0)
    return memory, history


def draw(memory, batch_size, n_steps=1, progress=0.0, key=None):
    source = Prioritised(batch_size, n_steps)
    now, fixed = prioritised.moving(memory, n_steps), fixed_at(progress, memory)
    key = random.make_keys(range(S)) if key is None else key
    return source, now, fixed, source.draw(now, fixed, key)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_transitions_are_drawn_in_proportion_to_their_priorities(n_steps):
    memory, _ = filled(28)
    _, _, _, batch = draw(memory, 40_000, n_steps)
    open_ = memory[PRIORITY].clone()
    for s in range(S):
        for env in range(N):
            for age in range(1, n_steps):
                open_[s, (memory["written"][s, env] - age) % C, env] = 0.0
    for s in range(S):
        p = (open_[s].flatten() / open_[s].sum()).double()
        counts = torch.bincount(batch["place"][s], minlength=C * N)[: C * N].double()
        assert bool((counts[p == 0] == 0).all()) and bool(batch["valid"][s].all())
        chi = ((counts - 40_000 * p).square() / (40_000 * p))[p > 0].sum()
        freedom = int((p > 0).sum()) - 1
        assert freedom > 10 and float(chi) < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("n_steps", [1, 3])
def test_what_is_drawn_is_the_transition_of_the_row(n_steps):
    memory, history = filled(28)
    _, _, fixed, batch = draw(memory, 64, n_steps)
    t, env = batch["place"] // N, batch["place"] % N
    for name, value in replay.transitions(memory, t, env, GAMMA, n_steps).items():
        assert torch.equal(value, batch[name])
    assert PRIORITY not in fixed["memory"]
    seen = batch["observation"]
    assert bool(torch.isin(seen, history["observation"]).all())


def test_weights_undo_the_priorities():
    memory, _ = filled(28)
    _, _, _, batch = draw(memory, 64)
    priority = memory[PRIORITY].flatten(1).gather(1, batch["place"])
    for s in range(S):
        expected = (priority[s].min() / priority[s]) ** HYPER["importance_exponent"][s]
        torch.testing.assert_close(batch["weight"][s], expected, rtol=1e-5, atol=1e-6)
    late = draw(memory, 64, progress=1.0)[3]
    for s in range(S):
        torch.testing.assert_close(late["weight"][s], priority[s].min() / priority[s], rtol=1e-5, atol=1e-6)


def test_full_correction_makes_the_weighted_mean_that_of_all_transitions():
    memory, _ = filled(28)
    batch = draw(memory, 40_000, progress=1.0)[3]
    for s in range(S):
        weight, kept = batch["weight"][s].double(), memory[PRIORITY][s] > 0
        mean = (weight * batch["reward"][s]).sum() / weight.sum()
        assert float(mean) == pytest.approx(float(memory["reward"][s][kept].double().mean()), abs=0.01)


def test_new_transitions_have_the_largest_priority_and_what_is_no_transition_none():
    memory, _ = filled(28, priorities=False)
    for s in range(S):
        assert torch.equal(memory[PRIORITY][s] > 0, memory["valid"][s])
    assert set(memory[PRIORITY].unique().tolist()) == {0.0, 1.0}  # the first have 1
    memory[LARGEST] = torch.tensor([3.0, 0.0, 0.5])
    history = history_of(T, seed=9, ends=0.0)
    history["valid"][:, 0] = False
    before = memory["written"].clone()
    memory = replay.insert(memory, history, history["reward"], 1)
    for s, new in enumerate((3.0, 1.0, 0.5)):
        for env in range(N):
            rows = [(int(before[s, env]) + t) % C for t in range(T)]
            expected = [new * float(history["valid"][s, t, env]) for t in range(T)]
            assert memory[PRIORITY][s, rows, env].tolist() == expected
            assert float(memory[PRIORITY][s, int(memory["written"][s, env]) % C, env]) == 0.0


def test_a_step_sets_the_priorities_of_its_minibatch_alone():
    memory, _ = filled(28)
    source, now, fixed, batch = draw(memory, 8, 3)
    errors = torch.rand(S, 8, generator=torch.Generator().manual_seed(1)) * 4
    errors = errors.gather(1, (batch["place"].unsqueeze(-1) == batch["place"].unsqueeze(-2)).long().argmax(-1))
    kept = tree.map(torch.clone, {"now": now, "memory": memory})
    after = source.update(now, fixed, batch, errors)
    moved = prioritised.with_moved(memory, after, 3)
    for name, part in tree.flatten({"now": now, "memory": memory}).items():
        assert torch.equal(part, tree.flatten(kept)[name]), "nothing is written in place"
    expected = memory[PRIORITY].clone()
    for s in range(S):
        for b in range(8):
            row, env = divmod(int(batch["place"][s, b]), N)
            expected[s, row, env] = (errors[s, b] + 1e-6) ** HYPER["priority_exponent"][s]
    torch.testing.assert_close(moved[PRIORITY], expected, rtol=1e-6, atol=0)
    top = torch.maximum(memory[LARGEST], ((errors + 1e-6) ** HYPER["priority_exponent"].unsqueeze(-1)).amax(-1))
    torch.testing.assert_close(moved[LARGEST], top)
    untouched = prioritised.with_moved(memory, now, 3)
    assert torch.equal(untouched[PRIORITY], memory[PRIORITY]), "the newest get back what they had"


def test_an_empty_memory_gives_nothing_that_counts():
    history = history_of(4)
    memory = with_priorities(empty(history))
    source, now, fixed, batch = draw(memory, 8)
    assert not bool(batch["valid"].any()) and bool((batch["weight"] == 0).all() | True)
    assert bool(batch["weight"].isfinite().all())
    after = source.update(now, fixed, batch, torch.ones(S, 8))
    assert bool((prioritised.with_moved(memory, after, 1)[PRIORITY] == 0).all())


def test_a_learner_draws_the_same_in_any_company():
    memory, _ = filled(28)
    together = draw(memory, 16, 3)[3]
    for s in range(S):
        own = {n: m[s : s + 1] for n, m in memory.items()}
        source = Prioritised(16, 3)
        key = random.make_keys([s])
        alone = source.draw(prioritised.moving(own, 3), fixed_at(0.0, own, slice(s, s + 1)), key)
        for name, value in alone.items():
            assert torch.equal(together[name][s : s + 1], value)


def test_nothing_of_before_a_cut_reaches_over_it():
    first = history_of(8, ends=0.0)
    memory = replay.insert(with_priorities(empty(first, 40)), first, first["reward"], 1)
    memory = replay.cut(memory, 1)
    second = history_of(8, seed=1, ends=0.0)
    second |= {name: second[name] + 1000 for name in ("observation", "next_observation")}
    memory = replay.insert(memory, second, second["reward"], 1)
    batch = draw(memory, 400, 3)[3]
    assert bool(batch["valid"].all())
    old = (batch["observation"] < 1000).squeeze(-1)
    assert bool(old.any()) and bool((batch["next_observation"][old] < 1000).all())
