"""A linear-regression learner: the smallest thing that takes gradient steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlmeta.functional import optim, random
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.state import Params, State


class LinearRegression:
    """loss = mean (w x + b - y)^2, in float64."""

    def init(self, keys: Tensor, features: int, optimizer: optim.Optimizer) -> State:
        weights = {
            "net.weight": random.normal(keys, "w", 0, (features,), torch.float64),
            "net.bias": random.normal(keys, "b", 0, (1,), torch.float64),
        }
        params = {"weights": weights, "buffers": {}, "normalisers": {}, "hyper": {}}
        zero = torch.zeros(keys.shape, dtype=torch.int64)
        state: State = {
            "params": params,
            "key": keys,
            "active": torch.ones(keys.shape, dtype=torch.bool),
            "count": {"gradient_steps": zero},
            "task": {"index": zero, "identity": zero, "progress": zero.double()},
        }
        state["optimizer"] = init_optimizer(optimizer, state)
        return state

    def losses(self, p: Params, batch: Any, ctx: StepContext) -> dict[str, Tensor]:
        w = p["weights"]
        prediction = (batch["x"] * w["net.weight"].unsqueeze(-2)).sum(-1) + w["net.bias"]
        return {"net": (prediction - batch["y"]).square().mean(-1)}


def data(keys: Tensor, samples: int, features: int) -> dict[str, Tensor]:
    """Inputs and targets `[*L, B, ...]`."""
    return {
        "x": random.normal(keys, "x", 0, (samples, features), torch.float64),
        "y": random.normal(keys, "y", 0, (samples,), torch.float64),
    }
