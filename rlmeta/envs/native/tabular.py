"""Tabular Markov decision processes: from arrays, and the grid worlds of gymnasium and of textbooks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import gymnasium as gym
import torch
from gymnasium.envs.toy_text.frozen_lake import MAPS
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import BLACK, BLUE, GREEN, RED, Drawing, Picture, cells, twin
from rlmeta.envs.world import State
from rlmeta.errors import SettingError, unknown_name
from rlmeta.functional.shapes import flags


class Tables(NamedTuple):
    """Transition tables of a tabular MDP: K outcomes with their probabilities for S states and A actions."""

    probability: Tensor
    """`[S, A, K]` float64."""
    next_state: Tensor
    """`[S, A, K]` int64."""
    reward: Tensor
    """`[S, A, K]` float64."""
    terminated: Tensor
    """`[S, A, K]` bool."""
    start: Tensor
    """`[S]` float64, the probabilities of the initial state."""


class Tabular(NativeEnv):
    """Tabular MDP, defined by its `tables`; the observation is the state's index.

    Physics may override any of the tables, by name and for every row.
    """

    reset_noise = 1

    @cached_property
    @abstractmethod
    def tables(self) -> Tables:
        """Transition tables: the outcomes of every state and action."""

    @property
    def step_noise(self) -> int:
        """Number of random numbers of a step: 0 if every action has one outcome."""
        return int(self.tables.next_state.shape[-1] > 1)

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the states."""
        return gym.spaces.Discrete(self.tables.next_state.shape[0])

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the actions."""
        return gym.spaces.Discrete(self.tables.next_state.shape[1])

    def constants(self) -> dict[str, Tensor]:
        """Constants that physics may override: the tables."""
        return self.tables._asdict()

    def dynamics(self) -> tuple[Tensor, Tensor]:
        """Transition matrix and expected reward for dynamic programming, V = max_a R + discount P V.

        Returns:
            P `[S, A, S]`, the probability that the episode continues in s', and the expected reward R `[S, A]`.
        """
        probability, next_state, reward, terminated, _ = self.tables
        going_on = torch.zeros(*next_state.shape[:2], next_state.shape[0], dtype=torch.float64, device="cpu")
        going_on.scatter_add_(-1, next_state, probability * ~flags(terminated, "terminated"))
        return going_on, (probability * reward).sum(-1)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """Initial state, drawn at random."""
        levels = _levels(physics["start"]) if "start" in physics else self._flat(noise.device).start
        return {"state": _category(noise, levels)}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Transition to one of the action's outcomes."""
        flat = self._flat(action.device)
        _, actions, outcomes = self.tables.next_state.shape
        index = state["state"] * actions + action
        if outcomes > 1:
            index = index * outcomes + _category(noise, self._outcome_levels(index, flat, physics))
        next_state, reward, terminated = (
            physics[name].flatten(-3).gather(-1, index.unsqueeze(-1)).squeeze(-1) if name in physics else table[index]
            for name, table in (
                ("next_state", flat.next_state),
                ("reward", flat.reward),
                ("terminated", flat.terminated),
            )
        )
        return {"state": next_state}, reward.float(), terminated

    def observe(self, state: State) -> Tensor:
        """Observation: the state's index."""
        return state["state"]

    def _ahead_rate(self, physics: Physics) -> Tensor | None:
        """Probability per row of the middle one of three outcomes, None if physics does not override it."""
        return None

    def _outcome_levels(self, index: Tensor, flat: _Flat, physics: Physics) -> Tensor:
        if "probability" in physics:
            rows = physics["probability"].flatten(-3, -2)
            chosen = index[..., None, None].expand(*index.shape, 1, rows.shape[-1])
            return _levels(rows.gather(-2, chosen).squeeze(-2))
        ahead = self._ahead_rate(physics)
        if ahead is None:
            return flat.outcome[index]
        side = (1 - ahead) / 2
        return torch.stack((side, side + ahead, torch.full_like(side, math.inf)), -1)

    def _flat(self, device: torch.device) -> _Flat:
        if device not in self._flat_by_device:
            tables = self.tables
            self._flat_by_device[device] = _Flat(
                _levels(tables.probability).flatten(0, 1).to(device),
                tables.next_state.flatten().to(device),
                tables.reward.float().flatten().to(device),
                tables.terminated.flatten().to(device),
                _levels(tables.start).to(device),
            )
        return self._flat_by_device[device]

    @cached_property
    def _flat_by_device(self) -> dict[torch.device, _Flat]:
        return {}


class _Flat(NamedTuple):
    """Flattened tables of a Markov decision process of S states, A actions and K outcomes of each.

    `outcome` `[S A, K]` and `start` `[S]` are cumulative probabilities, the others `[S A K]`.
    """

    outcome: Tensor
    next_state: Tensor
    reward: Tensor
    terminated: Tensor
    start: Tensor


def _levels(probability: Tensor) -> Tensor:
    """Cumulative distribution `[..., K]`; entries that reach the total are infinite, against rounding errors."""
    total = probability.cumsum(-1)
    return total.masked_fill(total >= total[..., -1:], math.inf)


def _category(noise: Tensor, levels: Tensor) -> Tensor:
    """Sample a category by inversion: uniform `[*B, 1]` and cumulative `[*B, K]` or `[K]` to `[*B]` int64."""
    return (noise >= levels).sum(-1)


@dataclass(frozen=True, eq=False)
class TabularMDP(Tabular):
    """Tabular MDP from arrays.

    Args:
        P: `[S, A, S]`, the probability of each next state.
        R: `[S, A]` or `[S, A, S]`, the reward.
        terminal: `[S]` bool, the states that end an episode when entered; None for none.
        start: `[S]`, the probabilities of the initial state; None for uniform over all states but terminal ones.

    Raises:
        SettingError: a shape is wrong, or probabilities are negative or do not sum to 1.
    """

    P: Tensor
    R: Tensor
    terminal: Tensor | None = None
    start: Tensor | None = None
    max_episode_steps: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(torch.as_tensor(self.P, device="cpu").shape)
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
            raise SettingError(f"P has shape {shape}: expected [states, actions, states]")
        for name, expected in (("R", (shape[:2], shape)), ("terminal", (shape[:1],)), ("start", (shape[:1],))):
            table = getattr(self, name)
            actual = None if table is None else tuple(torch.as_tensor(table, device="cpu").shape)
            if actual is not None and actual not in expected:
                raise SettingError(f"{name} has shape {actual}: expected {' or '.join(map(str, expected))}")
        for name, probability in (("P", self.tables.probability), ("start", self.tables.start)):
            if bool((probability < 0).any()) or not torch.allclose(
                probability.sum(-1), torch.ones((), dtype=torch.float64, device="cpu"), rtol=0, atol=1e-5
            ):
                raise SettingError(f"{name} has rows that are no probabilities: expected each >= 0 and a sum of 1")

    @cached_property
    def tables(self) -> Tables:
        """Transition tables, with an outcome per next state."""
        probability = torch.as_tensor(self.P, dtype=torch.float64, device="cpu")
        states = len(probability)
        reward = torch.as_tensor(self.R, dtype=torch.float64, device="cpu")
        reward = reward.unsqueeze(-1) if reward.dim() == 2 else reward
        terminal = torch.zeros(states, dtype=torch.bool, device="cpu")
        if self.terminal is not None:
            terminal = torch.as_tensor(self.terminal, dtype=torch.bool, device="cpu")
        start = (~terminal).double() / (~terminal).sum() if self.start is None else self.start
        return Tables(
            probability,
            torch.arange(states, device="cpu").expand_as(probability).contiguous(),
            reward.expand_as(probability).contiguous(),
            terminal.expand_as(probability).contiguous(),
            torch.as_tensor(start, dtype=torch.float64, device="cpu"),
        )


_LEFT, _DOWN, _RIGHT, _UP = (0, -1), (1, 0), (0, 1), (-1, 0)


def _grid(layout: Sequence[str], name: str) -> list[str]:
    rows = list(layout)
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise SettingError(f"{name}={layout!r}: expected rows of equal length")
    return rows


def _where_letter(layout: Sequence[str], letters: str) -> Tensor:
    """Find the cells with one of the letters, `[S]` bool."""
    return torch.tensor([letter in letters for row in layout for letter in row], device="cpu")


def _neighbours(height: int, width: int, moves: Sequence[tuple[int, int]], walls: Tensor | None = None) -> Tensor:
    """Cell reached by each move, `[S, A]`; the border and walls stop it."""
    cell = torch.arange(height * width, device="cpu")
    row, column = cell // width, cell % width
    reached = torch.stack(
        [(row + down).clamp(0, height - 1) * width + (column + right).clamp(0, width - 1) for down, right in moves], -1
    )
    return reached if walls is None else torch.where(walls[reached], cell.unsqueeze(-1), reached)


def _slipping(reached: Tensor) -> Tensor:
    """Outcomes of slippery moves, `[S, A]` to `[S, A, 3]`: previous, intended and next move in circular order."""
    return torch.stack((reached.roll(1, -1), reached, reached.roll(-1, -1)), -1)


def _slip_probability(outcomes: Tensor, ahead: float) -> Tensor:
    """Probabilities `[S, A, K]` of slippery moves: as intended with probability `ahead`, else to either side."""
    side = (1 - ahead) / 2
    probability = [side, ahead, side] if outcomes.shape[-1] == 3 else [1.0]
    return torch.tensor(probability, dtype=torch.float64, device="cpu").expand(outcomes.shape).contiguous()


@dataclass(frozen=True)
class FrozenLake(Tabular):
    """FrozenLake-v1 of gymnasium: cross a frozen lake to the goal; actions are left, down, right, up.

    Physics may also override `success_rate` if the ice is slippery.
    """

    desc: Sequence[str] | None = None
    """Rows of S (start), F (frozen), H (hole) and G (goal); None for the map `map_name`."""
    map_name: str = "4x4"
    is_slippery: bool = True
    success_rate: float = 1.0 / 3.0
    """Probability that a slippery step goes in the intended direction, else to either side."""
    reward_schedule: Sequence[float] = (1.0, 0.0, 0.0)
    """Rewards for reaching the goal, a hole, the ice."""
    max_episode_steps: int | None = 100

    def __post_init__(self) -> None:
        if self.desc is None and self.map_name not in MAPS:
            raise unknown_name("map", self.map_name, MAPS)
        if self.desc is not None and not _where_letter(_grid(self.desc, "desc"), "S").any():
            raise SettingError(f"desc={self.desc!r}: expected at least one S to start from")
        if not 0 <= self.success_rate <= 1:
            raise SettingError(f"success_rate={self.success_rate}: expected a probability")
        if len(self.reward_schedule) != 3:
            raise SettingError(
                f"reward_schedule={self.reward_schedule!r}: expected three numbers, for goal, hole and ice"
            )

    def constants(self) -> dict[str, Tensor]:
        """Constants that physics may override: the tables, and `success_rate`."""
        rate = torch.tensor(self.success_rate, dtype=torch.float64, device="cpu")
        return {**super().constants(), **({"success_rate": rate} if self.is_slippery else {})}

    @cached_property
    def tables(self) -> Tables:
        """Transition tables: three outcomes on slippery ice, else one; holes and the goal are absorbing."""
        layout = MAPS[self.map_name] if self.desc is None else self.desc
        moves = (_LEFT, _DOWN, _RIGHT, _UP)
        reached = _neighbours(len(layout), len(layout[0]), moves)
        outcomes = _slipping(reached) if self.is_slippery else reached.unsqueeze(-1)
        end, goal = _where_letter(layout, "GH"), _where_letter(layout, "G")
        ended = end[:, None, None].expand_as(outcomes)
        outcomes = torch.where(ended, torch.arange(len(end), device="cpu")[:, None, None], outcomes)
        at_goal, at_hole, at_ice = self.reward_schedule
        ice = torch.full(end.shape, at_ice, dtype=torch.float64, device="cpu")
        entering = ice.masked_fill(end, at_hole).masked_fill(goal, at_goal)
        start = _where_letter(layout, "S").double()
        return Tables(
            _slip_probability(outcomes, self.success_rate),
            outcomes,
            torch.where(ended, 0.0, entering[outcomes]),
            end[outcomes],
            start / start.sum(),
        )

    def drawing(self) -> Drawing:
        """Gymnasium's picture of the lake."""
        env, fps = twin("FrozenLake-v1", desc=list(MAPS[self.map_name] if self.desc is None else self.desc))

        def draw(state: State, physics: Physics) -> Picture:
            env.s = int(state["state"])
            return env.render()

        return Drawing(draw, fps)

    def _ahead_rate(self, physics: Physics) -> Tensor | None:
        return physics.get("success_rate")


@dataclass(frozen=True)
class CliffWalking(Tabular):
    """CliffWalking-v1 of gymnasium (Sutton and Barto, example 6.6).

    The reward is -1 per step, and -100 with a return to the start for a fall off the cliff.

    Actions are up, right, down, left; slippery steps go to either side with probability 1/3 each.
    """

    is_slippery: bool = False
    max_episode_steps: int | None = None

    @cached_property
    def tables(self) -> Tables:
        """Transition tables: three outcomes if slippery, else one."""
        reached = _neighbours(4, 12, (_UP, _RIGHT, _DOWN, _LEFT))
        outcomes = _slipping(reached) if self.is_slippery else reached.unsqueeze(-1)
        cliff = (outcomes > 36) & (outcomes < 47)
        start = torch.zeros(48, dtype=torch.float64, device="cpu")
        start[36] = 1
        return Tables(
            _slip_probability(outcomes, 1 / 3),
            outcomes.masked_fill(cliff, 36),
            torch.where(cliff, -100.0, -1.0).double(),
            outcomes == 47,
            start,
        )

    def drawing(self) -> Drawing:
        """Gymnasium's picture of the cliff."""
        env, fps = twin("CliffWalking-v1")

        def draw(state: State, physics: Physics) -> Picture:
            env.s = int(state["state"])
            return env.render()

        return Drawing(draw, fps)


@dataclass(frozen=True)
class GridWorld(Tabular):
    """Grid world with a layout of letters.

    The default is the 4x3 world of Russell and Norvig (Artificial Intelligence, section 17.1). Actions are up, right,
    down, left; the border and walls stop a move. Entering a goal or a trap ends the episode. Physics may also override
    `slip`.
    """

    layout: Sequence[str] = ("...G", ".#.H", "S...")
    """Rows of S (start), G (goal), H (trap), # (wall) and . (free); without an S, every free cell is a start."""
    slip: float = 0.2
    """Probability that a step goes to a side instead."""
    step_reward: float = -0.04
    """Reward of every step, including the last one."""
    goal_reward: float = 1.0
    trap_reward: float = -1.0
    max_episode_steps: int | None = 100

    def __post_init__(self) -> None:
        rows = _grid(self.layout, "layout")
        unknown = set("".join(rows)) - set("SGH#.")
        if unknown or not _where_letter(rows, "S.").any():
            raise SettingError(
                f"layout={self.layout!r}: expected the letters S (start), G (goal), H (trap), # (wall) and . (free), "
                "with a cell to start from"
            )
        if not 0 <= self.slip <= 1:
            raise SettingError(f"slip={self.slip}: expected a probability")

    def constants(self) -> dict[str, Tensor]:
        """Constants that physics may override: the tables, and `slip`."""
        return {**super().constants(), "slip": torch.tensor(self.slip, dtype=torch.float64, device="cpu")}

    @cached_property
    def tables(self) -> Tables:
        """Transition tables, with three outcomes."""
        goal, trap = _where_letter(self.layout, "G"), _where_letter(self.layout, "H")
        walls = _where_letter(self.layout, "#")
        reached = _neighbours(len(self.layout), len(self.layout[0]), (_UP, _RIGHT, _DOWN, _LEFT), walls)
        outcomes = _slipping(reached)
        entering = self.step_reward + self.goal_reward * goal.double() + self.trap_reward * trap.double()
        start = _where_letter(self.layout, "S" if any("S" in row for row in self.layout) else ".").double()
        return Tables(
            _slip_probability(outcomes, 1 - self.slip),
            outcomes,
            entering[outcomes],
            (goal | trap)[outcomes],
            start / start.sum(),
        )

    def drawing(self) -> Drawing:
        """Grid of walls, goals, traps and the agent."""
        rows = list(self.layout)

        def cells_of(letter: str) -> list[tuple[int, int]]:
            return [(i, j) for i, row in enumerate(rows) for j, here in enumerate(row) if here == letter]

        fixed = [(cells_of("#"), BLACK), (cells_of("G"), GREEN), (cells_of("H"), RED)]

        def draw(state: State, physics: Physics) -> Picture:
            agent = divmod(int(state["state"]), len(rows[0]))
            return cells((len(rows), len(rows[0])), [*fixed, ([agent], BLUE)])

        return Drawing(draw, 4)

    def _ahead_rate(self, physics: Physics) -> Tensor | None:
        return 1 - physics["slip"] if "slip" in physics else None
