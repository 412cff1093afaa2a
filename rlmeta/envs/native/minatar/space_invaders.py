"""Space Invaders of MinAtar: a cannon shoots at aliens that come down and shoot back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.minatar.rules import (
    ACTIONS,
    FIRE,
    SIDE,
    action_space,
    aside,
    at,
    mark,
    observation_space,
    picture,
    require_probability,
    sticky,
)
from rlmeta.envs.world import State

_BOTTOM = SIDE * (SIDE - 1)
_COOLDOWN, _MOVE_INTERVAL, _FASTEST, _SHOT_INTERVAL = 5, 12, 6, 10
_WAVE = torch.zeros(SIDE, SIDE, dtype=torch.bool, device="cpu")
_WAVE[:4, 2:8] = True
_WAVE = _WAVE.flatten()
_FAR = 1000


def _ranks() -> Tensor:
    """Order in which a cell's alien would shoot at the cannon, `[10, 100]` by the cannon's column.

    By distance of the columns, the left one first of two, and within a column the lowest alien.
    """
    return torch.tensor(
        [
            [
                SIDE * (2 * abs(column - cannon) + (column > cannon)) + SIDE - 1 - row
                for row in range(SIDE)
                for column in range(SIDE)
            ]
            for cannon in range(SIDE)
        ],
        device="cpu",
    )


_RANKS = _ranks()


@dataclass(frozen=True)
class SpaceInvaders(NativeEnv):
    """Space Invaders of the minatar package 1.0.15: an alien that is shot pays 1, and a new wave follows the last.

    The episode ends when a bullet or an alien meets the cannon, or the aliens land. The channels are cannon, alien,
    alien that moves left, alien that moves right, friendly bullet, enemy bullet; the timers are hidden. Only sticky
    actions are random; there is no time limit. As in the package, the action that a sticky step repeats may be of the
    episode before.
    """

    sticky_action_prob: float = 0.1
    """Probability that the last action is done again in place of the chosen one."""
    difficulty_ramping: bool = True
    """Whether every new wave of aliens is faster, to a limit."""
    minimal_actions: bool = True
    """Whether there are only the actions that matter here (none, left, right, fire), as in MinAtar/SpaceInvaders-v1,
    or all 6."""
    max_episode_steps: int | None = None

    costly_observation = True
    step_noise = 1

    def __post_init__(self) -> None:
        require_probability("SpaceInvaders", self.sticky_action_prob)

    @property
    def actions(self) -> str:
        """The action set: a letter each."""
        return "nlrf" if self.minimal_actions else ACTIONS

    @cached_property
    def observation_space(self) -> gym.Space:
        """Pictures of 6 channels."""
        return observation_space(6)

    @cached_property
    def action_space(self) -> gym.Space:
        """The action set."""
        return action_space(self.actions)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The first wave, which moves left."""
        zero = torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)
        aliens = _WAVE.to(noise.device).expand(*zero.shape, -1).clone()
        return {
            "cannon": zero + 5,
            "friendly": torch.zeros_like(aliens),
            "enemy": torch.zeros_like(aliens),
            "aliens": aliens,
            "direction": zero - 1,
            "move_interval": zero + _MOVE_INTERVAL,
            "move_timer": zero + _MOVE_INTERVAL,
            "shot_timer": zero + _SHOT_INTERVAL,
            "cooldown": zero,
            "last_action": zero,
        }

    def restart(self, state: State, noise: Tensor, physics: Physics) -> State:
        """As `reset`, with the last action kept for a sticky first step."""
        return {**self.reset(noise, physics), "last_action": state["last_action"]}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Cannon, bullets, aliens, their shot, hits, then timers."""
        probability = physics.get("sticky_action_prob", self.sticky_action_prob)
        action = sticky(state, action, self.actions, noise[..., 0], probability)
        cannon = (state["cannon"] + aside(action)).clamp(0, SIDE - 1)
        base = cannon + _BOTTOM
        fired = (action == FIRE) & (state["cooldown"] == 0)
        cooldown = torch.where(fired, _COOLDOWN, state["cooldown"])
        friendly = _up(state["friendly"]) | (fired.unsqueeze(-1) & mark(base - SIDE))
        enemy = _down(state["enemy"])
        met = at(enemy, base) | at(state["aliens"], base)
        aliens, direction, move_timer, landed = self._advance(state)
        terminated = met | landed | at(aliens, base)
        shoots = state["shot_timer"] == 0
        shooter = torch.where(aliens, _RANKS.to(cannon.device)[cannon], _FAR).argmin(-1)
        enemy = enemy | (shoots.unsqueeze(-1) & mark(shooter))
        killed = aliens & friendly
        aliens, friendly = aliens & ~killed, friendly & ~killed
        cleared = ~aliens.any(-1)
        interval = state["move_interval"]
        if self.difficulty_ramping:
            interval = interval - (cleared & (interval > _FASTEST)).long()
        new = {
            "cannon": cannon,
            "friendly": friendly,
            "enemy": enemy,
            "aliens": aliens | (cleared.unsqueeze(-1) & _WAVE.to(aliens.device)),
            "direction": direction,
            "move_interval": interval,
            "move_timer": move_timer - 1,
            "shot_timer": torch.where(shoots, _SHOT_INTERVAL, state["shot_timer"]) - 1,
            "cooldown": (cooldown - 1).clamp(min=0),
            "last_action": action,
        }
        return new, killed.sum(-1).float(), terminated

    def _advance(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Aliens, their direction, their move timer and whether they have landed, after their move if it is time."""
        aliens, direction = state["aliens"], state["direction"]
        moves, left = state["move_timer"] == 0, direction < 0
        columns = aliens.unflatten(-1, (SIDE, SIDE)).any(-2)
        blocked = torch.where(left, columns[..., 0], columns[..., -1])
        turns, shifts = moves & blocked, moves & ~blocked
        # the column that a shift would wrap around is empty
        shifted = torch.where(left.unsqueeze(-1), aliens.roll(-1, -1), aliens.roll(1, -1))
        moved = torch.where(shifts.unsqueeze(-1), shifted, aliens)
        timer = torch.where(moves, torch.minimum(aliens.sum(-1), state["move_interval"]), state["move_timer"])
        return (
            torch.where(turns.unsqueeze(-1), aliens.roll(SIDE, -1), moved),
            torch.where(turns, -direction, direction),
            timer,
            turns & aliens[..., _BOTTOM:].any(-1),
        )

    def observe(self, state: State) -> Tensor:
        """Picture `[*B, 10, 10, 6]`."""
        aliens, left = state["aliens"], (state["direction"] < 0).unsqueeze(-1)
        cannon = mark(state["cannon"] + _BOTTOM)
        return picture(cannon, aliens, aliens & left, aliens & ~left, state["friendly"], state["enemy"])


def _up(grid: Tensor) -> Tensor:
    """Grid `[*B, 100]` moved up by a row, the last one empty."""
    return torch.nn.functional.pad(grid, (-SIDE, SIDE))


def _down(grid: Tensor) -> Tensor:
    """Grid `[*B, 100]` moved down by a row, the first one empty."""
    return torch.nn.functional.pad(grid, (SIDE, -SIDE))
