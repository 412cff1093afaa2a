"""Prioritised replay: transitions are drawn in proportion to how wrong the learner was about them.

P(i) = p_i / Σ p with p = (error + ε)^α, and the loss of a drawn transition is weighted by (min_j P(j) / P(i))^β, the
minimum over its minibatch; β rises to 1 with the progress of the run. A new transition has the largest priority so far.
Every gradient step sets the priorities of its minibatch, and the next draws by them.

Priorities are part of the replay memory (`replay.PRIORITY`), and stored to the power of α.

Source: Schaul et al., "Prioritized Experience Replay", 2016.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.functional import random, sum_tree, tree
from rlmeta.functional.axes import align
from rlmeta.learning import replay
from rlmeta.learning.replay import LARGEST, PRIORITY
from rlmeta.learning.state import State

EPSILON = 1e-6
"""Added to every error, so that no transition has priority 0."""


def moving(memory: State, n_steps: int) -> State:
    """The part of a memory that gradient steps change: a sum tree of the priorities, and the largest.

    The newest n - 1 transitions of every environment, whose returns are not complete, have no weight in the tree.
    """
    axes = memory[LARGEST].dim()
    open_ = memory[PRIORITY].scatter(axes, _newest(memory, n_steps), 0.0)
    return {"levels": sum_tree.build(open_.flatten(axes)), LARGEST: memory[LARGEST]}


def fixed(memory: State, gamma: Tensor, alpha: Tensor, beta: Tensor) -> State:
    """What gradient steps need of a memory and do not change, for `Prioritised`.

    Args:
        memory: prioritised, of `replay.init` and `replay.insert`.
        gamma: discount factor, `[*L]`.
        alpha: exponent of errors in priorities, `[*L]`.
        beta: exponent of importance weights, `[*L]`.
    """
    kept = {name: part for name, part in memory.items() if name not in (PRIORITY, LARGEST)}
    return {"memory": kept, "gamma": gamma, "alpha": alpha, "beta": beta}


def with_moved(memory: State, moved: State, n_steps: int) -> State:
    """The memory with the priorities that gradient steps left."""
    old, axes = memory[PRIORITY], memory[LARGEST].dim()
    count = old.shape[axes:].numel()
    new = sum_tree.weights_of(moved["levels"], count).to(old.dtype).reshape(old.shape)
    newest = _newest(memory, n_steps)
    return {**memory, PRIORITY: new.scatter(axes, newest, old.gather(axes, newest)), LARGEST: moved[LARGEST]}


def _newest(memory: State, n_steps: int) -> Tensor:
    """Rows of the newest n - 1 transitions of every environment, `[*L, n - 1, N]`."""
    written = memory["written"]
    ages = torch.arange(1, n_steps, device=written.device).unsqueeze(-1)
    return (written.unsqueeze(-2) - ages) % memory["reward"].shape[written.dim() - 1]


class Prioritised(NamedTuple):
    """Source of the minibatches of gradient steps, which changes with each of them."""

    batch_size: int
    """Transitions in a minibatch."""
    n_steps: int
    """Rewards that are added up before a target network's value takes over."""

    def draw(self, now: tree.Tree, fixed: tree.Tree, key: Tensor) -> tree.Tree:
        """Draw a minibatch, one transition from each of B equal parts of the sum of all priorities.

        Args:
            now: of `moving`, after the steps so far.
            fixed: of `fixed`.
            key: `[*L]`.

        Returns:
            As `replay.sample` gives it, with the importance weights `weight` and the rows `place`, `[*L, B]` each.
        """
        memory, number = fixed["memory"], self.batch_size
        places = torch.arange(number, dtype=torch.float64, device=key.device)
        share = (random.uniform(key, "replay", 0, (number,), torch.float64) + places) / number
        place, priority = sum_tree.find(now["levels"], share)
        environments = memory["reward"].shape[-1]
        t, env = place.div(environments, rounding_mode="floor"), place % environments
        batch = replay.transitions(memory, t, env, fixed["gamma"], self.n_steps)
        drawn = batch["valid"] & (priority > 0)
        least = torch.where(drawn, priority, torch.inf).amin(-1, keepdim=True)
        ratio = torch.where(drawn, least / priority, 0.0).to(torch.float32)
        return {**batch, "valid": drawn, "weight": ratio ** align(fixed["beta"], ratio), "place": place}

    def update(self, now: tree.Tree, fixed: tree.Tree, batch: tree.Tree, errors: Tensor) -> tree.Tree:
        """Set the priorities of a minibatch to (error + ε)^α.

        Args:
            now: of `moving`.
            fixed: of `fixed`.
            batch: of `draw`.
            errors: `[*L, B]`, 0 or more.
        """
        new = (errors + EPSILON) ** align(fixed["alpha"], errors)
        new = torch.where(batch["valid"], new, torch.zeros_like(new))
        return {
            "levels": sum_tree.replace(now["levels"], batch["place"], new),
            LARGEST: torch.maximum(now[LARGEST], new.amax(-1)),
        }
