"""T-maze against its rules in plain Python, transition by transition, and walks with and without memory."""

from __future__ import annotations

import random as python_random

import pytest
import torch

from rlmeta.envs.native import NativeWorld, TMaze
from rlmeta.errors import SettingError
from rlmeta.functional import random

RIGHT, UP, LEFT, DOWN = range(4)


class Plain:
    """Ni et al.'s `TMazeClassicPassive` and `TMazeClassicActive`: a map of cells in which one may be."""

    def __init__(self, length: int, oracle: int, goal: int) -> None:
        self.length, self.oracle, self.goal = length, oracle, goal
        self.horizon = length + 1 + 2 * oracle
        self.cells = {(x, 0) for x in range(oracle + length + 1)} | {(oracle + length, y) for y in (-1, 1)}
        self.x, self.y, self.time, self.visited = oracle, 0, 0, False

    def observation(self) -> list[float]:
        shown = 0
        if self.x == 0 and not self.visited:
            shown, self.visited = self.goal, True
        return [shown, float(self.x == self.oracle + self.length), self.y]

    def step(self, action: int) -> tuple[list[float], float, bool]:
        self.time += 1
        dx, dy = [(1, 0), (0, 1), (-1, 0), (0, -1)][action]
        if (self.x + dx, self.y + dy) in self.cells:
            self.x, self.y = self.x + dx, self.y + dy
        if self.time >= self.horizon:
            return self.observation(), float(self.y == self.goal), True
        return self.observation(), float(self.x < self.time - self.oracle) * -1 / self.length, False


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_transitions_equal_plain_python(length: int, active: bool) -> None:
    """Three rows of two learners; right is likelier, so that the junction is reached."""
    world = NativeWorld(TMaze(length, active), (2,), 3)
    state = world.reset(random.make_keys([0, 1]))
    chosen = python_random.Random(length)
    goals = state["env"]["goal"]
    plain = [[Plain(length, int(active), int(goals[i, n])) for n in range(3)] for i in range(2)]
    assert [[maze.observation() for maze in rows] for rows in plain] == world.observation(state).tolist()
    junctions = arms = 0
    for _ in range(150):
        action = torch.tensor(
            [[chosen.choice((RIGHT, RIGHT, RIGHT, UP, LEFT, DOWN)) for _ in range(3)] for _ in range(2)]
        )
        state, transition = world.step(state, action)
        for i, rows in enumerate(plain):
            for n, maze in enumerate(rows):
                observation, reward, over = maze.step(int(action[i, n]))
                assert transition.next_observation[i, n].tolist() == observation
                assert (
                    float(transition.reward[i, n]) == pytest.approx(reward)
                    and bool(transition.terminated[i, n]) == over
                )
                junctions, arms = junctions + (observation[1] == 1), arms + (observation[2] != 0)
                if over:
                    rows[n] = Plain(length, int(active), int(state["env"]["goal"][i, n]))
                    assert transition.observation[i, n].tolist() == rows[n].observation()
    assert junctions > arms > 0


@pytest.mark.parametrize("active", [False, True])
def test_the_best_walk_returns_1_and_one_without_memory_a_half(active: bool) -> None:
    count, length = 400, 7
    world = NativeWorld(TMaze(length, active), (), count)
    state = world.reset(random.make_keys([3])[0])
    remembered, total, blind = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    walk = ([LEFT, RIGHT] if active else []) + [RIGHT] * length
    for step, action in enumerate([*walk, UP]):
        remembered = remembered + world.observation(state)[:, 0]
        last = torch.where(remembered > 0, UP, DOWN) if step == len(walk) else torch.full((count,), action)
        blind += world.step(state, torch.full((count,), action))[1].reward
        state, transition = world.step(state, last)
        total += transition.reward
    assert bool(transition.terminated.all()) and bool((total == 1).all())
    assert float(blind.mean()) == pytest.approx(0.5, abs=0.1)


def test_standing_still_costs_up_to_1() -> None:
    world = NativeWorld(TMaze(10), (), 1)
    state, total = world.reset(random.make_keys([0])[0]), 0.0
    for _ in range(11):
        state, transition = world.step(state, torch.tensor([LEFT]))
        total += float(transition.reward)
    assert total == pytest.approx(-1.0) and bool(transition.terminated)


def test_a_corridor_without_length_is_refused() -> None:
    with pytest.raises(SettingError, match="corridor_length"):
        TMaze(0)
