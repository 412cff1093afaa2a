"""Recurrent cells."""

from __future__ import annotations

import math

import torch
from torch import nn

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
        bound = 1.0 / math.sqrt(hidden_size)
        shapes = {
            "weight_ih": (4 * hidden_size, in_features),
            "weight_hh": (4 * hidden_size, hidden_size),
            "bias_ih": (4 * hidden_size,),
            "bias_hh": (4 * hidden_size,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))
            nn.init.uniform_(self.get_parameter(name), -bound, bound)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """`{"input": [*L, ..., in], "hidden": [*L, ..., H], "cell": [*L, ..., H]}` -> the new `hidden` and `cell`."""
        bias = params[prefix + "bias_ih"] + params[prefix + "bias_hh"]
        gates = linear(x["input"], params[prefix + "weight_ih"], bias)
        gates = gates + linear(x["hidden"], params[prefix + "weight_hh"], None)
        i, f, g, o = gates.chunk(4, -1)
        cell = torch.sigmoid(f) * x["cell"] + torch.sigmoid(i) * torch.tanh(g)
        return {"hidden": torch.sigmoid(o) * torch.tanh(cell), "cell": cell}
