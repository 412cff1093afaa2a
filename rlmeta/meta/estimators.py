"""Meta-gradient estimators: truncated backpropagation, evolution strategies (ES) and persistent ones (PES).

An unroll is a function of the meta-parameters and of what is carried from piece to piece (weights, the optimizer's
state, a counter). Three ways to the gradient of the mean loss over its steps:

- *unrolled*: backpropagation through every step (`backpropagated` on the whole; MAML does it in `losses`);
- *truncated*: the same on a piece, whose start counts as a constant: short memory, biased;
- *evolved*: ES on a piece (as biased as truncation) or PES, which is unbiased, from evaluations alone.

The same functions serve what is learned: initial weights, rates, an optimizer, an augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.functional.evolution import antithetic_noise, evolution_gradient
from rlmeta.functional.packed import Packed
from rlmeta.meta.adapt import expand_tasks

Unroll: TypeAlias = Callable[[dict[str, Tensor], tree.Tree], tuple[Tensor, tree.Tree]]
"""From meta-parameters `{name: [*L, ...]}` (or `[*L, K, ...]`, one each) and what is carried `[*L, K, ...]` to the loss
of each of K problems `[*L, K]` and what is carried on."""


def backpropagated(unroll: Unroll, theta: dict[str, Tensor], carry: tree.Tree) -> tuple[Tensor, tree.Tree]:
    """Truncated backpropagation: the mean loss over problems `[*L]` to differentiate, and the detached carry.

    On the whole of an unroll its gradient is exact; on a piece it is truncated backpropagation.
    """
    loss, carry = unroll(theta, tree.map(torch.Tensor.detach, carry))
    return loss.mean(-1), tree.map(torch.Tensor.detach, carry)


class Evolved(NamedTuple):
    """Result of an evolution strategy: the gradient estimate, and the carry of the next truncation."""

    gradient: Tensor
    """Gradient of the packed meta-parameters, `[*L, P]`."""
    loss: Tensor
    """Mean loss over the perturbed unrolls, `[*L]`."""
    carry: tree.Tree
    """Carry of the unrolls, `[*L, K, ...]`."""
    accumulator: Tensor
    """Sums of the perturbations since each unroll began, `[*L, K, P]`."""


@torch.no_grad()
def evolved(
    unroll: Unroll,
    theta: dict[str, Tensor],
    carry: tree.Tree,
    key: Tensor,
    counter: int | Tensor,
    sigma: float | Tensor,
    accumulator: Tensor | None,
) -> Evolved:
    """ES or PES on one piece of an unroll, with antithetic perturbations: problem k + K/2 is perturbed against k.

    The two of a pair should carry the same problem and the same random key, so that all but the sign cancels.

    Args:
        unroll: see `Unroll`; called once, with meta-parameters `[*L, K, ...]`, one perturbation for each problem.
        theta: `{name: [*L, ...]}`.
        carry: `[*L, K, ...]`.
        key: `[*L]`.
        counter: a number or `[*L]`: how many pieces there were before.
        sigma: standard deviation of the perturbations, a number or `[*L]`.
        accumulator: `[*L, K, P]`, 0 where an unroll begins: PES. None: ES, each piece for itself.
    """
    axes, packed = key.dim(), Packed.of(theta, key.dim())
    count = next(tree.leaves(carry)).shape[axes]
    noise = antithetic_noise(key, counter, count, packed.flat.shape[-1], sigma, packed.flat.dtype)
    loss, carry = unroll(_perturbed(packed, theta, noise, axes), carry)
    total = noise if accumulator is None else accumulator + noise
    return Evolved(evolution_gradient(loss, total, sigma), loss.mean(-1), carry, total)


def _perturbed(packed: Packed, theta: dict[str, Tensor], noise: Tensor, axes: int) -> dict[str, Tensor]:
    """Add noise to the meta-parameters, `{name: [*L, K, ...]}`."""
    like = expand_tasks(theta, axes, noise.shape[-2])
    return Packed.view(packed.flat.unsqueeze(-2) + noise, like, axes + 1)
