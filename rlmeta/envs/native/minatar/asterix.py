"""Asterix of MinAtar: collect gold and keep away from enemies, which cross the screen in eight lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.minatar.rules import (
    ACTIONS,
    SIDE,
    action_space,
    aside,
    downwards,
    mark,
    observation_space,
    picture,
    require_probability,
    sticky,
)
from rlmeta.envs.world import State

_RAMP_INTERVAL, _SPAWN_SPEED, _MOVE_INTERVAL = 100, 10, 5
_LANES = torch.arange(1, SIDE - 1, device="cpu")
"""Row of each lane: all but the first and the last."""
_COLUMNS = torch.arange(SIDE, device="cpu")


@dataclass(frozen=True)
class Asterix(NativeEnv):
    """Asterix of the minatar package 1.0.15: gold pays 1, an enemy ends the episode.

    The channels are player, enemy, trail (behind everything that moves, so that its direction is seen) and gold. What
    appears, where and from which side, is random, and so are sticky actions; there is no time limit. As in the package,
    the action that a sticky step repeats may be of the episode before.
    """

    sticky_action_prob: float = 0.1
    """Probability that the last action is done again in place of the chosen one."""
    difficulty_ramping: bool = True
    """Whether enemies and gold become faster and more frequent, to a limit."""
    minimal_actions: bool = True
    """Whether there are only the actions that matter here (none, left, up, right, down), as in MinAtar/Asterix-v1, or
    all 6."""
    max_episode_steps: int | None = None

    costly_observation = True
    step_noise = 4

    def __post_init__(self) -> None:
        require_probability("Asterix", self.sticky_action_prob)

    @property
    def actions(self) -> str:
        """The action set: a letter each."""
        return "nlurd" if self.minimal_actions else ACTIONS

    @cached_property
    def observation_space(self) -> gym.Space:
        """Pictures of 4 channels."""
        return observation_space(4)

    @cached_property
    def action_space(self) -> gym.Space:
        """The action set."""
        return action_space(self.actions)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The player in the middle of empty lanes."""
        zero = torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)
        lanes = torch.zeros(*zero.shape, len(_LANES), dtype=torch.int64, device=noise.device)
        empty = lanes.bool()
        return {
            "player_column": zero + 5,
            "player_row": zero + 5,
            "column": lanes,
            "present": empty,
            "rightward": empty,
            "gold": empty,
            "spawn_speed": zero + _SPAWN_SPEED,
            "spawn_timer": zero + _SPAWN_SPEED,
            "move_speed": zero + _MOVE_INTERVAL,
            "move_timer": zero + _MOVE_INTERVAL,
            "ramp_timer": zero + _RAMP_INTERVAL,
            "ramp_index": zero,
            "last_action": zero,
        }

    def restart(self, state: State, noise: Tensor, physics: Physics) -> State:
        """As `reset`, with the last action kept for a sticky first step."""
        return {**self.reset(noise, physics), "last_action": state["last_action"]}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """New entity, player, entities, then timers; the noise is for a sticky action, side, kind and lane."""
        probability = physics.get("sticky_action_prob", self.sticky_action_prob)
        action = sticky(state, action, self.actions, noise[..., 0], probability)
        column = (state["player_column"] + aside(action)).clamp(0, SIDE - 1)
        row = (state["player_row"] + downwards(action)).clamp(1, SIDE - 2)
        spawns = state["spawn_timer"] == 0
        entities = _spawn(state, spawns, noise[..., 1:])
        before = _meet(entities, column, row)
        moves = state["move_timer"] == 0
        entities = _advance({**entities, "present": entities["present"] & ~before[0]}, moves)
        after = _meet(entities, column, row)  # where nothing has moved, whatever is met was met before
        new = {
            **entities,
            "present": entities["present"] & ~after[0],
            "player_column": column,
            "player_row": row,
            "spawn_timer": torch.where(spawns, state["spawn_speed"], state["spawn_timer"]) - 1,
            "move_timer": torch.where(moves, state["move_speed"], state["move_timer"]) - 1,
            "last_action": action,
            **(self._ramp(state) if self.difficulty_ramping else {name: state[name] for name in _RAMP}),
        }
        reward = before[0].sum(-1) + after[0].sum(-1)
        return new, reward.float(), before[1] | after[1]

    def _ramp(self, state: State) -> State:
        """Speeds and timer of the difficulty, after a step."""
        spawn_speed, move_speed = state["spawn_speed"], state["move_speed"]
        index, timer = state["ramp_index"], state["ramp_timer"]
        ramps = (spawn_speed > 1) | (move_speed > 1)
        harder = ramps & (timer < 0)
        return {
            "spawn_speed": spawn_speed - (harder & (spawn_speed > 1)).long(),
            "move_speed": move_speed - (harder & (move_speed > 1) & (index % 2 == 1)).long(),
            "ramp_index": index + harder.long(),
            "ramp_timer": torch.where(harder, _RAMP_INTERVAL, timer - ramps.long()),
        }

    def observe(self, state: State) -> Tensor:
        """Picture `[*B, 10, 10, 4]`."""
        column, present, gold = state["column"], state["present"], state["gold"]
        columns = _COLUMNS.to(column.device)
        here = (columns == column.unsqueeze(-1)) & present.unsqueeze(-1)
        behind = (columns == (column - _heading(state["rightward"])).unsqueeze(-1)) & present.unsqueeze(-1)
        gold = gold.unsqueeze(-1)
        player = mark(SIDE * state["player_row"] + state["player_column"])
        return picture(player, _framed(here & ~gold), _framed(behind), _framed(here & gold))


_RAMP = ("spawn_speed", "move_speed", "ramp_index", "ramp_timer")


def _heading(rightward: Tensor) -> Tensor:
    return 2 * rightward.long() - 1


def _framed(lanes: Tensor) -> Tensor:
    """Grid `[*B, 100]` of the lanes' rows `[*B, 8, 10]`."""
    return torch.nn.functional.pad(lanes.flatten(-2), (SIDE, SIDE))


def _spawn(state: State, spawns: Tensor, noise: Tensor) -> State:
    """Entities, with a new one in a free lane where `spawns`: its side, kind and lane are drawn, in this order."""
    side, kind, lane = (number.unsqueeze(-1) for number in noise.unbind(-1))
    rightward, gold = side < 0.5, kind < 1 / 3
    free = ~state["present"]
    order = free.cumsum(-1)
    chosen = (lane * order[..., -1:]).long() + 1
    slot = free & (order == chosen) & spawns.unsqueeze(-1)
    return {
        "column": torch.where(slot, torch.where(rightward, 0, SIDE - 1), state["column"]),
        "present": state["present"] | slot,
        "rightward": torch.where(slot, rightward, state["rightward"]),
        "gold": torch.where(slot, gold, state["gold"]),
    }


def _meet(entities: State, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Gold that the player collects, `[*B, 8]` bool, and whether an enemy is met, `[*B]` bool."""
    lane = _LANES.to(row.device) == row.unsqueeze(-1)
    met = entities["present"] & lane & (entities["column"] == column.unsqueeze(-1))
    return met & entities["gold"], (met & ~entities["gold"]).any(-1)


def _advance(entities: State, moves: Tensor) -> State:
    """Entities one column on where `moves`; those that leave the screen are gone."""
    moves = moves.unsqueeze(-1)
    column = torch.where(moves, entities["column"] + _heading(entities["rightward"]), entities["column"])
    inside = (column >= 0) & (column < SIDE)
    return {**entities, "column": column, "present": entities["present"] & inside}
