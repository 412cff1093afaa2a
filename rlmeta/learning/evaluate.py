"""Evaluation apart from training: fresh environments, frozen parameters, a fixed number of episodes in every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.engine.parts import FEW_ROWS, one_core
from rlmeta.envs.world import World
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.collect import Actor, clear_memory
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params

MAX_STEPS = 1_000_000


class Evaluation(NamedTuple):
    """Episodes of every learner; of one that is no agent, what it is tried on instead: test samples, or tasks."""

    returns: Tensor
    """Undiscounted, of the environment's own reward, or what else the learner's score is, `[*L, E]` float64."""
    lengths: Tensor
    """In steps or samples, `[*L, E]` int64."""


@torch.no_grad()
def evaluate(
    agent: Actor, p: Params, world: World, key: Tensor, episodes: int, *, deterministic: bool = True
) -> Evaluation:
    """Play `episodes` episodes with every learner, the same number in each of the world's rows.

    A fixed number a row is what keeps short episodes from being counted more often than long ones.

    Args:
        agent: acts.
        p: the parameters as forward passes see them.
        world: environments `[*L, N]`; N must divide `episodes`.
        key: `[*L]`.
        episodes: E.
        deterministic: the policy's mode, or a sample.

    Raises:
        SettingError: N does not divide E, or an episode has no end.
    """
    require(episodes >= 1, f"episodes is {episodes}, expected at least 1")
    if episodes % world.num_envs:
        raise SettingError(f"{episodes} evaluation episodes don't divide over {world.num_envs} environments")
    rounds, rows = episodes // world.num_envs, (*key.shape, world.num_envs)
    state = world.reset(key)
    memory = agent.initial_memory(p, rows)
    running = torch.zeros(rows, dtype=torch.float64, device=key.device)
    length = torch.zeros(rows, dtype=torch.int64, device=key.device)
    finished = torch.zeros(rows, dtype=torch.int64, device=key.device)
    returns = torch.zeros(*rows, rounds, dtype=torch.float64, device=key.device)
    lengths = torch.zeros(*rows, rounds, dtype=torch.int64, device=key.device)
    for t in range(MAX_STEPS):
        step_key = random.fold(key, t // agent.noise_hold)
        with one_core(length.numel() <= FEW_ROWS):
            action, memory = agent.act(p, world.observation(state), memory, step_key, deterministic)
            state, transition = world.step(state, action)
        memory = clear_memory(memory, transition.memory_reset)
        running = running + transition.reward * transition.valid
        length = length + transition.valid
        ended = (transition.terminated | transition.truncated) & transition.valid
        if bool(ended.any()):
            counted = ended & (finished < rounds)
            slot = finished.clamp(max=rounds - 1).unsqueeze(-1)
            write = counted.unsqueeze(-1) & (torch.arange(rounds, device=key.device) == slot)
            returns = torch.where(write, running.unsqueeze(-1), returns)
            lengths = torch.where(write, length.unsqueeze(-1), lengths)
            finished = finished + counted
            running, length = running.masked_fill(ended, 0.0), length.masked_fill(ended, 0)
            if bool((finished >= rounds).all()):
                return Evaluation(returns.flatten(-2), lengths.flatten(-2))
    raise SettingError(f"an evaluation episode did not end within {MAX_STEPS} steps: give the task a time limit")


def evaluation_rows(episodes: int, native: bool) -> int:
    """Rows to play `episodes` episodes in: all at once where rows cost nothing, else the largest divisor up to 16."""
    require(episodes >= 1, f"episodes is {episodes}, expected at least 1")
    return episodes if native else max(n for n in range(1, 17) if episodes % n == 0)
