"""Per-sample gradients, their squares or absolute values summed, and gradients of groups, from one backward pass.

The gradient of sample i at a linear layer y = x Wᵀ + b is the outer product δᵢ xᵢᵀ of the gradient at the layer's
output and its input (Goodfellow, "Efficient per-example gradient computations", 2015), and so its square is that of
their squares, its absolute value that of theirs. Sums of these, and gradients of groups, are therefore matrix products
of what the layers record in `Context.taps`, and no per-sample gradient is ever formed. Weights that are not used by a
linear layer of this package are differentiated sample by sample, by `torch.func.vmap` or in a loop if that cannot run
the function, and group by group.

The function may be any that computes its outputs from the weights in its arguments. Functions for which the result
would be silently wrong (outputs that depend on none of these weights, rows of the batch that depend on each other) are
detected and refused.
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

ParamTree: TypeAlias = dict[str, Any]
"""`weights` `{name: [*L, ...]}` and other inputs of a forward pass, every leaf starting with `*L`."""

Forward: TypeAlias = Callable[[ParamTree, tree.Tree, Context], Tensor]
"""Function from parameters, a batch `[*L, B, ...]` and a context to an output per sample, `[*L, B]` or `[*L, B, K]`.

It computes the outputs from the weights in the parameters. A sample's output depends on that sample alone, so batch
normalisation and dropout run in evaluation mode. It is fastest if it passes the context to blocks."""

Cotangents: TypeAlias = Callable[[Tensor, tree.Tree], Iterator[Tensor]]
"""Function from outputs `[*L, B, K]` and their batch to cotangents `[*L, B, K]`, one after another."""

_Factor: TypeAlias = Callable[[Tensor], Tensor]
"""What gradients are multiplied with before they are summed: themselves, for squares, or signs, for absolute values."""

_MAX_TEMPORARY_ENTRIES = 1 << 24
"""Maximal number of entries of a temporary tensor where per-sample gradients are formed."""

_CHECKED_SAMPLES = 16
"""Number of samples on which a function is checked."""


def squared_gradients(
    forward: Forward,
    p: ParamTree,
    batch: tree.Tree,
    cotangents_of: Cotangents,
    learner_axes: int,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Sum of squared per-sample gradients, Σᵢ Σᵣ (Jᵢᵀ vᵢᵣ)² over samples i and cotangents v of each.

    Jᵢ is the Jacobian of sample i's outputs in the weights.

    Args:
        forward: function that returns outputs `[*L, B, K]` or `[*L, B]`.
        p: parameters; not modified.
        batch: samples `[*L, n, ...]`.
        cotangents_of: function that yields v, one cotangent for every output and r.
        learner_axes: number of learner axes.
        names: weights to compute it for, None for all; 0 for the others.
        chunk: samples at a time; the result does not depend on it but for rounding.

    Returns:
        `[*L, P]` in the packed order of the weights.

    Raises:
        SettingError: the outputs have another shape, depend on none of the weights, or on other samples than their own,
            or `chunk` is less than 1.
    """
    return _sums(torch.positive, forward, p, batch, cotangents_of, learner_axes, names, chunk)


def absolute_gradients(
    forward: Forward,
    p: ParamTree,
    batch: tree.Tree,
    cotangents_of: Cotangents,
    learner_axes: int,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Sum of absolute per-sample gradients, Σᵢ Σᵣ |Jᵢᵀ vᵢᵣ|; arguments, result and errors as `squared_gradients`."""
    return _sums(torch.sign, forward, p, batch, cotangents_of, learner_axes, names, chunk)


def _sums(
    factor: _Factor,
    forward: Forward,
    p: ParamTree,
    batch: tree.Tree,
    cotangents_of: Cotangents,
    learner_axes: int,
    names: Sequence[str] | None,
    chunk: int,
) -> Tensor:
    """Sum of per-sample gradients times their factor, `[*L, P]`."""
    axes, wanted = learner_axes, _wanted(p, names)
    require_count("fisher: chunk", chunk)
    with _differentiating():
        constants, batch = _constants(p), _constants(batch)
        sums = {name: torch.zeros_like(weight) for name, weight in constants["weights"].items()}
        check_outputs(forward, constants, batch, axes)
        samples, first_samples = _samples(constants, batch, axes), _first_samples(batch, axes)
        reached = _weights_in_graph(forward, constants, first_samples, wanted)
        tapped = _tapped_names(forward, constants, first_samples, reached, axes)
        for start in range(0, samples if tapped else 0, chunk):
            part = _narrow(batch, axes, start, min(chunk, samples - start))
            _add_tapped(sums, tapped, factor, forward, constants, part, cotangents_of, axes)
        if reached - tapped:
            rest = sorted(reached - tapped)
            _add_single(sums, rest, factor, forward, constants, batch, cotangents_of, axes, chunk)
        return torch.cat([value.reshape(*value.shape[:axes], -1) for value in sums.values()], -1)


def group_gradients(
    losses: Forward, p: ParamTree, batch: tree.Tree, learner_axes: int, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Gradient of the mean loss of every group of samples.

    No value is read, so that the computation can be recorded. Check with `check_outputs` that samples do not depend on
    each other; a function that reorders the rows of its batch between layers must not pass them the context.

    Args:
        losses: function that returns a loss `[*L, B]` for every sample.
        p: parameters; not modified.
        batch: K groups of M samples, `[*L, K, M, ...]`.
        learner_axes: number of learner axes.
        names: weights to compute it for, None for all.

    Returns:
        Gradients `{name: [*L, K, ...]}`.

    Raises:
        SettingError: the losses have another shape, or depend on none of the weights.
    """
    wanted = _wanted(p, names)
    with _differentiating():
        constants, batch = _constants(p), _constants(batch)
        gradients = _tapped_groups(wanted, losses, constants, batch, learner_axes)
        left = [name for name in constants["weights"] if name in wanted and name not in gradients]
        if left:
            gradients |= _single_groups(left, losses, constants, batch, learner_axes, bool(gradients))
        return {name: gradients[name] for name in p["weights"] if name in wanted}


def check_outputs(forward: Forward, p: ParamTree, batch: tree.Tree, learner_axes: int) -> Tensor:
    """Check that outputs are independent across samples, on up to 16 of them.

    The first and the last of them must have the same outputs alone as among the others.

    Args:
        forward: function that returns outputs `[*L, B, K]` or `[*L, B]`.
        p: parameters.
        batch: samples `[*L, n, ...]`.
        learner_axes: number of learner axes.

    Returns:
        The outputs of the first B samples, `[*L, B, K]` or `[*L, B]`.

    Raises:
        SettingError: the outputs have another shape, or depend on other samples or on random numbers.
    """
    axes = learner_axes
    _samples(p, batch, axes)
    batch = _first_samples(batch, axes)
    rows = next(tree.leaves(batch)).shape[: axes + 1]
    with torch.no_grad():
        out = forward(p, batch, Context())
        _check_shape(out, rows)
        for row in {0, rows[axes] - 1} if rows[axes] > 1 else ():
            try:
                alone = forward(p, _narrow(batch, axes, row, 1), Context())
            except (RuntimeError, ValueError) as error:
                raise SettingError(f"a sample alone has no output, {error}: {_INDEPENDENCE_HINT}") from error
            together = out.narrow(axes, row, 1)
            near = torch.finfo(out.dtype).eps ** 0.5
            scale = torch.nan_to_num(out.abs(), posinf=0.0).amax()
            if alone.shape != together.shape or not torch.allclose(
                alone, together, rtol=near, atol=float(near * scale), equal_nan=True
            ):
                raise SettingError(f"a sample's output changes without the rest of its batch: {_INDEPENDENCE_HINT}")
    return out


_INDEPENDENCE_HINT = (
    "a sample's output must depend on that sample alone; batch normalisation with batch statistics, a recurrent layer "
    "that takes the batch axis for time, and dropout cannot be used here (put the module in evaluation mode)"
)


# ---------------------------------------------------------------------- arguments and their checks


@contextmanager
def _differentiating() -> Iterator[None]:
    """Context in which gradients are computed, even under `torch.no_grad` or inference mode of the caller."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _constants(tensors: tree.Tree) -> tree.Tree:
    """Detach tensors; those of inference mode are copied, since they cannot be differentiated."""
    return tree.map(lambda x: x.clone() if x.is_inference() else x.detach(), tensors)


def _wanted(p: ParamTree, names: Sequence[str] | None) -> set[str]:
    wanted = set(p["weights"] if names is None else names)
    if not wanted <= set(p["weights"]):
        unknown = ", ".join(sorted(wanted - set(p["weights"])))
        raise SettingError(f"there is no weight {unknown}, expected names among {', '.join(p['weights'])}")
    return wanted


def _samples(p: ParamTree, batch: tree.Tree, axes: int) -> int:
    """Number of samples of each learner, after a check of the shapes."""
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


def _first_samples(batch: tree.Tree, axes: int) -> tree.Tree:
    """Select the first samples of a batch, on which a function is checked."""
    return tree.map(lambda x: x.narrow(axes, 0, min(_CHECKED_SAMPLES, x.shape[axes])), batch)


def _check_shape(out: Any, rows: Sequence[int]) -> None:
    """Check that the outputs are one number, or one vector, for every sample."""
    actual = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"of type {type(out).__name__}"
    fits = isinstance(out, Tensor) and out.is_floating_point() and len(rows) <= out.dim() <= len(rows) + 1
    if not fits or out.shape[: len(rows)] != torch.Size(rows):
        expected = ", ".join(map(str, rows))
        raise SettingError(
            f"the outputs are {actual}, expected numbers [{expected}] or [{expected}, K]: not their mean"
        )


def _with_leaves(p: ParamTree, names: Iterable[str]) -> tuple[ParamTree, dict[str, Tensor]]:
    """Replace the named weights by leaves that require gradients; returns the parameters and these leaves."""
    leaves = {name: p["weights"][name].detach().requires_grad_() for name in sorted(names)}
    return _with(p, leaves), leaves


def _with(p: ParamTree, weights: Mapping[str, Tensor]) -> ParamTree:
    """Replace some weights of the parameters."""
    return {**p, "weights": {**p["weights"], **weights}}


_UNREACHED = (
    "the outputs depend on none of the weights to differentiate with respect to: compute them from p['weights'], not "
    "from a module's own, and without detach, item or torch.no_grad"
)


def _weights_in_graph(forward: Forward, p: ParamTree, batch: tree.Tree, wanted: set[str]) -> set[str]:
    """Select the wanted weights on which the outputs depend.

    Raises:
        SettingError: the outputs depend on none of them.
    """
    if not wanted:
        return set()
    with_leaves, leaves = _with_leaves(p, wanted)
    out = forward(with_leaves, batch, Context())
    if not out.requires_grad:
        raise SettingError(_UNREACHED)
    gradients = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    reached = {name for name, gradient in zip(leaves, gradients) if gradient is not None}
    if not reached:
        raise SettingError(_UNREACHED)
    return reached


# ---------------------------------------------------------------------- linear layers

Taps: TypeAlias = dict[str, list[tuple[Tensor, Tensor]]]
"""Stored inputs and outputs of linear layers, `{prefix in weights: [(input, output), ...]}`; see `Context.taps`."""


def _run(forward: Forward, p: ParamTree, batch: tree.Tree, wanted: set[str]) -> tuple[Tensor, Taps, dict[str, Tensor]]:
    """Forward pass that stores the inputs and outputs of linear layers.

    These layers ("tapped" ones) treat their weights as constants, so a weight is in the graph only if something else
    uses it too (a tied layer, a penalty).

    Args:
        forward: the function.
        p: parameters.
        batch: samples `[*L, B, ...]`.
        wanted: names of weights.

    Returns:
        The outputs, the stored calls of layers with wanted weights, and these weights as leaves of the graph.
    """
    taps: Taps = {}
    with_leaves, leaves = _with_leaves(p, wanted)
    out = forward(with_leaves, batch, Context(taps=taps))
    names = {prefix: [n for n in (f"{prefix}weight", f"{prefix}bias") if n in wanted] for prefix in taps}
    taps = {prefix: calls for prefix, calls in taps.items() if names[prefix]}
    return out, taps, {name: leaves[name] for prefix in taps for name in names[prefix]}


def _backward(
    out: Tensor, taps: Taps, leaves: Mapping[str, Tensor], cotangent: Tensor, keep: bool = False
) -> tuple[dict[str, list[Tensor]], set[str]]:
    """Backward pass to the outputs of the tapped layers.

    Args:
        out: outputs of the function.
        taps: stored calls of its layers.
        leaves: their weights.
        cotangent: of `out`'s shape.
        keep: whether to keep the graph for another pass.

    Returns:
        The gradients at the layers' outputs, by prefix, and names of the weights that something else uses too.
    """
    layer_outputs = [output for calls in taps.values() for _, output in calls]
    inputs = [*layer_outputs, *leaves.values()]
    gradients = torch.autograd.grad(out, inputs, cotangent, retain_graph=keep, allow_unused=True)
    at_outputs = iter([torch.zeros_like(output) if g is None else g for g, output in zip(gradients, layer_outputs)])
    used = {name for name, gradient in zip(leaves, gradients[len(layer_outputs) :]) if gradient is not None}
    return {prefix: [next(at_outputs) for _ in calls] for prefix, calls in taps.items()}, used


def _tapped_names(forward: Forward, p: ParamTree, batch: tree.Tree, wanted: set[str], axes: int) -> set[str]:
    """Select the wanted weights that are used by linear layers alone, whose rows are samples.

    If only some samples have a cotangent, the gradients at the rows of the others are 0, unless the function has
    reordered rows or folded further axes into them.
    """
    out, taps, leaves = _run(forward, p, batch, wanted)
    if not taps or not out.requires_grad:
        return set()
    samples = out.shape[axes]
    chosen = random.integers(random.make_keys([0], out.device)[0], "chosen", 0, (samples,), 2) == 0
    cotangent = torch.where(chosen.reshape(-1, *(1,) * (out.dim() - axes - 1)), torch.ones_like(out), 0.0)
    gradients, used = _backward(out, taps, leaves, cotangent)
    sample_wise = [prefix for prefix in taps if all(_rows_are_samples(g, chosen, axes) for g in gradients[prefix])]
    own = {f"{prefix}{kind}" for prefix in sample_wise for kind in ("weight", "bias")}
    return set(leaves) & own - used


def _rows_are_samples(gradient: Tensor, chosen: Tensor, axes: int) -> bool:
    """Whether a layer's rows are samples: only the chosen ones have a gradient other than 0."""
    if gradient.dim() < axes + 2 or gradient.shape[axes] != len(chosen):
        return False
    return bool((gradient.index_select(axes, (~chosen).nonzero().flatten()) == 0).all())


def _add_tapped(
    sums: dict[str, Tensor],
    wanted: set[str],
    factor: _Factor,
    forward: Forward,
    p: ParamTree,
    batch: tree.Tree,
    cotangents_of: Cotangents,
    axes: int,
) -> None:
    """Add the per-sample gradients of tapped linear layers, times their factor, to `sums`, in place.

    Args:
        sums: `{name: like the weight}`, modified.
        wanted: names of the layers' weights.
        factor: of gradients.
        forward, p, batch, cotangents_of: as for `squared_gradients`.
        axes: number of learner axes.
    """
    out, taps, _ = _run(forward, p, batch, wanted)
    sizes: dict[str, Tensor] = {}
    for cotangent in cotangents_of(out.detach(), batch):
        for prefix, gradients in _backward(out, taps, {}, cotangent, keep=True)[0].items():
            if len(gradients) == 1 and gradients[0].dim() == axes + 2:
                size, first = sizes.get(prefix), gradients[0]
                sizes[prefix] = _sized(first, factor) if size is None else size.addcmul_(first, factor(first))
            else:
                _add_outer(sums, wanted, factor, prefix, [x for x, _ in taps[prefix]], gradients, axes)
    for prefix, size in sizes.items():  # summed over cotangents before the product, so that there is one product
        if f"{prefix}weight" in wanted:
            sums[f"{prefix}weight"] += product(size.mT, _sized(taps[prefix][0][0], factor))
        if f"{prefix}bias" in wanted:
            sums[f"{prefix}bias"] += size.sum(-2)


def _sized(x: Tensor, factor: _Factor) -> Tensor:
    """Square or absolute value."""
    return x * factor(x)


def _add_outer(
    sums: dict[str, Tensor],
    wanted: set[str],
    factor: _Factor,
    prefix: str,
    inputs: list[Tensor],
    gradients: list[Tensor],
    axes: int,
) -> None:
    """Add the per-sample gradients of a layer that every sample passes several times to `sums`, in place.

    Such a gradient is a sum of outer products, whose square or absolute value is taken as a whole.

    Args:
        sums: `{name: like the weight}`, modified.
        wanted: names of weights.
        factor: of gradients.
        prefix: prefix of the layer's weights.
        inputs: of every call of the layer, `[*L, B, ..., in]`.
        gradients: at the outputs of every call, `[*L, B, ..., out]`.
        axes: number of learner axes.
    """
    x = torch.cat([x.flatten(axes + 1, -2) if x.dim() > axes + 2 else x.unsqueeze(-2) for x in inputs], -2)
    g = torch.cat([g.flatten(axes + 1, -2) if g.dim() > axes + 2 else g.unsqueeze(-2) for g in gradients], -2)
    size = max(1, _MAX_TEMPORARY_ENTRIES // (x.shape[-1] * g.shape[-1] * x.shape[:axes].numel()))
    for some_x, some_g in zip(torch.split(x, size, axes), torch.split(g, size, axes)):
        if f"{prefix}weight" in wanted:
            sums[f"{prefix}weight"] += _sized(some_g.mT @ some_x, factor).sum(axes)
        if f"{prefix}bias" in wanted:
            sums[f"{prefix}bias"] += _sized(some_g.sum(-2), factor).sum(axes)


def _tapped_groups(wanted: set[str], losses: Forward, p: ParamTree, batch: tree.Tree, axes: int) -> dict[str, Tensor]:
    """Gradients of groups in linear layers: one backward pass over all samples, one matrix product per layer."""
    rows = next(tree.leaves(batch)).shape[: axes + 2]
    groups, samples = rows[axes:]
    out, taps, leaves = _run(losses, p, tree.map(lambda x: x.flatten(axes, axes + 1), batch), wanted)
    _check_shape(out, (*rows[:axes], groups * samples))
    taps = {prefix: calls for prefix, calls in taps.items() if _are_rows(calls, axes, groups * samples)}
    if not taps or not out.requires_grad:
        return {}
    leaves = {name: leaf for name, leaf in leaves.items() if name.removesuffix("weight").removesuffix("bias") in taps}
    cotangent = torch.full_like(out, 1.0 / samples)
    gradients: dict[str, Tensor] = {}
    at_outputs, used = _backward(out, taps, leaves, cotangent)
    for prefix, layer_gradients in at_outputs.items():
        for (x, _), g in zip(taps[prefix], layer_gradients):
            shape = (*g.shape[:axes], groups, -1)
            x, g = x.reshape(*shape, x.shape[-1]), g.reshape(*shape, g.shape[-1])
            _accumulate(gradients, f"{prefix}weight", product(g.mT, x))
            _accumulate(gradients, f"{prefix}bias", g.sum(-2))
    return {name: gradients[name] for name in leaves if name not in used}


def _are_rows(calls: list[tuple[Tensor, Tensor]], axes: int, samples: int) -> bool:
    """Whether the rows of a layer are samples in all its calls."""
    return all(output.dim() >= axes + 2 and output.shape[axes] == samples for _, output in calls)


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


# ---------------------------------------------------------------------- other weights: sample by sample, group by group


def _add_single(
    sums: dict[str, Tensor],
    names: Sequence[str],
    factor: _Factor,
    forward: Forward,
    p: ParamTree,
    batch: tree.Tree,
    cotangents_of: Cotangents,
    axes: int,
    chunk: int,
) -> None:
    """Add the per-sample gradients of any weights, times their factor, to `sums`, in place, sample by sample.

    Args:
        sums: `{name: like the weight}`, modified.
        names: of the weights.
        factor: of gradients.
        forward, p, batch, cotangents_of, chunk: as for `squared_gradients`.
        axes: number of learner axes.
    """
    weights = {name: p["weights"][name] for name in names}

    def sizes(sample: tree.Tree, cotangents: Tensor) -> dict[str, Tensor]:
        """Sizes Σᵣ of the gradients Jᵀ vᵣ of a sample `[*L, ...]` and its cotangents `[R, *L, (K)]`."""
        alone = tree.map(lambda x: x.unsqueeze(axes), sample)
        _, pull, *_ = torch.func.vjp(lambda w: forward(_with(p, w), alone, Context()), weights)
        gradients = [pull(cotangent.unsqueeze(axes))[0] for cotangent in cotangents.unbind(0)]
        return {name: torch.stack([_sized(g[name], factor) for g in gradients]).sum(0) for name in names}

    samples = next(tree.leaves(batch)).shape[axes]
    chunk = max(1, min(chunk, _MAX_TEMPORARY_ENTRIES // sum(weight.numel() for weight in weights.values())))
    for start in range(0, samples, chunk):
        part = _narrow(batch, axes, start, min(chunk, samples - start))
        with torch.no_grad():
            cotangents = torch.stack(list(cotangents_of(forward(p, part, Context()), part)))
        for name, size in _sum_over_samples(sizes, part, cotangents, axes).items():
            sums[name] += size


_Sizes: TypeAlias = Callable[[tree.Tree, Tensor], dict[str, Tensor]]


def _sum_over_samples(sizes: _Sizes, batch: tree.Tree, cotangents: Tensor, axes: int) -> dict[str, Tensor]:
    """Sum sizes of gradients over samples, by `torch.func.vmap`, or in a loop if that cannot run the function.

    Args:
        sizes: function of a sample `[*L, ...]` and its cotangents `[R, *L, (K)]`.
        batch: samples `[*L, B, ...]`.
        cotangents: `[R, *L, B, (K)]`.
        axes: number of learner axes.
    """
    try:
        dims = tree.map(lambda _: axes, batch), axes + 1
        many = torch.func.vmap(sizes, in_dims=dims)(batch, cotangents)
        return {name: size.sum(0) for name, size in many.items()}
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # an operation has no batching rule
        total: dict[str, Tensor] = {}
        for row in range(cotangents.shape[axes + 1]):
            sample = tree.map(lambda x: x.select(axes, row), batch)  # noqa: B023 - used at once
            for name, size in sizes(sample, cotangents.select(axes + 1, row)).items():
                _accumulate(total, name, size)
        return total


def _single_groups(
    names: Sequence[str], losses: Forward, p: ParamTree, batch: tree.Tree, axes: int, reached: bool
) -> dict[str, Tensor]:
    """Gradients of groups, one backward pass per group; `reached`: the losses depend on some other weight."""
    rows = next(tree.leaves(batch)).shape[: axes + 2]
    columns: list[list[Tensor]] = []
    for group in range(rows[axes]):
        with_leaves, leaves = _with_leaves(p, names)
        out = losses(with_leaves, tree.map(lambda x: x.select(axes, group), batch), Context())  # noqa: B023 - used at once
        _check_shape(out, (*rows[:axes], rows[axes + 1]))
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            cotangent = torch.full_like(out, 1.0 / rows[axes + 1])
            gradients = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        reached = reached or any(gradient is not None for gradient in gradients)
        columns.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves.values())])
    if not reached:
        raise SettingError(_UNREACHED)
    return {name: torch.stack(column, axes) for name, column in zip(leaves, zip(*columns))}
