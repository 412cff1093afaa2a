"""Recurrent cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import linear


class LSTMCell(Block):
    """One step of long short-term memory (Hochreiter and Schmidhuber, 1997), named and ordered as `nn.LSTMCell`.

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c')

    `weight_ih` `[*L, 4H, in]`, `weight_hh` `[*L, 4H, H]`, `bias_ih` and `bias_hh` `[*L, 4H]`.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 4, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """`{"input": [*L, ..., in], "hidden": [*L, ..., H], "cell": [*L, ..., H]}` -> the new `hidden` and `cell`."""
        bias = params[prefix + "bias_ih"] + params[prefix + "bias_hh"]
        gates = linear(x["input"], params[prefix + "weight_ih"], bias)
        gates = gates + linear(x["hidden"], params[prefix + "weight_hh"], None)
        i, f, g, o = gates.chunk(4, -1)
        cell = torch.sigmoid(f) * x["cell"] + torch.sigmoid(i) * torch.tanh(g)
        return {"hidden": torch.sigmoid(o) * torch.tanh(cell), "cell": cell}


class GRUCell(Block):
    """One step of a gated recurrent unit (Cho et al., 2014), named and ordered as `nn.GRUCell`.

    r, z, n = W_ih x + b_ih;  r', z', n' = W_hh h + b_hh
    c = tanh(n + σ(r + r') n');  h' = c + σ(z + z') (h - c)

    `weight_ih` `[*L, 3H, in]`, `weight_hh` `[*L, 3H, H]`, `bias_ih` and `bias_hh` `[*L, 3H]`.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 3, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """`{"input": [*L, ..., in], "hidden": [*L, ..., H]}` -> the new hidden state `[*L, ..., H]`."""
        return self._advance(params, self._gates(params, x["input"], prefix), x["hidden"], prefix)

    def unroll(self, params: Params, x: Tensor, hidden: Tensor, begins: Tensor | None, prefix: str = "") -> Tensor:
        """The hidden state after every step of sequences `[*L, T, B, H]`, each step's from the one before it.

        Args:
            params: this cell's tensors are those whose name starts with `prefix`.
            x: `[*L, T, B, in]`.
            hidden: before the first step, `[*L, B, H]`.
            begins: `[*L, T, B]` bool: the step is the first of an episode, so that the state before it is 0; None:
                none is.
            prefix: this cell's place in `params`.
        """
        axes, states = hidden.dim() - 2, []
        forget = [None] * x.shape[axes] if begins is None else begins.unsqueeze(-1).unbind(axes)
        for gates, begin in zip(self._gates(params, x, prefix).unbind(axes), forget):
            hidden = hidden if begin is None else hidden.masked_fill(begin, 0.0)
            hidden = self._advance(params, gates, hidden, prefix)
            states.append(hidden)
        return torch.stack(states, axes)

    def _gates(self, params: Params, x: Tensor, prefix: str) -> Tensor:
        """What the input adds to the gates, `[*L, ..., 3H]`: of all steps at once."""
        return linear(x, params[prefix + "weight_ih"], params[prefix + "bias_ih"])

    def _advance(self, params: Params, gates: Tensor, hidden: Tensor, prefix: str) -> Tensor:
        own = linear(hidden, params[prefix + "weight_hh"], params[prefix + "bias_hh"])
        size = self.hidden_size
        switches = torch.sigmoid(gates[..., : 2 * size] + own[..., : 2 * size])
        reset, update = switches.chunk(2, -1)
        candidate = torch.tanh(torch.addcmul(gates[..., 2 * size :], reset, own[..., 2 * size :]))
        return torch.lerp(candidate, hidden, update)


def _register(cell: Block, gates: int, in_features: int, hidden_size: int) -> None:
    """The parameters of a cell of so many gates, uniform in ±1 / √H."""
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
