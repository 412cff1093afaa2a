"""Averages of an iteration's metrics between two lines of records; the sums are part of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.functional import tree
from rlmeta.learning.learner import Metrics
from rlmeta.learning.state import State


def accumulate(state: State, metrics: Metrics) -> None:
    """Add an iteration's metrics `[*L]` to the sums of the next line; they are part of the state: a resume is exact."""
    sums, counted = dict(state.get("metrics", {})), state["active"].to(torch.float64)
    for name, value in metrics.items():
        entry = name.replace("/", ".")
        new = torch.stack([torch.where(state["active"], value.to(torch.float64), 0.0), counted], -1)
        sums[entry] = sums[entry] + new if entry in sums else new
    state["metrics"] = sums


def take_averages(state: State) -> dict[str, Tensor]:
    """The averages since the last line, `[*L]`, NaN where there is nothing to average; the sums start anew."""
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
