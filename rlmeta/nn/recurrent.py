"""Recurrent cells: LSTM and GRU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import linear
from rlmeta.nn.product import is_plain_graph


class LSTMCell(Block):
    """LSTM cell (Hochreiter and Schmidhuber, 1997) with the parameter names and gate order of `nn.LSTMCell`.

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c')

    `weight_ih` `[*L, 4H, in]`, `weight_hh` `[*L, 4H, H]`, `bias_ih` and `bias_hh` `[*L, 4H]`.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 4, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """One step: `{"input": [*L, ..., in], "hidden": [*L, ..., H], "cell": [*L, ..., H]}` -> new hidden, cell."""
        bias = params[prefix + "bias_ih"] + params[prefix + "bias_hh"]
        gates = linear(x["input"], params[prefix + "weight_ih"], bias)
        gates = gates + linear(x["hidden"], params[prefix + "weight_hh"], None)
        i, f, g, o = gates.chunk(4, -1)
        cell = torch.sigmoid(f) * x["cell"] + torch.sigmoid(i) * torch.tanh(g)
        return {"hidden": torch.sigmoid(o) * torch.tanh(cell), "cell": cell}


class GRUCell(Block):
    """GRU cell (Cho et al., 2014) with the parameter names and gate order of `nn.GRUCell`.

    r, z, n = W_ih x + b_ih;  r', z', n' = W_hh h + b_hh
    c = tanh(n + σ(r + r') n');  h' = c + σ(z + z') (h - c)

    `weight_ih` `[*L, 3H, in]`, `weight_hh` `[*L, 3H, H]`, `bias_ih` and `bias_hh` `[*L, 3H]`.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        _register(self, 3, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """One step: `{"input": [*L, ..., in], "hidden": [*L, ..., H]}` -> the new hidden state `[*L, ..., H]`."""
        own = linear(x["hidden"], params[prefix + "weight_hh"], params[prefix + "bias_hh"])
        return _advance(self._gates(params, x["input"], prefix), own, x["hidden"])[0]

    def unroll(self, params: Params, x: Tensor, hidden: Tensor, begins: Tensor | None, prefix: str = "") -> Tensor:
        """Unroll over sequences: the hidden state after every step, `[*L, T, B, H]`.

        Args:
            params: this cell's tensors are those whose name starts with `prefix`.
            x: `[*L, T, B, in]`.
            hidden: before the first step, `[*L, B, H]`.
            begins: `[*L, T, B]` bool, set at the first step of an episode, before which the hidden state is reset to 0;
                None for no reset.
            prefix: of this cell's names in `params`.
        """
        axes = hidden.dim() - 2
        weight, bias = params[prefix + "weight_hh"], params[prefix + "bias_hh"]
        learners = weight.shape[:axes].numel()
        gates = self._gates(params, x, prefix)
        tensors = (
            gates.reshape(learners, *gates.shape[axes:]),
            hidden.reshape(learners, *hidden.shape[axes:]),
            None if begins is None else begins.reshape(learners, *begins.shape[axes:], 1),
            weight.reshape(learners, *weight.shape[axes:]),
            bias.reshape(learners, 1, -1),
        )
        plain = not torch.is_grad_enabled() or is_plain_graph() or torch._C._are_functorch_transforms_active()
        states: Tensor = _unrolled(*tensors) if plain else _Unrolled.apply(*tensors)  # type: ignore[no-untyped-call]
        return states.reshape(*x.shape[:-1], -1)

    def _gates(self, params: Params, x: Tensor, prefix: str) -> Tensor:
        """Contribution of the input to the gates, `[*L, ..., 3H]`, for all steps at once."""
        return linear(x, params[prefix + "weight_ih"], params[prefix + "bias_ih"])


def _advance(gates: Tensor, own: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GRU step from the contributions of input and state to the gates.

    Args:
        gates: contribution of the input, `[..., 3H]`.
        own: contribution of the hidden state, `[..., 3H]`.
        hidden: `[..., H]`.

    Returns:
        The new hidden state `[..., H]`, reset and update gates `[..., 2H]`, and the candidate `[..., H]`.
    """
    size = hidden.shape[-1]
    switches = torch.sigmoid(gates[..., : 2 * size] + own[..., : 2 * size])
    reset, update = switches.chunk(2, -1)
    candidate = torch.tanh(torch.addcmul(gates[..., 2 * size :], reset, own[..., 2 * size :]))
    return torch.lerp(candidate, hidden, update), switches, candidate


def _unrolled(gates: Tensor, hidden: Tensor, begins: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Unrolled GRU by a loop over time.

    Args:
        gates: contribution of the inputs, `[S, T, B, 3H]`.
        hidden: initial state, `[S, B, H]`.
        begins: `[S, T, B, 1]` bool, set where the state is reset before the step; None for no reset.
        weight: `[S, 3H, H]`.
        bias: `[S, 1, 3H]`.

    Returns:
        States, `[S, T, B, H]`
    """
    states = []
    for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
        hidden = hidden if begin is None else hidden.masked_fill(begin, 0.0)
        hidden, _, _ = _advance(gate, torch.baddbmm(bias, hidden, weight.mT), hidden)
        states.append(hidden)
    return torch.stack(states, 1)


def _of_steps(begins: Tensor | None, steps: int) -> Sequence[Tensor | None]:
    return [None] * steps if begins is None else begins.unbind(1)


class _Unrolled(torch.autograd.Function):
    """Unrolled GRU as one autograd node, which computes the weights' gradient over all steps in one product."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, hidden: Tensor, begins: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Forward pass that saves the previous state, the gates and the candidate of every step."""
        states, kept, now = [], [], hidden
        for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
            before = now if begin is None else now.masked_fill(begin, 0.0)
            own = torch.baddbmm(bias, before, weight.mT)
            now, switches, candidate = _advance(gate, own, before)
            states.append(now)
            kept += [before, own, switches, candidate]
        ctx.save_for_backward(gates, hidden, begins, weight, bias, *kept)
        return torch.stack(states, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Backpropagation through time; by autograd where the gradient is itself differentiated."""
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():
            return _Unrolled._differentiable(grad, *inputs)
        gates, hidden, begins, weight, _ = inputs
        size, steps = hidden.shape[-1], gates.shape[1]
        forget, carry = _of_steps(begins, steps), None
        own_grads: list[Tensor] = []
        gate_grads: list[Tensor] = []
        for t in reversed(range(steps)):
            before, own, switches, candidate = kept[4 * t : 4 * t + 4]
            reset, update = switches.chunk(2, -1)
            here = grad[:, t] if carry is None else grad[:, t] + carry
            through = here * update
            inner = torch.ops.aten.tanh_backward(here - through, candidate)
            both = torch.cat((inner * own[..., 2 * size :], here * (before - candidate)), -1)
            both = torch.ops.aten.sigmoid_backward(both, switches)
            own_grads.append(torch.cat((both, inner * reset), -1))
            gate_grads.append(torch.cat((both, inner), -1))
            carry = torch.baddbmm(through, own_grads[-1], weight)
            begin = forget[t]
            carry = carry if begin is None else carry.masked_fill(begin, 0.0)
        down = torch.cat(own_grads, 1)
        weight_grad = torch.bmm(down.mT, torch.cat([kept[4 * t] for t in reversed(range(steps))], 1))
        return torch.stack(gate_grads[::-1], 1), carry, None, weight_grad, down.sum(1, keepdim=True)

    @staticmethod
    def _differentiable(grad: Tensor, *inputs: Tensor | None) -> Any:
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(_unrolled(*inputs), wanted, grad, create_graph=True))  # type: ignore[arg-type]
        return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


def _register(cell: Block, gates: int, in_features: int, hidden_size: int) -> None:
    """Register the parameters of a cell with `gates` gates, uniform in ±1 / √H."""
    bound = 1.0 / math.sqrt(hidden_size)
    shapes = {
        "weight_ih": (gates * hidden_size, in_features),
        "weight_hh": (gates * hidden_size, hidden_size),
        "bias_ih": (gates * hidden_size,),
        "bias_hh": (gates * hidden_size,),
    }
    for name, shape in shapes.items():
        cell.register_parameter(name, parameter(*shape))
        nn.init.uniform_(cell.get_parameter(name), -bound, bound)
