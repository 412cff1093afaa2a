"""Gradients of single samples, and of groups of samples, from one batched backward pass.

The gradient of sample i at a linear layer y = x Wᵀ + b is the outer product δᵢ xᵢᵀ of the gradient at the layer's
output and its input (Goodfellow, "Efficient per-example gradient computations", 2015). So sums of squared gradients,
and the gradients of groups, are matrix products of what the layers leave in `Context.taps`; no gradient of a sample is
ever made. What is not a linear layer takes the general way: the samples become learner axes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.nn.block import Context
from rlmeta.nn.product import product

Params: TypeAlias = dict[str, Any]
"""`weights` `{name: [*L, ...]}` and whatever else a forward pass needs, every leaf starting with `*L`."""

Forward: TypeAlias = Callable[[Params, tree.Tree, Context], Tensor]
"""From parameters, a batch `[*L, B, ...]` and a context to one output for every sample, `[*L, B]` or `[*L, B, K]`; a
sample's output depends on that sample alone, so batch normalisation runs in evaluation mode."""

Roots: TypeAlias = Callable[[Tensor, tree.Tree], Iterator[Tensor]]
"""From outputs `[*L, B, K]` and their batch to cotangents `[*L, B, K]`, one after another."""

_LARGEST = 1 << 24
"""Entries of the largest temporary tensor of the ways that make the gradient of every sample."""


def squared_gradients(
    forward: Forward,
    p: Params,
    batch: tree.Tree,
    roots: Roots,
    learner_axes: int,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Σᵢ Σᵣ (Jᵢᵀ vᵢᵣ)² over samples i and roots r, with Jᵢ the Jacobian of sample i's outputs in the weights.

    Args:
        forward: gives outputs `[*L, B, K]`.
        p: parameters; not touched.
        batch: samples `[*L, n, ...]`.
        roots: gives v, one cotangent for every output and r.
        learner_axes: how many learner axes there are.
        names: the weights to compute it for, all where left out; 0 for the others.
        chunk: samples at a time; the result does not depend on it but for rounding.

    Returns:
        `[*L, P]` in the packed order of the weights.
    """
    weights = p["weights"]
    wanted = set(weights if names is None else names)
    constants = tree.map(torch.Tensor.detach, p)
    found = {name: torch.zeros_like(weight) for name, weight in constants["weights"].items()}
    samples = next(tree.leaves(batch)).shape[learner_axes]
    left = wanted
    for start in range(0, samples, chunk):
        part = _narrow(batch, learner_axes, start, min(chunk, samples - start))
        left = wanted - _add_tapped_squares(found, wanted, forward, constants, part, roots, learner_axes)
    if left:
        _add_general_squares(found, sorted(left), forward, constants, batch, roots, learner_axes)
    return torch.cat([value.flatten(learner_axes) for value in found.values()], -1)


def _narrow(batch: tree.Tree, axis: int, start: int, count: int) -> tree.Tree:
    return tree.map(lambda x: x.narrow(axis, start, count), batch)


def group_gradients(
    losses: Forward, p: Params, batch: tree.Tree, learner_axes: int, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The gradient of the mean loss of every group of samples.

    Args:
        losses: gives a loss `[*L, B]` for every sample.
        p: parameters; not touched.
        batch: K groups of M samples, `[*L, K, M, ...]`.
        learner_axes: how many learner axes there are.
        names: the weights to compute it for, all where left out.

    Returns:
        `{name: [*L, K, ...]}` of those weights.
    """
    wanted = list(p["weights"] if names is None else names)
    constants = tree.map(torch.Tensor.detach, p)
    found = _tapped_groups(set(wanted), losses, constants, batch, learner_axes)
    left = [name for name in wanted if name not in found]
    if left:
        found |= _general_groups(left, losses, constants, batch, learner_axes)
    return {name: found[name] for name in wanted}


# ---------------------------------------------------------------------- linear layers, by their taps


def _run(forward: Forward, p: Params, batch: tree.Tree) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """The outputs with their graph, and what the linear layers left."""
    taps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.enable_grad():
        out = forward(p, batch, Context(taps=taps))
    return out, taps


def _backward(out: Tensor, taps: dict[str, list[tuple[Tensor, Tensor]]], cotangent: Tensor, keep: bool) -> Any:
    """The gradients at the outputs of the layers, in the order of `taps`."""
    ends = [end for calls in taps.values() for _, end in calls]
    found = torch.autograd.grad(out, ends, cotangent, retain_graph=keep, allow_unused=True, materialize_grads=True)
    gradients = iter(found)
    return {place: [next(gradients) for _ in calls] for place, calls in taps.items()}


def _covered(taps: dict[str, Any], wanted: set[str]) -> dict[str, list[str]]:
    """The wanted weights of every tapped layer that has any."""
    names = {place: [n for n in (f"{place}weight", f"{place}bias") if n in wanted] for place in taps}
    return {place: found for place, found in names.items() if found}


def _add_tapped_squares(
    found: dict[str, Tensor],
    wanted: set[str],
    forward: Forward,
    p: Params,
    batch: tree.Tree,
    roots: Roots,
    axes: int,
) -> set[str]:
    """Add the squared gradients of the linear layers; returns the names of the weights this was done for."""
    out, taps = _run(forward, p, batch)
    covered = _covered(taps, wanted)
    taps = {place: taps[place] for place in covered}
    if not taps or not out.requires_grad:
        return set()
    sums: dict[str, Tensor] = {}
    for root in roots(out.detach(), batch):
        for place, gradients in _backward(out, taps, root, keep=True).items():
            if len(gradients) == 1 and gradients[0].dim() == axes + 2:
                square = sums.get(place)
                first = gradients[0]
                sums[place] = first.square() if square is None else square.addcmul_(first, first)
            else:
                _add_outer_squares(found, wanted, place, [x for x, _ in taps[place]], gradients, axes)
    for place, square in sums.items():  # the roots are summed before the product, which is made once
        if f"{place}weight" in wanted:
            found[f"{place}weight"] += product(square.mT, taps[place][0][0].square())
        if f"{place}bias" in wanted:
            found[f"{place}bias"] += square.sum(-2)
    return {name for names in covered.values() for name in names}


def _add_outer_squares(
    found: dict[str, Tensor],
    wanted: set[str],
    place: str,
    inputs: list[Tensor],
    gradients: list[Tensor],
    axes: int,
) -> None:
    """A layer that a sample passes several times: its gradient is a sum of products, which is squared as a whole."""
    x = torch.cat([x.flatten(axes + 1, -2) if x.dim() > axes + 2 else x.unsqueeze(-2) for x in inputs], -2)
    g = torch.cat([g.flatten(axes + 1, -2) if g.dim() > axes + 2 else g.unsqueeze(-2) for g in gradients], -2)
    size = max(1, _LARGEST // (x.shape[-1] * g.shape[-1] * x.shape[:axes].numel()))
    for some_x, some_g in zip(torch.split(x, size, axes), torch.split(g, size, axes)):
        if f"{place}weight" in wanted:
            found[f"{place}weight"] += (some_g.mT @ some_x).square().sum(axes)
        if f"{place}bias" in wanted:
            found[f"{place}bias"] += some_g.sum(-2).square().sum(axes)


def _tapped_groups(wanted: set[str], losses: Forward, p: Params, batch: tree.Tree, axes: int) -> dict[str, Tensor]:
    """The groups' gradients in the linear layers: one pass over all samples, a product a layer."""
    groups, samples = next(tree.leaves(batch)).shape[axes : axes + 2]
    out, taps = _run(losses, p, tree.map(lambda x: x.flatten(axes, axes + 1), batch))
    covered = _covered(taps, wanted)
    taps = {place: taps[place] for place in covered}
    if not taps or not out.requires_grad:
        return {}
    found: dict[str, Tensor] = {}
    for place, gradients in _backward(out, taps, torch.full_like(out, 1.0 / samples), keep=False).items():
        for (x, _), g in zip(taps[place], gradients):
            shape = (*g.shape[:axes], groups, -1)
            x, g = x.reshape(*shape, x.shape[-1]), g.reshape(*shape, g.shape[-1])
            _accumulate(found, f"{place}weight", product(g.mT, x))
            _accumulate(found, f"{place}bias", g.sum(-2))
    return {name: found[name] for names in covered.values() for name in names}


def _accumulate(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value


# ---------------------------------------------------------------------- anything else: samples as learners


def _repeat(p: Params, names: Sequence[str], axes: int, count: int) -> tuple[Params, list[Tensor]]:
    """Parameters with a further learner axis of this size, and the leaves of the named weights."""
    repeated = tree.map(lambda x: x.unsqueeze(axes).expand(*x.shape[:axes], count, *x.shape[axes:]), p)
    leaves = {name: repeated["weights"][name].detach().requires_grad_() for name in names}
    return {**repeated, "weights": {**repeated["weights"], **leaves}}, list(leaves.values())


def _add_general_squares(
    found: dict[str, Tensor],
    names: Sequence[str],
    forward: Forward,
    p: Params,
    batch: tree.Tree,
    roots: Roots,
    axes: int,
) -> None:
    samples = next(tree.leaves(batch)).shape[axes]
    chunk = max(1, _LARGEST // sum(math.prod(weight.shape) for weight in p["weights"].values()))
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        part = tree.map(lambda x: x.unsqueeze(axes + 1), _narrow(batch, axes, start, count))
        repeated, leaves = _repeat(p, names, axes, count)
        with torch.enable_grad():
            out = forward(repeated, part, Context())
        if not out.requires_grad:
            return
        for root in roots(out.detach(), part):
            gradients = torch.autograd.grad(
                out, leaves, root, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(names, gradients):
                found[name] += gradient.square().sum(axes)


def _general_groups(names: Sequence[str], losses: Forward, p: Params, batch: tree.Tree, axes: int) -> dict[str, Tensor]:
    groups, samples = next(tree.leaves(batch)).shape[axes : axes + 2]
    repeated, leaves = _repeat(p, names, axes, groups)
    with torch.enable_grad():
        out = losses(repeated, batch, Context())
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in zip(names, leaves)}
    cotangent = torch.full_like(out, 1.0 / samples)
    gradients = torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients))
