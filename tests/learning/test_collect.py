"""Acting: memory is carried, cleared at episode ends, and kept with the rollout; episode sums are those of a walk."""

from __future__ import annotations

import torch

from rlmeta.envs.task import task
from rlmeta.functional import random
from rlmeta.learning.collect import collect, episode_statistics

S, N, T = 2, 3, 60


class Recurrent:
    """A recurrent policy's stand-in: its memory counts the steps since it was cleared."""

    noise_hold = 1
    first = 0.0

    def initial_memory(self, p, rows):
        return {"steps": torch.full(rows, self.first)}

    def effective_params(self, state):
        return state["params"]

    def act(self, p, observation, memory, key, deterministic=False):
        action = random.integers(key, "action", 0, (N,), 2)
        return action, {"steps": memory["steps"] + 1}


def start():
    world = task("CartPole-v1").world((S,), N)
    keys = random.make_keys(range(S))
    zero = torch.zeros(S, dtype=torch.int64)
    state = {
        "params": {},
        "key": keys,
        "world": world.reset(keys),
        "memory": {"steps": torch.zeros(S, N)},
        "count": {"vector_steps": zero, "env_steps": zero.clone()},
        "episode": {"return": torch.zeros(S, N).double(), "length": torch.zeros(S, N).double()},
    }
    return state, world


def test_memory_is_cleared_where_an_episode_ended_and_carried_on_elsewhere():
    state, world = start()
    state, first = collect(Recurrent(), state, world, T)
    assert torch.equal(first["first_memory"]["steps"], torch.zeros(S, N))
    ended = first["terminated"] | first["truncated"]
    assert ended.any(1).all()
    since = torch.zeros(S, N)
    for t in range(T):
        since = torch.where(ended[:, t], torch.zeros(S, N), since + 1)
    assert torch.equal(state["memory"]["steps"], since)
    _, second = collect(Recurrent(), state, world, 1)
    assert torch.equal(second["first_memory"]["steps"], since)


def test_a_rollout_is_one_chain_of_observations_cut_where_episodes_end():
    state, world = start()
    _, rollout = collect(Recurrent(), state, world, T)
    ended = rollout["terminated"] | rollout["truncated"]
    same = (rollout["observation"][:, 1:] == rollout["next_observation"][:, :-1]).all(-1)
    assert torch.equal(same, ~ended[:, :-1])
    assert state["count"]["vector_steps"].tolist() == [T] * S
    assert state["count"]["env_steps"].tolist() == [T * N] * S


def test_two_rollouts_are_one_of_twice_the_length():
    state, world = start()
    _, whole = collect(Recurrent(), state, world, 2 * T)
    state, world = start()
    state, first = collect(Recurrent(), state, world, T)
    state, second = collect(Recurrent(), state, world, T)
    for name in ("observation", "action", "reward", "terminated"):
        assert torch.equal(whole[name], torch.cat([first[name], second[name]], 1))


def test_episode_sums_equal_a_walk_through_the_rollouts():
    state, world = start()
    returns = [[] for _ in range(S)]
    running = torch.zeros(S, N)
    totals = torch.zeros(3, S, dtype=torch.float64)
    for _ in range(2):
        state, rollout = collect(Recurrent(), state, world, T)
        state, sums = episode_statistics(state, rollout)
        totals += torch.stack([sums["return_sum"], sums["length_sum"], sums["episodes"]])
        for t in range(T):
            running += rollout["reward"][:, t]
            ended = rollout["terminated"][:, t] | rollout["truncated"][:, t]
            for s, n in ended.nonzero().tolist():
                returns[s].append(float(running[s, n]))
                running[s, n] = 0.0
    assert totals[2].tolist() == [len(r) for r in returns]
    assert totals[0].tolist() == [sum(r) for r in returns]
    assert torch.equal(totals[0], totals[1])
