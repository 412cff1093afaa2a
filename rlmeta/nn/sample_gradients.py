"""Gradients of single samples, and of groups of samples, from one batched backward pass.

The gradient of sample i at a linear layer y = x Wᵀ + b is the outer product δᵢ xᵢᵀ of the gradient at the layer's
output and its input (Goodfellow, "Efficient per-example gradient computations", 2015). So sums of squared gradients,
and the gradients of groups, are matrix products of what the layers leave in `Context.taps`; no gradient of a sample is
ever made. What is reached otherwise than by a linear layer of this package is differentiated sample by sample, by
`torch.func.vmap` where it can run the function and in a loop elsewhere, and group by group.

A function of samples may be anything that computes its outputs from the weights it is given; what would make the result
wrong without a word (outputs that depend on none of these weights, rows of the batch that depend on one another) is
looked for and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlmeta.errors import SettingError, require_count
from rlmeta.functional import random, tree
from rlmeta.nn.block import Context
from rlmeta.nn.product import product

Params: TypeAlias = dict[str, Any]
"""`weights` `{name: [*L, ...]}` and whatever else a forward pass needs, every leaf starting with `*L`."""

Forward: TypeAlias = Callable[[Params, tree.Tree, Context], Tensor]
"""From parameters, a batch `[*L, B, ...]` and a context to one output for every sample, `[*L, B]` or `[*L, B, K]`.

It computes them from the weights in the parameters. A sample's output depends on that sample alone, so batch
normalisation and dropout run in evaluation mode. Blocks that are given the context are fastest."""

Roots: TypeAlias = Callable[[Tensor, tree.Tree], Iterator[Tensor]]
"""From outputs `[*L, B, K]` and their batch to cotangents `[*L, B, K]`, one after another."""

_LARGEST = 1 << 24
"""Entries of the largest temporary tensor of the ways that make the gradient of every sample."""

_FEW = 16
"""Samples on which a function is tried."""


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
        forward: gives outputs `[*L, B, K]` or `[*L, B]`.
        p: parameters; not touched.
        batch: samples `[*L, n, ...]`.
        roots: gives v, one cotangent for every output and r.
        learner_axes: how many learner axes there are.
        names: the weights to compute it for, all where left out; 0 for the others.
        chunk: samples at a time; the result does not depend on it but for rounding.

    Returns:
        `[*L, P]` in the packed order of the weights.

    Raises:
        SettingError: the outputs have another shape, depend on none of the weights, or on other samples than their own,
            or `chunk` is no count.
    """
    axes, wanted = learner_axes, _wanted(p, names)
    require_count("fisher: chunk", chunk)
    with _differentiating():
        constants, batch = _constants(p), _constants(batch)
        found = {name: torch.zeros_like(weight) for name, weight in constants["weights"].items()}
        check_outputs(forward, constants, batch, axes)
        samples, few = _samples(constants, batch, axes), _few(batch, axes)
        reached = _reached(forward, constants, few, wanted)
        tapped = _tapped_names(forward, constants, few, reached, axes)
        for start in range(0, samples if tapped else 0, chunk):
            part = _narrow(batch, axes, start, min(chunk, samples - start))
            _add_tapped_squares(found, tapped, forward, constants, part, roots, axes)
        if reached - tapped:
            _add_single_squares(found, sorted(reached - tapped), forward, constants, batch, roots, axes, chunk)
        return torch.cat([value.reshape(*value.shape[:axes], -1) for value in found.values()], -1)


def group_gradients(
    losses: Forward, p: Params, batch: tree.Tree, learner_axes: int, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The gradient of the mean loss of every group of samples.

    No value is looked at, so that it can be recorded: `check_outputs` says whether samples depend on one another, and a
    function that moves the rows of its batch about between its layers must not give them the context.

    Args:
        losses: gives a loss `[*L, B]` for every sample.
        p: parameters; not touched.
        batch: K groups of M samples, `[*L, K, M, ...]`.
        learner_axes: how many learner axes there are.
        names: the weights to compute it for, all where left out.

    Returns:
        `{name: [*L, K, ...]}` of those weights.

    Raises:
        SettingError: the losses have another shape, or depend on none of the weights.
    """
    wanted = _wanted(p, names)
    with _differentiating():
        constants, batch = _constants(p), _constants(batch)
        found = _tapped_groups(wanted, losses, constants, batch, learner_axes)
        left = [name for name in constants["weights"] if name in wanted and name not in found]
        if left:
            found |= _single_groups(left, losses, constants, batch, learner_axes, bool(found))
        return {name: found[name] for name in p["weights"] if name in wanted}


def check_outputs(forward: Forward, p: Params, batch: tree.Tree, learner_axes: int) -> Tensor:
    """The outputs of up to 16 samples, after a check that each is its sample's own.

    The first and the last of them alone must have the outputs that they have among the others.

    Args:
        forward: gives outputs `[*L, B, K]` or `[*L, B]`.
        p: parameters.
        batch: samples `[*L, n, ...]`.
        learner_axes: how many learner axes there are.

    Returns:
        `[*L, B, K]` or `[*L, B]` of the first B.

    Raises:
        SettingError: the outputs have another shape, or depend on other samples or on random numbers.
    """
    axes = learner_axes
    _samples(p, batch, axes)
    batch = _few(batch, axes)
    rows = next(tree.leaves(batch)).shape[: axes + 1]
    with torch.no_grad():
        out = forward(p, batch, Context())
        _check_shape(out, rows)
        for row in {0, rows[axes] - 1} if rows[axes] > 1 else ():
            try:
                alone = forward(p, _narrow(batch, axes, row, 1), Context())
            except (RuntimeError, ValueError) as error:
                raise SettingError(f"a sample alone has no output, {error}: {_ALONE}") from error
            together = out.narrow(axes, row, 1)
            near = torch.finfo(out.dtype).eps ** 0.5
            scale = torch.nan_to_num(out.abs(), posinf=0.0).amax()
            if alone.shape != together.shape or not torch.allclose(
                alone, together, rtol=near, atol=float(near * scale), equal_nan=True
            ):
                raise SettingError(f"a sample's output is another one without the rest of its batch: {_ALONE}")
    return out


_ALONE = (
    "every sample's output has to be its own; batch normalisation with the batch's statistics, a recurrent layer that "
    "takes the batch for time, and dropout can't be used here (put the module in evaluation mode)"
)


# ---------------------------------------------------------------------- what is given


@contextmanager
def _differentiating() -> Iterator[None]:
    """Within, gradients are found whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _constants(given: tree.Tree) -> tree.Tree:
    """The same numbers, of which nothing is differentiated yet; those made in inference mode never could be."""
    return tree.map(lambda x: x.clone() if x.is_inference() else x.detach(), given)


def _wanted(p: Params, names: Sequence[str] | None) -> set[str]:
    wanted = set(p["weights"] if names is None else names)
    if not wanted <= set(p["weights"]):
        unknown = ", ".join(sorted(wanted - set(p["weights"])))
        raise SettingError(f"there is no weight {unknown}; there are {', '.join(p['weights'])}")
    return wanted


def _samples(p: Params, batch: tree.Tree, axes: int) -> int:
    """How many samples each learner has."""
    if not isinstance(p.get("weights"), dict):
        raise SettingError(f'the parameters have the keys {", ".join(p)}, expected {{"weights": {{name: [*L, ...]}}}}')
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.flatten(batch).items()}
    rows = next(iter(shapes.values()))[: axes + 1]
    if any(shape[: axes + 1] != rows for shape in shapes.values()) or len(rows) <= axes or not rows[axes]:
        raise SettingError(f"batch has shapes {shapes}, expected {axes} learner axes and one axis of samples in all")
    for name, weight in p["weights"].items():
        if tuple(weight.shape[:axes]) != rows[:axes]:
            raise SettingError(f"weight {name} has shape {tuple(weight.shape)}, expected learner axes {rows[:axes]}")
    return rows[axes]


def _narrow(batch: tree.Tree, axis: int, start: int, count: int) -> tree.Tree:
    return tree.map(lambda x: x.narrow(axis, start, count), batch)


def _few(batch: tree.Tree, axes: int) -> tree.Tree:
    """The first samples of a batch, on which a function is tried before it is believed."""
    return tree.map(lambda x: x.narrow(axes, 0, min(_FEW, x.shape[axes])), batch)


def _check_shape(out: Any, rows: Sequence[int]) -> None:
    """Refuse what is not one output, or one vector of them, for every sample."""
    given = f"a {type(out).__name__}" if not isinstance(out, Tensor) else f"{out.dtype} of shape {tuple(out.shape)}"
    fits = isinstance(out, Tensor) and out.is_floating_point() and len(rows) <= out.dim() <= len(rows) + 1
    if not fits or out.shape[: len(rows)] != torch.Size(rows):
        expected = ", ".join(map(str, rows))
        raise SettingError(f"the outputs are {given}, expected numbers [{expected}] or [{expected}, K]: not their mean")


def _with_leaves(p: Params, names: Iterable[str]) -> tuple[Params, dict[str, Tensor]]:
    """The parameters with leaves of a graph for the named weights."""
    leaves = {name: p["weights"][name].detach().requires_grad_() for name in sorted(names)}
    return _with(p, leaves), leaves


def _with(p: Params, weights: Mapping[str, Tensor]) -> Params:
    """The parameters with these instead of their own weights."""
    return {**p, "weights": {**p["weights"], **weights}}


_UNREACHED = (
    "the outputs depend on none of the weights they are to be differentiated in: compute them from p['weights'], not "
    "from a module's own, and without detach, item or torch.no_grad"
)


def _reached(forward: Forward, p: Params, batch: tree.Tree, wanted: set[str]) -> set[str]:
    """The wanted weights that the outputs depend on."""
    if not wanted:
        return set()
    given, leaves = _with_leaves(p, wanted)
    out = forward(given, batch, Context())
    if not out.requires_grad:
        raise SettingError(_UNREACHED)
    found = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    reached = {name for name, gradient in zip(leaves, found) if gradient is not None}
    if not reached:
        raise SettingError(_UNREACHED)
    return reached


# ---------------------------------------------------------------------- linear layers, by their taps

Taps: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]
"""What the layers left, `{place in weights: [(input, output), ...]}`."""


def _run(forward: Forward, p: Params, batch: tree.Tree, wanted: set[str]) -> tuple[Tensor, Taps, dict[str, Tensor]]:
    """The outputs with their graph, what the layers with wanted weights left, and these weights.

    Layers with taps take their weights for constants, so that a weight is in the graph only where something else uses
    it, too (a layer tied to another, a penalty).
    """
    taps: Taps = {}
    given, leaves = _with_leaves(p, wanted)
    out = forward(given, batch, Context(taps=taps))
    names = {place: [n for n in (f"{place}weight", f"{place}bias") if n in wanted] for place in taps}
    taps = {place: calls for place, calls in taps.items() if names[place]}
    return out, taps, {name: leaves[name] for place in taps for name in names[place]}


def _backward(
    out: Tensor, taps: Taps, leaves: Mapping[str, Tensor], cotangent: Tensor, keep: bool = False
) -> tuple[dict[str, list[Tensor]], set[str]]:
    """The gradients at the outputs of the layers, and the weights that something else uses, too."""
    ends = [end for calls in taps.values() for _, end in calls]
    found = torch.autograd.grad(out, [*ends, *leaves.values()], cotangent, retain_graph=keep, allow_unused=True)
    gradients = iter([torch.zeros_like(end) if g is None else g for g, end in zip(found, ends)])
    used = {name for name, gradient in zip(leaves, found[len(ends) :]) if gradient is not None}
    return {place: [next(gradients) for _ in calls] for place, calls in taps.items()}, used


def _tapped_names(forward: Forward, p: Params, batch: tree.Tree, wanted: set[str], axes: int) -> set[str]:
    """The wanted weights that are used by tapped layers only, in which a sample's rows are its own.

    With cotangents of some of the samples the gradients at the rows of the others are 0, unless the function has moved
    rows about, or folded further axes into them.
    """
    out, taps, leaves = _run(forward, p, batch, wanted)
    if not taps or not out.requires_grad:
        return set()
    samples = out.shape[axes]
    chosen = random.integers(random.make_keys([0], out.device)[0], "chosen", 0, (samples,), 2) == 0
    cotangent = torch.where(chosen.reshape(-1, *(1,) * (out.dim() - axes - 1)), torch.ones_like(out), 0.0)
    gradients, used = _backward(out, taps, leaves, cotangent)
    apart = {place: all(_is_apart(g, chosen, axes) for g in found) for place, found in gradients.items()}
    own = {f"{place}{kind}" for place in taps if apart[place] for kind in ("weight", "bias")}
    return set(leaves) & own - used


def _is_apart(gradient: Tensor, chosen: Tensor, axes: int) -> bool:
    """Whether a layer's rows are samples, and only the chosen ones have a gradient."""
    if gradient.dim() < axes + 2 or gradient.shape[axes] != len(chosen):
        return False
    return bool((gradient.index_select(axes, (~chosen).nonzero().flatten()) == 0).all())


def _add_tapped_squares(
    found: dict[str, Tensor],
    wanted: set[str],
    forward: Forward,
    p: Params,
    batch: tree.Tree,
    roots: Roots,
    axes: int,
) -> None:
    """Add the squared gradients of linear layers."""
    out, taps, _ = _run(forward, p, batch, wanted)
    sums: dict[str, Tensor] = {}
    for root in roots(out.detach(), batch):
        for place, gradients in _backward(out, taps, {}, root, keep=True)[0].items():
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
    rows = next(tree.leaves(batch)).shape[: axes + 2]
    groups, samples = rows[axes:]
    out, taps, leaves = _run(losses, p, tree.map(lambda x: x.flatten(axes, axes + 1), batch), wanted)
    _check_shape(out, (*rows[:axes], groups * samples))
    taps = {place: calls for place, calls in taps.items() if _are_rows(calls, axes, groups * samples)}
    if not taps or not out.requires_grad:
        return {}
    leaves = {name: leaf for name, leaf in leaves.items() if name.removesuffix("weight").removesuffix("bias") in taps}
    cotangent = torch.full_like(out, 1.0 / samples)
    found: dict[str, Tensor] = {}
    gradients, used = _backward(out, taps, leaves, cotangent)
    for place, ends in gradients.items():
        for (x, _), g in zip(taps[place], ends):
            shape = (*g.shape[:axes], groups, -1)
            x, g = x.reshape(*shape, x.shape[-1]), g.reshape(*shape, g.shape[-1])
            _accumulate(found, f"{place}weight", product(g.mT, x))
            _accumulate(found, f"{place}bias", g.sum(-2))
    return {name: found[name] for name in leaves if name not in used}


def _are_rows(calls: list[tuple[Tensor, Tensor]], axes: int, samples: int) -> bool:
    """Whether the rows of a layer are samples, in all its calls."""
    return all(end.dim() >= axes + 2 and end.shape[axes] == samples for _, end in calls)


def _accumulate(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    found[name] = found[name] + value if name in found else value


# ---------------------------------------------------------------------- anything else: samples, and groups, one by one


def _add_single_squares(
    found: dict[str, Tensor],
    names: Sequence[str],
    forward: Forward,
    p: Params,
    batch: tree.Tree,
    roots: Roots,
    axes: int,
    chunk: int,
) -> None:
    """Add the squared gradients of every sample alone."""
    weights = {name: p["weights"][name] for name in names}

    def squares(sample: tree.Tree, cotangents: Tensor) -> dict[str, Tensor]:
        """Σᵣ (Jᵀ vᵣ)² of a sample `[*L, ...]` and its cotangents `[R, *L, (K)]`."""
        alone = tree.map(lambda x: x.unsqueeze(axes), sample)
        _, pull, *_ = torch.func.vjp(lambda w: forward(_with(p, w), alone, Context()), weights)
        gradients = [pull(cotangent.unsqueeze(axes))[0] for cotangent in cotangents.unbind(0)]
        return {name: torch.stack([g[name].square() for g in gradients]).sum(0) for name in names}

    samples = next(tree.leaves(batch)).shape[axes]
    chunk = max(1, min(chunk, _LARGEST // sum(weight.numel() for weight in weights.values())))
    for start in range(0, samples, chunk):
        part = _narrow(batch, axes, start, min(chunk, samples - start))
        with torch.no_grad():
            cotangents = torch.stack(list(roots(forward(p, part, Context()), part)))
        for name, square in _each(squares, part, cotangents, axes).items():
            found[name] += square


Squares: TypeAlias = Callable[[tree.Tree, Tensor], dict[str, Tensor]]


def _each(squares: Squares, batch: tree.Tree, cotangents: Tensor, axes: int) -> dict[str, Tensor]:
    """The sum over samples, all at once where `torch.func.vmap` can run the function."""
    try:
        dims = tree.map(lambda _: axes, batch), axes + 1
        many = torch.func.vmap(squares, in_dims=dims)(batch, cotangents)
        return {name: square.sum(0) for name, square in many.items()}
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # an operation without a rule for it
        total: dict[str, Tensor] = {}
        for row in range(cotangents.shape[axes + 1]):
            sample = tree.map(lambda x: x.select(axes, row), batch)  # noqa: B023 - used at once
            for name, square in squares(sample, cotangents.select(axes + 1, row)).items():
                _accumulate(total, name, square)
        return total


def _single_groups(
    names: Sequence[str], losses: Forward, p: Params, batch: tree.Tree, axes: int, reached: bool
) -> dict[str, Tensor]:
    """The gradients of one group after the other; `reached` says that the losses depend on some other weight."""
    rows = next(tree.leaves(batch)).shape[: axes + 2]
    columns: list[list[Tensor]] = []
    for group in range(rows[axes]):
        given, leaves = _with_leaves(p, names)
        out = losses(given, tree.map(lambda x: x.select(axes, group), batch), Context())  # noqa: B023 - used at once
        _check_shape(out, (*rows[:axes], rows[axes + 1]))
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            cotangent = torch.full_like(out, 1.0 / rows[axes + 1])
            found = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        reached = reached or any(gradient is not None for gradient in found)
        columns.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values())])
    if not reached:
        raise SettingError(_UNREACHED)
    return {name: torch.stack(column, axes) for name, column in zip(leaves, zip(*columns))}
