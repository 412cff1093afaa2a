"""Natural gradient steps of many learners at once: conjugate gradient, and a backtracking line search.

Each learner stops for itself, by masks: the number of products and tries is fixed, so that shapes never change and the
operations can be recorded. One whose numbers are not finite accepts no step and disturbs no other.

Sources: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; Schulman et al.,
"Trust region policy optimization", 2015, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlmeta.errors import require_count
from rlmeta.functional.axes import align
from rlmeta.functional.shapes import same_shape


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Conjugate gradient: the x with A x = b, for a symmetric positive definite A that is known by its products.

    A learner stays at the x it has once |b - A x|² <= tolerance |b|².

    Args:
        product: function from vectors `[*L, P]` to A times each, `[*L, P]`.
        target: b, `[*L, P]`; of a learner with b = 0 the solution is 0.
        iterations: number of products; P of them are enough but for rounding.
        tolerance: of the squared residual, as a part of b's.

    Returns:
        `[*L, P]`
    """
    require_count("iterations", iterations)
    x, residual, direction = torch.zeros_like(target), target, target
    square = _dot(residual, residual)
    enough = tolerance * square
    for _ in range(iterations):
        moved = product(direction)
        going = square > enough
        rate = _ratio(square, _dot(direction, moved), going)
        x = x + rate * direction
        residual = residual - rate * moved
        new_square = torch.where(going, _dot(residual, residual), square)
        direction = residual + _ratio(new_square, square, going) * direction
        square = new_square
    return x


def step_within(divergence: float | Tensor, direction: Tensor, moved: Tensor) -> Tensor:
    """Largest step along a direction d for which the quadratic model ½ stepᵀ H step is `divergence`: √(2 δ / dᵀ H d) d.

    Args:
        divergence: δ, a number or `[*L]`.
        direction: d, `[*L, P]`.
        moved: H d, `[*L, P]`.

    Returns:
        `[*L, P]`; 0 where dᵀ H d is not positive.
    """
    same_shape(direction=direction, moved=moved)
    curvature = _dot(direction, moved)
    limit = align(divergence, curvature)
    limit = limit if isinstance(limit, Tensor) else torch.full_like(curvature, limit)
    return _ratio(2.0 * limit, curvature, curvature > 0).sqrt() * direction


class Accepted(NamedTuple):
    """Outcome of a line search."""

    point: Tensor
    """`[*L, P]`; where no try was accepted the starting point, bit for bit."""
    fraction: Tensor
    """Fraction of the whole step that was taken, `[*L]`; 0 where no try was accepted."""


def line_search(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    step: Tensor,
    limit: float | Tensor,
    tries: int,
    shrink: float = 0.8,
) -> Accepted:
    """Backtracking line search: the first of start + shrinkᵏ step that improves the objective within the trust region.

    Args:
        evaluate: function from points `[*L, P]` to their objective, more is better, and their divergence from the
            start, `[*L]` each.
        start: `[*L, P]`.
        step: `[*L, P]`.
        limit: largest divergence, a number or `[*L]`.
        tries: K, for k = 0 ... K - 1; all are evaluated for every learner.
        shrink: in (0, 1).

    Source: Schulman et al., "Trust region policy optimization", 2015, appendix C.
    """
    require_count("tries", tries)
    before, _ = evaluate(start)
    point, fraction = start, torch.zeros_like(before)
    for k in range(tries):
        part = shrink**k
        candidate = start + part * step
        objective, divergence = evaluate(candidate)
        fits = (objective > before) & (divergence <= align(limit, divergence)) & (fraction == 0)
        point = torch.where(fits.unsqueeze(-1), candidate, point)
        fraction = torch.where(fits, part, fraction)
    return Accepted(point, fraction)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of `[*L, P]`, `[*L, 1]`."""
    return (a * b).sum(-1, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """Quotient where a mask is set, else 0."""
    return torch.where(where, numerator / torch.where(where, denominator, 1.0), 0.0)
