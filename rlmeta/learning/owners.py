"""Owners: auxiliary trainable modules beside a learner's networks, such as a reward's, with an optimizer of their own.

An owner's weights are a packed vector of their own, with moments, key and counter of their own, in one place of the
learner's state (`rewards.rnd`, `values.rnd`). No clip, penalty, projection or mask of the learner's sees them, and they
draw no random number of its, so that an owner whose output is not used changes no bit of what the learner does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from rlmeta.functional import random, tree
from rlmeta.functional.optim import Optimizer
from rlmeta.functional.packed import Packed
from rlmeta.learning import step as gradient
from rlmeta.learning.average import Average
from rlmeta.learning.gradients import HasLosses
from rlmeta.learning.learner import initial_state
from rlmeta.learning.minibatch import Minibatches
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.state import State
from rlmeta.nn import Block


class Owner(HasLosses, Protocol):
    """Auxiliary trainable module beside a learner's networks: a reward's predictor, a discriminator, a generator.

    Where it has a `capture`, its gradient steps are recorded.
    """

    def networks(self) -> dict[str, Block]:
        """Build the networks by name, called once per learner; parameters with `requires_grad=False` are frozen."""
        ...


def init(owner: Owner, key: Tensor, optimizer: Optimizer) -> State:
    """Initial state of an owner: random weights for every learner, and the optimizer's moments.

    Args:
        owner: whose networks.
        key: `[*L]`, of the owner alone: folded with a name that no other consumer of the learner's key has.
        optimizer: what `train` is going to be given.

    Returns:
        `params`, `optimizer`, `key`, `count` and `active`; every leaf starts with `*L`.
    """
    whole = initial_state(owner.networks, key, {})
    kept: State = {name: whole[name] for name in ("params", "key", "active")}
    kept["count"] = {"gradient_steps": whole["count"]["gradient_steps"]}
    kept["optimizer"] = init_optimizer(optimizer, kept)
    return kept


def own_key(state: State, name: str) -> Tensor:
    """Random key `[*L]` of the owner `name`, derived from a learner's state."""
    return random.fold(state["key"], name)


def packed(memory: State) -> State:
    """Pack the weights of an owner's state into one vector, as in training; those from a file are not.

    The bits of a matrix product depend on where its factors begin.
    """
    params = memory["params"]
    return {**memory, "params": {**params, "weights": Packed.of(params["weights"], memory["key"].dim())}}


def train(
    owner: Owner,
    memory: State,
    batches: Iterable[tree.Tree],
    optimizer: Optimizer,
    active: Tensor,
) -> tuple[State, dict[str, Tensor]]:
    """Train an owner: a gradient step on every minibatch, for the active learners.

    Args:
        owner: gives the losses.
        memory: the owner's state; not written to.
        batches: minibatches `[*L, B, ...]`.
        optimizer: for all of its weights.
        active: `[*L]`, the learner's; the others stay bit-identical.

    Returns:
        The new state, in which `active` is False where a loss was not finite, and the mean of the reports `[*L]`.
    """
    average, memory = Average(), dict(memory)
    with torch.enable_grad():
        for batch in batches:
            memory, info = gradient.step(owner, memory, batch, optimizer, active=active)
            average.add(info)
    return memory, average.result()


def train_without_metrics(
    owner: Owner,
    memory: State,
    batches: Minibatches,
    constants: tree.Tree,
    optimizer: Optimizer,
    active: Tensor,
    max_grad_norm: Tensor | None = None,
) -> State:
    """Train an owner as `train` does, without metrics and as one recorded program; gradients may be clipped by norm."""
    with torch.enable_grad():
        trained, _ = gradient.steps(
            owner, dict(memory), batches, constants, optimizer, active=active, max_grad_norm=max_grad_norm
        )
    return trained


def deactivate_nonfinite(state: State, memory: State) -> None:
    """Deactivate the learners whose owner is not finite, since they cannot learn from its output."""
    state["active"] = state["active"] & memory["active"]
