"""A learned optimizer: an LSTM that turns each weight's gradient into its update (Andrychowicz et al., 2016)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlmeta.functional.optim import Optimizer, State, Tensors
from rlmeta.nn import Block, Context, Linear, Params
from rlmeta.nn.recurrent import LSTMCell

# ---------------------------------------------------------------------- the optimizer


def log_and_sign(gradient: Tensor, k: float = 10.0) -> Tensor:
    """A gradient of any size as two numbers of moderate size, `[...]` -> `[..., 2]`.

    (log |g| / k, sign g) where |g| ≥ e^(−k), else (−1, e^k g); continuous, and finite at 0. (Appendix A.)
    """
    magnitude = gradient.abs()
    large = magnitude >= math.exp(-k)
    logarithm = torch.where(large, magnitude.clamp(min=math.exp(-k)).log() / k, -1.0)
    return torch.stack([logarithm, torch.where(large, gradient.sign(), math.exp(k) * gradient)], -1)


class CoordinateLSTM(Block):
    """Layers of LSTM cells and a linear layer, run on every coordinate with the same weights.

    Args:
        hidden_sizes: of the cells; () leaves the linear layer alone.
        features: numbers that describe a gradient.
        zero: begin with updates of 0.
    """

    def __init__(self, hidden_sizes: tuple[int, ...] = (20, 20), features: int = 2, zero: bool = False) -> None:
        super().__init__()
        self.hidden_sizes = hidden_sizes
        sizes = [features, *hidden_sizes]
        self.cells = nn.ModuleList(LSTMCell(size, hidden) for size, hidden in zip(sizes, hidden_sizes))
        self.output = Linear(sizes[-1], 1)
        if zero:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def run(self, params: Params, x: Any, ctx: Context, prefix: str = "") -> Any:
        """`{"input": [*L, B, features], "0": {hidden, cell}, ...}` -> `{"output": [*L, B], "0": ...}`."""
        value, found = x["input"], {}
        for i, cell in enumerate(self.cells):
            found[str(i)] = cell.run(params, {"input": value, **x[str(i)]}, ctx, f"{prefix}cells.{i}.")  # type: ignore[operator]
            value = found[str(i)]["hidden"]
        return {"output": self.output.run(params, value, ctx, f"{prefix}output.").squeeze(-1), **found}


def learned_optimizer(
    network: CoordinateLSTM, theta: Params, *, output_scale: float = 0.1, k: float = 10.0
) -> Optimizer:
    """The optimizer with meta-parameters θ: Δᵢ = output_scale · LSTM(log_and_sign(gᵢ), stateᵢ; θ) for each weight i.

    An optimizer like any of `functional.optim`. θ has the first axes of the weights' learner axes: with θ `[S, ...]`
    and weights `[S, K, ...]` every learner optimizes K problems. Gradients count as constants (the problem's second
    derivatives are left out, as in the paper); what an update did to θ's gradient goes through the LSTM's state and
    the sum of the updates.

    Args:
        network: the LSTM.
        theta: its weights, `{name: [*L', ...]}`.
        output_scale: factor of the updates.
        k: of `log_and_sign`.
    """
    axes = theta["output.bias"].dim() - 1

    def init(params: Tensors, learner_shape: Any = ()) -> State:
        learner_shape = tuple(learner_shape)
        first = next(iter(params.values()))
        size = sum(value.shape[len(learner_shape) :].numel() for value in params.values())
        count = torch.zeros(learner_shape, dtype=torch.int64, device=first.device)
        cells: State = {}
        for i, hidden in enumerate(network.hidden_sizes):
            zero = first.new_zeros((*learner_shape, size, hidden))
            cells[str(i)] = {"hidden": zero, "cell": zero.clone()}
        return {"count": count, **cells}

    def update(grads: Tensors, state: State, params: Tensors) -> tuple[Tensors, State]:
        shape = state["count"].shape
        flat = torch.cat([g.detach().reshape(*shape, -1) for g in grads.values()], -1)
        rows = shape[axes:].numel() * flat.shape[-1]

        def fold(x: Tensor) -> Tensor:  # [*L, P, H] -> [*L', rows, H]
            return x.reshape(*shape[:axes], rows, x.shape[-1])

        memory = {
            str(i): {name: fold(value) for name, value in state[str(i)].items()}
            for i in range(len(network.hidden_sizes))
        }
        found = network.run(theta, {"input": fold(log_and_sign(flat, k)), **memory}, Context())
        move = (output_scale * found.pop("output")).reshape(flat.shape)
        pieces = torch.split(move, [g.shape[len(shape) :].numel() for g in grads.values()], -1)
        updates = {name: piece.reshape(g.shape) for (name, g), piece in zip(grads.items(), pieces)}
        cells = {
            i: {name: value.reshape(*shape, -1, value.shape[-1]) for name, value in cell.items()}
            for i, cell in found.items()
        }
        return updates, {"count": state["count"] + 1, **cells}

    return Optimizer(init, update)


class TorchLearnedOptimizer(torch.optim.Optimizer):
    """A learned optimizer in torch's form, for the parameters of any module.

    Args:
        params: as every `torch.optim` optimizer takes them.
        network: the LSTM.
        theta: its weights, of one learner.
        output_scale: factor of the updates.
        k: of `log_and_sign`.
    """

    def __init__(
        self, params: Any, network: CoordinateLSTM, theta: Params, *, output_scale: float = 0.1, k: float = 10.0
    ) -> None:
        super().__init__(params, {})
        self._optimizer = learned_optimizer(network, theta, output_scale=output_scale, k=k)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                named, memory = {"p": parameter}, self.state[parameter]
                if not memory:
                    memory.update(_flat(self._optimizer.init(named)))
                updates, new = self._optimizer.update({"p": parameter.grad}, _nested(memory), named)
                parameter.add_(updates["p"])
                memory.update(_flat(new))
        return loss


def _flat(state: State) -> dict[str, Tensor]:
    """The state by one name each, as torch's `state_dict` keeps it."""
    cells = {f"{i}.{name}": value for i, cell in state.items() if i != "count" for name, value in cell.items()}
    return {"step": state["count"], **cells}


def _nested(flat: dict[str, Tensor]) -> State:
    state: State = {"count": flat["step"]}
    for name, value in flat.items():
        if name != "step":
            i, part = name.split(".")
            state.setdefault(i, {})[part] = value
    return state
