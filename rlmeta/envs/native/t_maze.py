"""T-maze: the goal's side is shown once, at one end of a corridor, and needed at the other (Bakker, 2001)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLACK, BLUE, GREEN, RED, Drawing, Picture, cells
from rlmeta.envs.world import State
from rlmeta.errors import require_count

_ASIDE = torch.tensor([1, 0, -1, 0], device="cpu")
_UPWARDS = torch.tensor([0, 1, 0, -1], device="cpu")


@dataclass(frozen=True)
class TMaze(NativeEnv):
    """T-maze with the rewards of Ni, Ma, Eysenbach and Bacon, "When do transformers shine in RL?", 2023.

    A corridor of `corridor_length` steps ends in a junction with an arm above and below, of which one, drawn for every
    episode, is the goal. Actions are right, up, left, down; walls stop. A passive maze shows the goal's side in the
    first observation. In an active one the agent starts one step to the right of the place where it is shown, once, and
    has to go there. An episode has just as many steps as the best walk (`corridor_length` + 1, in an active maze + 3);
    its last one pays 1 if the agent is in the goal's arm, every other one -1 / `corridor_length` if the agent is behind
    the best walk's column. The best return is 1; without memory it is 0.5.

    The observation is the side that is shown (-1 or 1, otherwise 0), whether this is the junction's column, and the arm
    (-1, 0 or 1): all places of the corridor look alike.
    """

    corridor_length: int = 50
    """Steps from one end of the corridor to the other; the memory that is needed."""
    active: bool = False
    """Whether the goal's side is shown at a place that the agent must visit, to the left of its start."""
    max_episode_steps: int | None = None

    reset_noise = 1

    def __post_init__(self) -> None:
        require_count("corridor_length", self.corridor_length)

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of shown side, junction and arm."""
        return gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the four directions: right, up, left, down."""
        return gym.spaces.Discrete(4)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Start of the corridor; the goal is below if the noise is less than a half."""
        goal = 2 * (noise[..., 0] >= 0.5).long() - 1
        column = torch.full_like(goal, int(self.active))
        shows = column == 0
        return {
            "column": column,
            "arm": torch.zeros_like(goal),
            "goal": goal,
            "shown": torch.where(shows, goal, 0),
            "visited": shows,
            "time": torch.zeros_like(goal),
        }

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """One step in the direction, unless there is a wall."""
        junction, time = self.corridor_length + self.active, state["time"] + 1
        aside, upwards = _ASIDE.to(action.device)[action], _UPWARDS.to(action.device)[action]
        column = torch.where(state["arm"] == 0, state["column"] + aside, state["column"]).clamp(0, junction)
        arm = torch.where(state["column"] == junction, state["arm"] + upwards, state["arm"]).clamp(-1, 1)
        shows = (column == 0) & ~state["visited"]
        over = time == self.corridor_length + 1 + 2 * self.active
        late = (column < time - int(self.active)).float() / -self.corridor_length
        new = {
            "column": column,
            "arm": arm,
            "goal": state["goal"],
            "shown": torch.where(shows, state["goal"], 0),
            "visited": state["visited"] | shows,
            "time": time,
        }
        return new, torch.where(over, (arm == state["goal"]).float(), late), over

    def observe(self, state: State) -> Tensor:
        """Shown side, junction and arm, `[*B, 3]`."""
        junction = state["column"] == self.corridor_length + self.active
        return torch.stack((state["shown"], junction.long(), state["arm"]), -1).float()

    def drawing(self) -> Drawing:
        """Grid of the maze: the goal, the agent, and the sign at the place where it is shown, while it is shown."""
        junction = self.corridor_length + self.active
        walls = [(row, column) for row in (0, 2) for column in range(junction)]

        def draw(state: State, physics: Physics) -> Picture:
            goal = 1 - int(state["goal"]), junction
            here = 1 - int(state["arm"]), int(state["column"])
            sign = [(1 - int(state["shown"]), 0)] if int(state["shown"]) else []
            return cells((3, junction + 1), [(walls, BLACK), (sign, RED), ([goal], GREEN), ([here], BLUE)])

        return Drawing(draw, 10)
