"""Running averages of training metrics between two lines of `metrics.jsonl`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning.learner import Metrics
from rlmeta.learning.state import State


def accumulate(state: State, metrics: Metrics) -> None:
    """Add an iteration's metrics `[*L]` to the running sums in the state, so that a resumed run averages the same."""
    sums, counted = dict(state.get("metrics", {})), state["active"].to(torch.float64)
    for name, value in metrics.items():
        entry = name.replace("/", ".")
        new = torch.stack([torch.where(state["active"], value.to(torch.float64), 0.0), counted], -1)
        sums[entry] = sums[entry] + new if entry in sums else new
    state["metrics"] = sums


def take_averages(state: State) -> dict[str, Tensor]:
    """Averages `[*L]` since the last line by name, NaN where no value was added; resets the sums to zero."""
    sums: dict[str, Tensor] = state["metrics"]
    state["metrics"] = tree.map(torch.zeros_like, sums)
    averages: dict[str, Tensor] = {}
    if "episodes" in sums:
        episodes = sums["episodes"][..., 0]
        averages["charts/episodic_return"] = sums["return_sum"][..., 0] / episodes
        averages["charts/episodic_length"] = sums["length_sum"][..., 0] / episodes
    for entry, value in sums.items():
        if "." in entry:
            averages[entry.replace(".", "/", 1)] = value[..., 0] / value[..., 1]
    return averages
