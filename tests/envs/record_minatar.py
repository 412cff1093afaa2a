"""Records `minatar.npz` from the minatar package, against which the native games are checked without it.

`pip install --no-deps minatar==1.0.15` in an environment with numpy and rlmeta, then
`python -m tests.envs.record_minatar`. The package's random numbers are ours: its generator is replaced by one that
gives the native game's noise in the order in which the package draws. A trajectory is played by a policy that looks a
few steps ahead, so that walls of bricks, waves of aliens and difficulties change, and stored in segments that are
stepped side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlmeta.envs.native import NATIVE
from rlmeta.functional import random

PATH = Path(__file__).with_name("minatar.npz")
GAMES = {"Asterix": "asterix", "Breakout": "breakout", "SpaceInvaders": "space_invaders"}
SEGMENTS, STEPS = 8, 300
"""Segments of a trajectory, and steps of each."""


def noise_of(stream: str, counter: int, width: int) -> torch.Tensor:
    """Uniform numbers of a step or reset: `[width]` float64."""
    return random.uniform(torch.tensor(5), stream, counter, (width,), torch.float64)


class Numbers:
    """Stand-in for the package's `RandomState`, which gives these numbers in order."""

    def __init__(self) -> None:
        self.left: list[float] = []

    def rand(self) -> float:
        """The next number."""
        return self.left.pop(0)

    def randint(self, count: int) -> int:
        """A whole number below `count`, by the next number."""
        return int(self.rand() * count)


def _grid(array: Any) -> np.ndarray:
    return np.asarray(array, bool).reshape(100)


def _asterix(game: Any) -> dict[str, Any]:
    entities = [entity or [0, 0, False, False] for entity in game.entities]
    return {
        "player_column": game.player_x,
        "player_row": game.player_y,
        "column": [entity[0] for entity in entities],
        "present": [entity is not None for entity in game.entities],
        "rightward": [bool(entity[2]) for entity in entities],
        "gold": [bool(entity[3]) for entity in entities],
        "spawn_speed": game.spawn_speed,
        "spawn_timer": game.spawn_timer,
        "move_speed": game.move_speed,
        "move_timer": game.move_timer,
        "ramp_timer": game.ramp_timer,
        "ramp_index": game.ramp_index,
    }


def _breakout(game: Any) -> dict[str, Any]:
    return {
        "paddle": game.pos,
        "ball": 10 * game.ball_y + game.ball_x,
        "trail": 10 * game.last_y + game.last_x,
        "direction": game.ball_dir,
        "bricks": _grid(game.brick_map),
        "passing": bool(game.strike),
    }


def _space_invaders(game: Any) -> dict[str, Any]:
    return {
        "cannon": game.pos,
        "friendly": _grid(game.f_bullet_map),
        "enemy": _grid(game.e_bullet_map),
        "aliens": _grid(game.alien_map),
        "direction": game.alien_dir,
        "move_interval": game.enemy_move_interval,
        "move_timer": game.alien_move_timer,
        "shot_timer": game.alien_shot_timer,
        "cooldown": game.shot_timer,
    }


STATES = {"Asterix": _asterix, "Breakout": _breakout, "SpaceInvaders": _space_invaders}


def state_of(name: str, package: Any) -> dict[str, np.ndarray]:
    """State of the native game that equals the package's."""
    state = {**STATES[name](package.env), "last_action": package.last_action}
    return {leaf: np.asarray(value) for leaf, value in state.items()}


def _plan(package: Any, actions: Sequence[int], rng: np.random.Generator) -> int:
    """Index of the action after which random play of 12 steps does best."""
    values = []
    for action in actions:
        value = 0.0
        for _ in range(4):
            trial = copy.deepcopy(package)
            trial.random.left = trial.env.random.left = rng.random(400).tolist()
            for ahead in range(12):
                reward, ended = trial.act(action if ahead == 0 else actions[rng.integers(len(actions))])
                value += reward * 0.9**ahead
                if ended:
                    value -= 3 * 0.9**ahead
                    break
        values.append(value + 1e-3 * rng.random())
    return int(np.argmax(values))


def record(name: str, minimal: bool) -> dict[str, np.ndarray]:
    """Trajectory of a game: states at the start and the end of segments, actions, observations, rewards and ends."""
    from minatar import Environment

    native = NATIVE[f"MinAtar/{name}-v{int(minimal)}"]
    package, numbers, rng = Environment(GAMES[name]), Numbers(), np.random.default_rng(0)
    package.random = package.env.random = numbers
    actions = package.minimal_action_set() if minimal else list(range(6))
    resets = 0

    def begin() -> None:
        nonlocal resets
        numbers.left = noise_of("reset", resets, native.reset_noise).tolist()
        package.reset()
        resets += 1

    begin()
    names = ("start", "end", "action", "state", "reward", "ended", "reset")
    columns: dict[str, list[Any]] = {column: [] for column in names}
    for step in range(SEGMENTS * STEPS):
        if step % STEPS == 0:
            if name == "Breakout" and len(columns["start"]) % 2:
                package.env.brick_map[:] = 0  # so that the wall is refilled
            columns["start"].append(state_of(name, package))
        columns["reset"].append(resets)
        action = _plan(package, actions, rng) if rng.random() < 0.97 else int(rng.integers(len(actions)))
        numbers.left = noise_of("step", step, native.step_noise).tolist()
        reward, ended = package.act(actions[action])
        for column, value in (("action", action), ("state", package.state()), ("reward", reward), ("ended", ended)):
            columns[column].append(value)
        if ended:
            begin()
        if (step + 1) % STEPS == 0:
            columns["end"].append(state_of(name, package))
    states = {
        f"{side}/{leaf}": np.stack([state[leaf] for state in columns[side]])
        for side in ("start", "end")
        for leaf in columns["start"][0]
    }
    return {
        **states,
        "action": np.asarray(columns["action"], np.uint8),
        "observation": np.packbits(np.asarray(columns["state"], bool)),
        "reward": np.asarray(columns["reward"], np.uint8),
        "ended": np.asarray(columns["ended"], bool),
        "reset": np.asarray(columns["reset"], np.int16),
    }


def main() -> None:
    """Record every game with both action sets."""
    arrays = {}
    for name in GAMES:
        for minimal in (False, True):
            trajectory = record(name, minimal)
            print(name, minimal, "return", int(trajectory["reward"].sum()), "ends", int(trajectory["ended"].sum()))
            arrays |= {f"{name}-v{int(minimal)}/{part}": array for part, array in trajectory.items()}
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
