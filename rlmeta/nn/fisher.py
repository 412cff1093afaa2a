"""Diagonal Fisher information: how much a predictive distribution changes with each weight.

F = E_x E_{y ~ p(.|x)} (∂ log p(y|x) / ∂w)², averaged over samples. With η the distribution's parameters (logits, say)
and G(η) = Σᵣ vᵣ vᵣᵀ its Fisher information in them, the diagonal in the weights is Σᵣ (Jᵀ vᵣ)², J the Jacobian of η:
one backward pass for every root v, and `squared_gradients` does the rest. The kinds differ in their roots:

| kind | labels | roots |
|---|---|---|
| exact | the expectation over all of them | √p(y) ∂ log p(y) / ∂η for every y (categorical), 1/σ and √2 (Gaussian) |
| sample | one drawn from the distribution, unbiased | ∂ log p(y) / ∂η |
| empirical | those of the data; not the Fisher information, and 0 where the data are fitted | ∂ log p(y) / ∂η |

Squaring the gradient of a batch's mean loss, as many implementations do, is none of these.

Source: van de Ven, "On the computation of the Fisher information in continual learning", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rlmeta.errors import SettingError, require_choice
from rlmeta.functional import random, tree
from rlmeta.nn.block import Context
from rlmeta.nn.sample_gradients import Forward, ParamTree, check_outputs, squared_gradients

FisherKind: TypeAlias = Literal["exact", "sample", "empirical"]
"""Where the labels come from: expectation, sample of the model, or the data; see the table above."""


def categorical_fisher(
    logits: Forward,
    p: ParamTree,
    batch: tree.Tree,
    learner_axes: int,
    kind: FisherKind = "exact",
    *,
    target: Tensor | None = None,
    key: Tensor | None = None,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Diagonal Fisher information of a categorical distribution, per sample on average.

    Args:
        logits: function that returns `[*L, B, C]` for a batch.
        p: `{"weights": {name: [*L, ...]}}`, and buffers if there are some; evaluated without dropout and with running
            statistics.
        batch: samples `[*L, n, ...]`.
        learner_axes: number of learner axes.
        kind: where the labels come from, see `FisherKind`.
        target: kind "empirical": the labels `[*L, n]` int64.
        key: kind "sample": `[*L]`.
        names: weights to compute it for, None for all; 0 for the others.
        chunk: samples at a time.

    Returns:
        `[*L, P]`

    Raises:
        SettingError: the labels or the key that the kind needs are missing or do not fit, the outputs are no logits,
            or `squared_gradients` refuses them.
    """
    require_choice("fisher: kind", kind, FisherKind)
    if target is not None and kind != "empirical":
        raise SettingError(
            f'fisher: kind "{kind}" takes its labels from the model, but target was given: did you mean "empirical"?'
        )
    some = check_outputs(logits, p, batch, learner_axes)
    _refuse_probabilities(some, learner_axes)
    samples = next(tree.leaves(batch)).shape[learner_axes]
    if kind == "exact":
        total = squared_gradients(logits, p, batch, categorical_roots, learner_axes, names, chunk)
        return total / samples
    if kind == "sample":
        target = _drawn_labels(logits, p, batch, key, learner_axes)
    labels = _checked_labels(target, some, (*some.shape[:learner_axes], samples))
    labelled = {"batch": batch, "target": labels}
    total = squared_gradients(
        lambda p, b, ctx: logits(p, b["batch"], ctx), p, labelled, _label_roots, learner_axes, names, chunk
    )
    return total / samples


def _refuse_probabilities(out: Tensor, learner_axes: int) -> None:
    """Refuse probabilities in place of logits: rows of nonnegative numbers that sum to 1."""
    if out.dim() != learner_axes + 2:
        raise SettingError(f"fisher: the outputs have shape {tuple(out.shape)}, expected logits [*L, B, C]")
    if out.shape[-1] > 1 and bool((out >= 0).all() & ((out.sum(-1) - 1).abs() < 1e-3).all()):
        raise SettingError("fisher: the outputs are probabilities, expected logits: leave the softmax out, or take log")


def _drawn_labels(logits: Forward, p: ParamTree, batch: tree.Tree, key: Tensor | None, learner_axes: int) -> Tensor:
    """Sample labels `[*L, n]` from the predicted distribution."""
    if key is None or key.dim() != learner_axes:
        key_text = "without a key" if key is None else f"with a key of shape {tuple(key.shape)}"
        raise SettingError(f'fisher: kind "sample" draws labels, {key_text}: pass a key [*L]')
    with torch.no_grad():
        drawn = logits(p, batch, Context())
    return (drawn + random.gumbel(key, "fisher", 0, drawn.shape[key.dim() :], drawn.dtype)).argmax(-1)


def _checked_labels(target: Tensor | None, out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert labels to int64, after a check against the number of classes of the logits `out`."""
    if target is None:
        raise SettingError('fisher: kind "empirical" is of the data\'s labels: pass target')
    if target.is_floating_point() or tuple(target.shape) != shape:
        raise SettingError(f"fisher: target is {target.dtype} {tuple(target.shape)}, expected integers {shape}")
    if bool(((target < 0) | (target >= out.shape[-1])).any()):
        raise SettingError(f"fisher: target has labels outside 0 to {out.shape[-1] - 1}, the classes of the logits")
    return target.to(torch.int64)


def gaussian_fisher(
    parameters: Forward,
    p: ParamTree,
    batch: tree.Tree,
    learner_axes: int,
    *,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Exact diagonal Fisher information of a diagonal Gaussian, per sample on average.

    Σⱼ (∂μⱼ)² / σⱼ² + 2 (∂ log σⱼ)²

    Args:
        parameters: function that returns means and log standard deviations, concatenated: `[*L, B, 2 A]`.
        p: parameters.
        batch: samples `[*L, n, ...]`.
        learner_axes: number of learner axes.
        names: weights to compute it for, None for all; 0 for the others.
        chunk: samples at a time.

    Returns:
        `[*L, P]`

    Raises:
        SettingError: the outputs have another shape, or `squared_gradients` refuses them.
    """
    samples = next(tree.leaves(batch)).shape[learner_axes]
    some = check_outputs(parameters, p, batch, learner_axes)
    if some.dim() != learner_axes + 2 or some.shape[-1] % 2:
        raise SettingError(f"fisher: the outputs have shape {tuple(some.shape)}, expected means and log deviations")
    return squared_gradients(parameters, p, batch, gaussian_roots, learner_axes, names, chunk) / samples


def score_fisher(
    log_prob: Forward,
    p: ParamTree,
    batch: tree.Tree,
    learner_axes: int,
    *,
    names: Sequence[str] | None = None,
    chunk: int = 512,
) -> Tensor:
    """Fisher information from scores, the mean of (∂ log p)² over samples of any distribution.

    It is of kind "sample" where the batch was drawn from the model itself, else "empirical".

    Args:
        log_prob: function that returns `[*L, B]`.
        p: parameters.
        batch: samples `[*L, n, ...]`, with their labels or actions.
        learner_axes: number of learner axes.
        names: weights to compute it for, None for all; 0 for the others.
        chunk: samples at a time.

    Returns:
        `[*L, P]`

    Raises:
        SettingError: the outputs have another shape, or `squared_gradients` refuses them.
    """

    def ones(out: Tensor, batch: tree.Tree) -> Iterator[Tensor]:
        yield torch.ones_like(out)

    samples = next(tree.leaves(batch)).shape[learner_axes]
    some = check_outputs(log_prob, p, batch, learner_axes)
    if some.dim() != learner_axes + 1:
        raise SettingError(f"fisher: the outputs have shape {tuple(some.shape)}, expected log-probabilities [*L, B]")
    return squared_gradients(log_prob, p, batch, ones, learner_axes, names, chunk) / samples


def categorical_roots(logits: Tensor, batch: tree.Tree = None) -> Iterator[Tensor]:
    """Roots √p_y (e_y - p) of a categorical's Fisher information diag(p) - p pᵀ in its logits, one per label y."""
    probabilities = logits.softmax(-1)
    for label in range(logits.shape[-1]):
        scale = probabilities[..., label : label + 1].sqrt()
        root = -scale * probabilities
        root[..., label : label + 1] += scale
        yield root


def gaussian_roots(parameters: Tensor, batch: tree.Tree = None) -> Iterator[Tensor]:
    """Roots of a Gaussian's Fisher information: 1 / σⱼ per mean, √2 per log deviation, `[*L, B, 2 A]` each."""
    mean, log_std = parameters.chunk(2, -1)
    scales = torch.cat([(-log_std).exp(), torch.full_like(mean, 2.0**0.5)], -1)
    for j in range(scales.shape[-1]):
        root = torch.zeros_like(scales)
        root[..., j] = scales[..., j]
        yield root


def _label_roots(logits: Tensor, batch: tree.Tree) -> Iterator[Tensor]:
    """Gradient of log p(y) in the logits, e_y - p, for the labels y of the batch."""
    root = -logits.softmax(-1)
    target = batch["target"].unsqueeze(-1)
    yield root.scatter_add(-1, target, torch.ones_like(target, dtype=root.dtype))
