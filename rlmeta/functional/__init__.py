"""Pure maths on tensors: returns, losses, distributions, optimizers, projections, random numbers, statistics.

One module a subject; `import rlmeta.functional` imports all of them.
"""

from rlmeta.functional import (
    axes,
    distributional,
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
    sum_tree,
    tabular,
    tree,
    trust_region,
)

__all__ = [
    "axes",
    "distributional",
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
    "sum_tree",
    "tabular",
    "tree",
    "trust_region",
]
