"""Named owners: parameters that are trained beside a learner's own, such as a reward's, by the same gradient step.

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
    """What has trainable parameters of its own beside a learner's: a reward's predictor, a discriminator, a generator.

    Where it has a `capture`, its gradient steps are recorded.
    """

    def networks(self) -> dict[str, Block]:
        """The blocks by name, called once for each learner; what has `requires_grad=False` stays as it is."""
        ...


def init(owner: Owner, key: Tensor, optimizer: Optimizer) -> State:
    """The owner's state at the start: fresh weights for every learner, and moments.

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
    """The random key `[*L]` of an owner of this name in a learner's state."""
    return random.fold(state["key"], name)


def packed(memory: State) -> State:
    """An owner's state whose weights are packed, as they are while it trains and not when it comes from a file: the
    bits of a matrix product depend on where its factors begin."""
    params = memory["params"]
    return {**memory, "params": {**params, "weights": Packed.of(params["weights"], memory["key"].dim())}}


def train(
    owner: Owner,
    memory: State,
    batches: Iterable[tree.Tree],
    optimizer: Optimizer,
    active: Tensor,
) -> tuple[State, dict[str, Tensor]]:
    """A gradient step on every minibatch, for the learners that are active.

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


def train_quietly(
    owner: Owner,
    memory: State,
    batches: Minibatches,
    constants: tree.Tree,
    optimizer: Optimizer,
    active: Tensor,
    max_grad_norm: Tensor | None = None,
) -> State:
    """`train` without reports, recorded as one program; each learner's gradient clipped to a norm, if one is given."""
    with torch.enable_grad():
        trained, _ = gradient.steps(
            owner, dict(memory), batches, constants, optimizer, active=active, max_grad_norm=max_grad_norm
        )
    return trained


def stop(state: State, memory: State) -> None:
    """Stop the learners of a state whose owner is not finite: its output is nothing to learn from."""
    state["active"] = state["active"] & memory["active"]
