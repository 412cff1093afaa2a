"""Offline learning: gradient steps on minibatches of a fixed data set, which all learners share.

What TD3+BC, IQL, CQL and the Decision Transformer share. Their settings have `demonstrations, episodes, num_steps` and
`batch_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.engine.parts import in_parts
from rlmeta.functional import random, tree
from rlmeta.imitation.behaviour_cloning import count_steps, draw, load_demonstrations
from rlmeta.learning.groups import Group
from rlmeta.learning.learner import Metrics
from rlmeta.learning.phases import TRAINING, own_step, whose
from rlmeta.learning.settings import require_range
from rlmeta.learning.state import State
from rlmeta.learning.step import replay_steps
from rlmeta.learning.targets import Copy


def check_settings(settings: Any) -> None:
    """Check the settings that all offline algorithms have.

    Raises:
        SettingError: one is out of its range.
    """
    require_range(settings, "episodes", 0)
    for name in ("num_steps", "batch_size"):
        require_range(settings, name, 1)


def load_transitions(settings: Any, observation_space: gym.Space, action_space: gym.Space) -> tree.Tree:
    """Load the transitions `[M, ...]` to learn from; None if the demonstrations are left unread.

    Raises:
        DemonstrationError: there are none or too few episodes, the file is broken, or spaces differ.
    """
    loaded = load_demonstrations(settings.demonstrations, settings.episodes, observation_space, action_space)
    return None if loaded is None else loaded.transitions()


def minibatch(transitions: tree.Tree, keys: Tensor, count: int, gamma: Tensor) -> tree.Tree:
    """Draw random transitions for every learner, with replacement, as `losses` of off-policy agents take them.

    What follows a terminated step is worth nothing; what follows a truncated one is worth its value.

    Args:
        transitions: of `Demonstrations.transitions()`, `[M, ...]`.
        keys: `[*lead, *L]`, one for each minibatch.
        count: B.
        gamma: discount factor `[*L]`.

    Returns:
        `[*lead, *L, B, ...]`: the transitions, with `discount`, gamma (1 - terminated), and `valid`, which is true.
    """
    batch = draw(transitions, keys, 0, count)
    terminated, _ = batch.pop("terminated"), batch.pop("truncated")
    discount = gamma.unsqueeze(-1) * (~terminated).to(gamma.dtype)
    return {**batch, "discount": discount, "valid": torch.ones_like(terminated)}


def learn(
    learner: Any,
    state: State,
    minibatches: Callable[[Tensor], tree.Tree],
    cycle: Callable[[State], Sequence[Sequence[Group]]],
    copies: Mapping[Copy, Tensor],
) -> tuple[State, Metrics]:
    """Iteration: `num_steps` gradient steps on the data, with the learners split over all cores, without acting.

    In a phase of a lifelong method it is the method that learns, from one minibatch.

    Args:
        learner: gives the losses.
        state: consumed.
        minibatches: from keys `[num_steps, *L]` to minibatches `[num_steps, *L, B, ...]`.
        cycle: from a state to the groups that move in the first step, the second, ..., and again from the start.
        copies: which target networks move after each step, and how far, `[num_steps, *L]` each.

    Returns:
        The new state, and the means of the reports of the cycles' last steps, `{name: [*L]}`.
    """
    steps, axes = learner.settings.num_steps, state["key"].dim()
    first = state["count"]["gradient_steps"]
    keys = random.fold(state["key"], first + torch.arange(steps, device=first.device).reshape(-1, *(1,) * axes))
    batches = minibatches(keys)
    if whose(state["task"]) > TRAINING:
        own = own_step(learner, state, tree.map(lambda x: x[0], batches))
        if own is not None:
            return count_steps(own[0], steps), own[1]
    drawn: tree.Tree = {"keys": keys, "batches": batches, "rates": {copy.name: rate for copy, rate in copies.items()}}

    def all_steps(state: State, drawn: tree.Tree) -> tuple[State, dict[str, Tensor]]:
        rates = {copy: drawn["rates"][copy.name] for copy in copies}
        groups = cycle(state)
        return replay_steps(
            learner, state, drawn["batches"], drawn["keys"], groups, copies=rates, methods=learner.methods
        )

    def some(state: State, drawn: tree.Tree) -> tuple[State, dict[str, Tensor]]:
        return all_steps(state, tree.map(lambda x: x.movedim(axes, 0).contiguous(), drawn))

    if learner.capture is None or learner.methods or not axes:
        state, info = all_steps(state, drawn)
    else:
        state, info = in_parts(some, state, tree.map(lambda x: x.movedim(0, axes), drawn))
    return count_steps(state, steps), info
