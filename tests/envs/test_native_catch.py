"""Catch against bsuite's rules in plain Python, transition by transition."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import Catch, NativeWorld
from rlmeta.errors import SettingError
from rlmeta.functional import random


class Plain:
    """bsuite's `catch.Catch`."""

    def __init__(self, rows: int, columns: int, ball: int) -> None:
        self.rows, self.columns = rows, columns
        self.ball_x, self.ball_y, self.paddle = ball, 0, columns // 2

    def observation(self) -> list[list[list[int]]]:
        board = [[[0] for _ in range(self.columns)] for _ in range(self.rows)]
        board[self.ball_y][self.ball_x] = board[self.rows - 1][self.paddle] = [1]
        return board

    def step(self, action: int) -> tuple[float, bool]:
        self.paddle = min(max(self.paddle + action - 1, 0), self.columns - 1)
        self.ball_y += 1
        if self.ball_y == self.rows - 1:
            return (1.0 if self.paddle == self.ball_x else -1.0), True
        return 0.0, False


@pytest.mark.parametrize("size", [(10, 5), (2, 1), (4, 6)])
def test_transitions_equal_plain_python(size: tuple[int, int]) -> None:
    world = NativeWorld(Catch(*size), (2,), 3)
    state = world.reset(random.make_keys([0, 1]))
    plain = [[Plain(*size, int(ball)) for ball in balls] for balls in state["env"]["column"]]
    actions = torch.randint(3, (60, 2, 3), generator=torch.Generator().manual_seed(0))
    rewards = set()
    for action in actions:
        state, transition = world.step(state, action)
        for i, rows in enumerate(plain):
            for n, board in enumerate(rows):
                reward, over = board.step(int(action[i, n]))
                rewards.add(reward)
                assert float(transition.reward[i, n]) == reward and bool(transition.terminated[i, n]) == over
                assert transition.next_observation[i, n].tolist() == board.observation()
                if over:
                    rows[n] = Plain(*size, int(state["env"]["column"][i, n]))
                assert transition.observation[i, n].tolist() == rows[n].observation()
    assert rewards == ({0.0, 1.0, -1.0} if size[0] > 2 else {1.0})


def test_balls_start_everywhere() -> None:
    columns = NativeWorld(Catch(), (), 1000).reset(random.make_keys([0])[0])["env"]["column"]
    assert bool((columns.bincount(minlength=5) > 150).all())


def test_it_is_a_task_by_name() -> None:
    agent = rl.PPO(num_envs=2, num_steps=8, batch_size=16, hidden_sizes=(4,))
    run = rl.train(agent, "Catch-v0", steps=64, seeds=2)
    assert run.world.observation_space.shape == (10, 5, 1) and bool((run.scores.abs() <= 1).all())
    with pytest.raises(SettingError, match="rows=1, columns=5"):
        Catch(rows=1)
