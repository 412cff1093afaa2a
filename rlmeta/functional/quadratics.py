"""Quadratic penalties Σₖ Fₖ (θ - θₖ)² of elastic weight consolidation, summed in closed form.

The sum of many quadratics with diagonal curvature is one quadratic about their weighted mean (Huszár, 2018), so memory
and time do not grow with their number:

    Σₖ Fₖ (θ - θₖ)² = A (θ - c)² + constant,   A = Σ Fₖ,   c = Σ Fₖ θₖ / A
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional.axes import align


def zero_quadratic(flat: Tensor) -> dict[str, Tensor]:
    """Initial penalty of EWC, zero: `precision` A and `centre` c like `flat` `[*L, P]`, `constant` `[*L]`."""
    zero = torch.zeros_like(flat)
    return {"precision": zero, "centre": zero.clone(), "constant": zero[..., 0].clone()}


def add_quadratic(q: dict[str, Tensor], fisher: Tensor, theta: Tensor) -> dict[str, Tensor]:
    """Sum of the quadratic penalties A (θ - c)² + constant and F (θ - θₖ)², as one quadratic.

    Args:
        q: the sum so far, as `zero_quadratic` begins it.
        fisher: F, the new curvature `[*L, P]`, 0 or more.
        theta: θₖ, the new anchor `[*L, P]`.
    """
    total = q["precision"] + fisher
    share = torch.where(total > 0, fisher / torch.where(total > 0, total, torch.ones_like(total)), 0.0)
    apart = theta - q["centre"]
    return {
        "precision": total,
        "centre": q["centre"] + share * apart,
        "constant": q["constant"] + (q["precision"] * share * apart.square()).sum(-1),
    }


def replace_quadratic(q: dict[str, Tensor], fisher: Tensor, theta: Tensor, decay: Tensor) -> dict[str, Tensor]:
    """Quadratic penalty of online EWC, (γ A + F) (θ - θₖ)², about the latest weights alone (Schwarz et al., 2018).

    Args:
        q: the penalty so far.
        fisher: F `[*L, P]`, 0 or more.
        theta: θₖ `[*L, P]`.
        decay: γ `[*L]`.
    """
    faded = align(decay, fisher) * q["precision"] + fisher
    return {"precision": faded, "centre": theta.clone(), "constant": torch.zeros_like(q["constant"])}


def quadratic_value(q: dict[str, Tensor], theta: Tensor) -> Tensor:
    """Value Σ A (θ - c)² + constant of a quadratic penalty at θ `[*L, P]`, `[*L]`."""
    return (q["precision"] * (theta - q["centre"]).square()).sum(-1) + q["constant"]
