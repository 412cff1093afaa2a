"""Pure maths on tensors: returns, losses, distributions, optimizers, projections, random numbers, statistics.

One file a subject; all of them are there after `import rlmeta.functional`.
"""

from rlmeta.functional import (
    axes,
    distributions,
    evolution,
    losses,
    normalise,
    optim,
    packed,
    projection,
    pruning,
    quadratics,
    random,
    reservoir,
    returns,
    schedules,
    shapes,
    statistics,
    tabular,
    tree,
)

__all__ = [
    "axes",
    "distributions",
    "evolution",
    "losses",
    "normalise",
    "optim",
    "packed",
    "projection",
    "pruning",
    "quadratics",
    "random",
    "reservoir",
    "returns",
    "schedules",
    "shapes",
    "statistics",
    "tabular",
    "tree",
]
