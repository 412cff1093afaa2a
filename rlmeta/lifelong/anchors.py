"""Quadratic penalties about old weights, which EWC, SI, MAS, RWalk and the L2 penalty share; they differ in importance.

The penalty ½ λ Σ A (θ - c)² has a precision A and a centre c for every weight (`functional.quadratics`). Its gradient
λ A (θ - c) is added in closed form, so that the losses' own gradient stays visible to other methods. At λ = inf weights
whose precision is not 0 do not move at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlmeta.functional.packed import Packed
from rlmeta.functional.quadratics import zero_quadratic
from rlmeta.learning.method import Memory
from rlmeta.learning.predictive import check_predictive, predicting
from rlmeta.learning.settings import values_of
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import per_learner

Strength = float | Sequence[float]


def is_idle(strength: Strength) -> bool:
    """Whether the strength is 0 for every learner."""
    return not any(values_of(strength))


def initial_anchor(learner: Any, strength: Strength, state: State) -> Memory:
    """Initial penalty, zero for every weight, with the strength of every learner."""
    check_predictive(learner)
    flat = packed(state["params"], state["key"].dim())
    return {"quadratic": zero_quadratic(flat), "strength": per_learner(strength, state)}


def packed(p: Params, axes: int) -> Tensor:
    """Weights `[*L, P]`, without their graph."""
    return Packed.of(p["weights"], axes).flat.detach()


def pulled(total: Tensor, p: Params, m: Memory) -> Tensor:
    """Total gradient `[*L, P]` with that of the penalty; a learner's whose strength is 0 stays bit-identical."""
    q, strength = m["quadratic"], m["strength"].unsqueeze(-1)
    finite = torch.where(strength.isinf(), 0.0, strength)
    away = packed(p, strength.dim() - 1) - q["centre"]
    return torch.where(finite > 0, total + finite * (q["precision"] * away), total)


def held(strength: Strength, m: Memory) -> Tensor | None:
    """Mask `[*L, P]` of the weights that an infinite strength holds; None where no strength is infinite."""
    if not any(math.isinf(value) for value in values_of(strength)):
        return None
    infinite: Tensor = m["strength"].isinf().unsqueeze(-1) & (m["quadratic"]["precision"] > 0)
    return infinite


def predictive_mask(learner: Any, p: Params, axes: int) -> Tensor:
    """Mask `[*L, P]` of the weights that the learner's distribution depends on: of an agent not those of its critic."""
    weights = p["weights"]
    own = set(predicting(learner, weights))
    return torch.cat(
        [torch.full_like(w.flatten(axes), name in own, dtype=torch.bool) for name, w in weights.items()], -1
    )
