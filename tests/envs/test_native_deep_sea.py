"""Deep sea against bsuite's rules in plain Python, transition by transition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import DeepSea, NativeWorld
from rlmeta.errors import SettingError
from rlmeta.functional import random

SIZES = (1, 2, 5)


class Plain:
    """bsuite's `deep_sea.DeepSea`, deterministic: size, mapping[row][column] and the cost of a move."""

    def __init__(self, mapping: list[list[int]], cost: float) -> None:
        self.mapping, self.cost, self.size = mapping, cost, len(mapping)
        self.row = self.column = 0

    def observation(self) -> list[list[float]]:
        seen = [[0.0] * self.size for _ in range(self.size)]
        if self.row < self.size:
            seen[self.row][self.column] = 1.0
        return seen

    def step(self, action: int) -> tuple[float, bool]:
        reward = 0.0
        right = action == self.mapping[self.row][self.column]
        if self.column == self.size - 1 and right:
            reward += 1.0
        if right:
            self.column = min(self.column + 1, self.size - 1)
            reward -= self.cost / self.size
        else:
            self.column = max(self.column - 1, 0)
        self.row += 1
        return reward, self.row == self.size


def mapping(env: DeepSea, **physics: Any) -> list[list[int]]:
    cell = torch.arange(env.size**2)
    found: list[list[int]] = env.right(cell // env.size, cell % env.size, physics).reshape(env.size, env.size).tolist()
    return found


@pytest.mark.parametrize("size", SIZES)
def test_transitions_equal_plain_python(size: int) -> None:
    """Two learners of three rows, the learners' meanings and costs their own."""
    seeds, costs = torch.tensor([3.0, 8.0]), torch.tensor([0.01, 0.5])
    env = DeepSea(size)
    world = NativeWorld(env, (2,), 3, {"mapping_seed": seeds, "move_cost": costs})
    state = world.reset(random.make_keys([0, 1]))
    maps = [mapping(DeepSea(size, mapping_seed=float(seed))) for seed in seeds]
    plain = [[Plain(maps[i], float(costs[i])) for _ in range(3)] for i in range(2)]
    steps = torch.randint(2, (40, 2, 3), generator=torch.Generator().manual_seed(size))
    for t, action in enumerate(steps):
        if t % 2:  # every other walk goes to the right
            action = torch.tensor([[one.mapping[one.row][one.column] for one in rows] for rows in plain])
        state, transition = world.step(state, action)
        for i, rows in enumerate(plain):
            for n, one in enumerate(rows):
                reward, ended = one.step(int(action[i, n]))
                assert float(transition.reward[i, n]) == pytest.approx(reward, abs=1e-7)
                assert bool(transition.terminated[i, n]) == ended and not bool(transition.truncated[i, n])
                assert transition.next_observation[i, n].tolist() == one.observation()
                if ended:
                    rows[n] = Plain(one.mapping, one.cost)
                assert transition.observation[i, n].tolist() == rows[n].observation()


def test_one_walk_of_all_is_paid() -> None:
    size = 4
    env = DeepSea(size)
    world = NativeWorld(env, (), 2**size)
    state, total = world.reset(random.make_keys([0])[0]), torch.zeros(2**size)
    walks = torch.arange(2**size)
    for t in range(size):
        state, transition = world.step(state, walks >> t & 1)
        total += transition.reward
    assert bool(transition.terminated.all())
    torch.testing.assert_close(total.max(), torch.tensor(0.99))
    assert int((total > 0).sum()) == 1 and float(total.min()) >= -0.01


def test_meanings_are_drawn_for_every_cell_and_seed() -> None:
    env = DeepSea(40)
    first, again, other = (torch.tensor(mapping(env, mapping_seed=torch.tensor(seed))) for seed in (1.0, 1.0, 2.0))
    assert torch.equal(first, again)
    for half in (first.double(), (first == other).double()):  # 1,600 coins: 4 deviations are 0.05
        assert float(half.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(half.mean(0).std()) < 0.15 and float(half.mean(1).std()) < 0.15
    assert mapping(env) == mapping(DeepSea(40, mapping_seed=42.0))


def test_it_is_a_task_by_name() -> None:
    task = rl.task("DeepSea-v0", settings={"size": 3, "mapping_seed": 7})
    run = rl.train(rl.PPO(num_envs=2, num_steps=8, batch_size=16, hidden_sizes=(4,)), task, steps=64, seeds=2)
    assert run.world.observation_space.shape == (3, 3) and bool((run.scores <= 0.99 + 1e-6).all())
    with pytest.raises(SettingError, match="size=0: expected at least 1"):
        DeepSea(0)
