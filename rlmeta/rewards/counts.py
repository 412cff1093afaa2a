"""Episodic count bonus, for exploration of rare states in an episode (Strehl and Littman, 2008; Henaff, 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.collect import Rollout
from rlmeta.learning.field_types import check_types
from rlmeta.learning.settings import require_range
from rlmeta.learning.state import State
from rlmeta.rewards.reward import Memory, Rewards, called, check_name

Cell = Callable[[tree.Tree], Tensor]
"""Function from observations `[*L, ...]` to the whole numbers `[*L, ...]` of their cells, which are counted."""


@dataclass(frozen=True)
class EpisodicCounts:
    """Episodic count bonus coefficient / sqrt(n), where n counts visits of the next state in the running episode."""

    coefficient: float = 0.1
    """Weight of the bonus."""
    resolution: float = 0.1
    """Width of a cell: numbers are rounded to multiples of it; discrete observations stay as they are."""
    buckets: int = 1024
    """Size of each environment's table of counts; cells that share a bucket are counted as one."""
    cell: Cell | None = None
    """Your own function from observations to cells, instead of rounding."""
    name: str = "counts"
    """Name of the reward stream and of the memory in the state."""

    def __post_init__(self) -> None:
        check_types(self)
        check_name(self.name)
        require_range(self, "coefficient", 0.0)
        require_range(self, "resolution", 0.0, above=True)
        require_range(self, "buckets", 1)

    def init(self, agent: Any, state: State, world: World) -> Memory:
        """Initial memory: empty tables of counts `[*L, N, buckets]`.

        Raises:
            SettingError: `cell` does not give an integer for each observation.
        """
        rows = (*world.learner_shape, world.num_envs)
        device = self.bucket(world.observation(state["world"]), rows).device
        return {
            "counts": torch.zeros(*rows, self.buckets, dtype=torch.int32, device=device),
            "begins": torch.ones(rows, dtype=torch.bool, device=device),
            "return": torch.zeros(rows, dtype=torch.float64, device=device),
            "last_return": torch.zeros(rows, dtype=torch.float64, device=device),
        }

    def relabel(
        self, agent: Any, state: State, memory: Memory, rollout: Rollout, rewards: Rewards
    ) -> tuple[Memory, Rewards, dict[str, Tensor]]:
        """Add the stream of count bonuses; `rewards/NAME_return` is the mean over rows of the last whole episode's."""
        shape, dtype = tuple(rollout["reward"].shape), rollout["reward"].dtype
        left, reached = (self.bucket(rollout[name], shape) for name in ("observation", "next_observation"))
        counts, begins = memory["counts"].clone(), memory["begins"]
        running, last = memory["return"], memory["last_return"]
        over = rollout["terminated"] | rollout["truncated"]
        bonuses = []
        for here, there, end, valid in zip(*(x.unbind(-2) for x in (left, reached, over, rollout["valid"]))):
            begins = _count_first(counts, here, begins, valid)
            counts.scatter_add_(-1, there.unsqueeze(-1), valid.unsqueeze(-1).to(counts.dtype))
            met = counts.gather(-1, there.unsqueeze(-1)).squeeze(-1).clamp(min=1)
            bonus = (self.coefficient * met.to(dtype).rsqrt()).masked_fill(~valid, 0.0)
            bonuses.append(bonus)
            ended = end & valid
            running = running + bonus
            last, running = torch.where(ended, running, last), running.masked_fill(ended, 0.0)
            begins = begins | ended
        kept = {"counts": counts, "begins": begins, "return": running, "last_return": last}
        stream = {self.name: torch.stack(bonuses, -2)}
        return kept, {**rewards, **stream}, {f"rewards/{self.name}_return": last.mean(-1)}

    def bucket(self, observation: tree.Tree, shape: tuple[int, ...]) -> Tensor:
        """Bucket of an observation in the table of counts, `[*L, ...]` int64 of the given shape."""
        if self.cell is None:
            return _rounded(observation, shape, self.resolution) % self.buckets
        cells = called(self.cell, "cell=", observation)
        if not isinstance(cells, Tensor) or tuple(cells.shape) != shape or cells.is_floating_point():
            actual = f"{cells.dtype} {tuple(cells.shape)}" if isinstance(cells, Tensor) else type(cells).__name__
            raise SettingError(f"cell= gave {actual} for observations {shape}, expected one whole number for each")
        return cells.to(torch.int64) % self.buckets


def _count_first(counts: Tensor, observation: Tensor, begins: Tensor, valid: Tensor) -> Tensor:
    """Clear and start the counts of rows whose episode begins, in place; returns rows without a valid step so far."""
    starts = begins & valid
    if bool(starts.any()):
        counts.masked_fill_(starts.unsqueeze(-1), 0)
        counts.scatter_add_(-1, observation.unsqueeze(-1), starts.unsqueeze(-1).to(counts.dtype))
    return begins & ~valid


def _rounded(observation: tree.Tree, shape: tuple[int, ...], resolution: float) -> Tensor:
    """Cell of each observation, a whole number: itself if discrete, else a hash of its rounded entries."""
    leaves = [leaf for _, leaf in sorted(tree.flatten(observation).items())]
    if len(leaves) == 1 and tuple(leaves[0].shape) == shape and not leaves[0].is_floating_point():
        return leaves[0]
    entries = [
        (leaf / resolution).round().to(torch.int64) if leaf.is_floating_point() else leaf.to(torch.int64)
        for leaf in leaves
    ]
    flat = torch.cat([entry.reshape(*shape, -1) for entry in entries], -1)
    return random.fold(torch.arange(flat.shape[-1], device=flat.device), flat).sum(-1)
