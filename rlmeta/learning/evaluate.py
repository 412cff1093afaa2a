"""Evaluation apart from training: fresh environments, frozen parameters, a fixed number of episodes in every row."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.engine.parts import FEW_ROWS, one_core
from rlmeta.envs.world import EVALUATION_LIMIT, Transition, TrialTransition, World, ended_of
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.collect import Actor, remember
from rlmeta.learning.settings import require
from rlmeta.learning.state import Params


class Evaluation(NamedTuple):
    """Evaluation result: returns and lengths of every learner's episodes, or scores on test samples or tasks."""

    returns: Tensor
    """Undiscounted returns of the environment's own reward, or other scores of the learner, `[*L, E]` float64."""
    lengths: Tensor
    """Lengths in steps or samples, `[*L, E]` int64."""

    def of_trials(self, episodes: int) -> Tensor:
        """Reshape returns to trials of several episodes, `[*L, trials, episodes]`."""
        return self.returns.reshape(*self.returns.shape[:-1], -1, episodes)


@torch.no_grad()
def evaluate(
    agent: Actor, p: Params, world: World, key: Tensor, episodes: int, *, deterministic: bool = True
) -> Evaluation:
    """Evaluate every learner on `episodes` episodes, the same number in each row of the world.

    Of trials it plays so many trials, and every episode of theirs is scored: one trial's are next to each other.

    A fixed number a row is what keeps short episodes from being counted more often than long ones. An episode that does
    not end within `EVALUATION_LIMIT` steps, or the longer limit that its environment declares, is cut there: its return
    counts up to the cut, and a warning says in which rows.

    Args:
        agent: acts.
        p: the effective parameters (`learning.method.effective_params`).
        world: environments `[*L, N]`; N must divide `episodes`.
        key: `[*L]`.
        episodes: E.
        deterministic: the policy's mode, or a sample.

    Raises:
        SettingError: N does not divide E.
    """
    require(episodes >= 1, f"episodes is {episodes}, expected at least 1")
    if episodes % world.num_envs:
        raise SettingError(f"{episodes} evaluation episodes don't divide over {world.num_envs} environments")
    rows = (*key.shape, world.num_envs)
    rounds = episodes // world.num_envs * world.trial_episodes
    score = _Score(rows, rounds, max(EVALUATION_LIMIT, world.max_episode_steps or 0), key.device)
    begun = 0
    while not score.complete():  # once, but where an episode was cut
        state = world.reset(key if begun == 0 else random.fold(random.fold(key, "after a cut"), begun))
        memory, observation = (initial := agent.initial_memory(p, rows)), world.observation(state)
        score.begin()
        while not score.idle():
            step_key = random.fold(key, score.steps // agent.noise_hold)
            with one_core(score.finished.numel() <= FEW_ROWS):
                action, memory = agent.act(p, observation, memory, step_key, deterministic)
                state, transition = world.step(state, action)
            observation = transition.observation
            memory = remember(memory, initial, transition)
            score.add(transition)
        begun += 1
    score.warn_of_cuts(world.name)
    return Evaluation(score.returns.flatten(-2), score.lengths.flatten(-2))


class _Score:
    """Returns and lengths of the episodes so far, `[*rows, rounds]`.

    A row whose episode was cut can't begin another by itself: it waits until all rows are done or wait, too.
    """

    def __init__(self, rows: tuple[int, ...], rounds: int, limit: int, device: torch.device) -> None:
        self.limit, self.steps = limit, 0
        self.finished = torch.zeros(rows, dtype=torch.int64, device=device)
        self.returns = torch.zeros(*rows, rounds, dtype=torch.float64, device=device)
        self.lengths = torch.zeros(*rows, rounds, dtype=torch.int64, device=device)
        self._cuts, self._slots = torch.zeros_like(self.finished), torch.arange(rounds, device=device)
        self._idle = False

    def complete(self) -> bool:
        """Whether every row has played its episodes."""
        return bool((self.finished >= len(self._slots)).all())

    def idle(self) -> bool:
        """Whether no row is within an episode."""
        return self._idle

    def begin(self) -> None:
        """Mark every row as being at the start of an episode."""
        self._running = torch.zeros_like(self.finished, dtype=torch.float64)
        self._length = torch.zeros_like(self.finished)
        self._waits = torch.zeros_like(self.finished, dtype=torch.bool)
        self._since, self._idle = 0, False

    def add(self, transition: Transition | TrialTransition) -> None:
        """Add the rewards of a step of every row."""
        self.steps, self._since = self.steps + 1, self._since + 1
        self._running = self._running + transition.reward * transition.valid
        self._length = self._length + transition.valid
        ended = ended_of(transition)
        if self._since >= self.limit:  # no episode can be longer before
            cut = (self._length >= self.limit) & ~ended & ~self._waits & (self.finished < len(self._slots))
            self._count(ended & ~self._waits, cut)
        elif bool(ended.any()):
            self._count(ended, torch.zeros_like(ended))

    def _count(self, ended: Tensor, cut: Tensor) -> None:
        counted = (ended | cut) & (self.finished < len(self._slots))
        slot = self.finished.clamp(max=len(self._slots) - 1).unsqueeze(-1)
        write = counted.unsqueeze(-1) & (self._slots == slot)
        self.returns = torch.where(write, self._running.unsqueeze(-1), self.returns)
        self.lengths = torch.where(write, self._length.unsqueeze(-1), self.lengths)
        self.finished, self._cuts, self._waits = self.finished + counted, self._cuts + cut, self._waits | cut
        done = ended | cut
        self._running, self._length = self._running.masked_fill(done, 0.0), self._length.masked_fill(done, 0)
        self._idle = bool((self._waits | (self.finished >= len(self._slots))).all())

    def warn_of_cuts(self, name: str) -> None:
        """Warn of truncated episodes: how many, and in which rows."""
        if not bool(self._cuts.any()):
            return
        rows = self._cuts.flatten().nonzero().flatten().tolist()
        some = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        warnings.warn(
            f"{name}: {int(self._cuts.sum())} of {self.returns.numel()} evaluation episodes did not end within "
            f"{self.limit} steps and were cut there, in {'row' if len(rows) == 1 else 'rows'} {some}; their returns "
            "count up to the cut: give the task max_episode_steps=",
            RuntimeWarning,
            stacklevel=2,
        )


def evaluation_rows(episodes: int, native: bool) -> int:
    """Number of parallel rows for `episodes` episodes: all if rows are cheap, else the largest divisor up to 16."""
    require(episodes >= 1, f"episodes is {episodes}, expected at least 1")
    return episodes if native else max(n for n in range(1, 17) if episodes % n == 0)
