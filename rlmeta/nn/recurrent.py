"""Recurrent networks (RNN): Elman, LSTM and GRU cells, unrolled over sequences, and layers of them.

Sequences are time first, `[*L, T, B, ...]`. `begins` `[*L, T, B]` bool marks the first steps of episodes: the state is
reset to 0 before them, so that episodes in one row stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, require_choice, require_count
from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params
from rlmeta.nn.initialisers import parameter
from rlmeta.nn.linear import linear
from rlmeta.nn.product import is_plain_graph

CellName: TypeAlias = Literal["elman", "gru", "lstm"]
"""Name of a recurrent cell."""


class ElmanCell(Block):
    """Elman cell (Elman, 1990), the simple recurrent network, with the parameter names of `nn.RNNCell`.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    `weight_ih` `[*L, H, in]`, `weight_hh` `[*L, H, H]`, `bias_ih` and `bias_hh` `[*L, H]`.
    """

    parts = ("hidden",)
    """Names of the tensors of its state, `[*L, ..., H]` each."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 1, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """One step: `{"input": [*L, ..., in], "hidden": [*L, ..., H]}` -> the new `{"hidden": [*L, ..., H]}`."""
        gates = _input_gates(params, x["input"], prefix)
        return {"hidden": torch.tanh(gates + linear(x["hidden"], params[prefix + "weight_hh"], None))}

    def unroll(self, params: Params, x: Tree, begins: Tensor | None, prefix: str = "") -> Tree:
        """Unroll over sequences, as `GRUCell.unroll`."""
        weight, gates = params[prefix + "weight_hh"], _input_gates(params, x["input"], prefix)
        states = _elman(*_by_learner(gates, x["hidden"], begins), *_by_learner(weight, like=x["hidden"]))
        return {"hidden": states.reshape(*x["input"].shape[:-1], -1)}


class LSTMCell(Block):
    """LSTM cell (Hochreiter and Schmidhuber, 1997) with the parameter names and gate order of `nn.LSTMCell`.

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c')

    `weight_ih` `[*L, 4H, in]`, `weight_hh` `[*L, 4H, H]`, `bias_ih` and `bias_hh` `[*L, 4H]`.
    """

    parts = ("hidden", "cell")
    """Names of the tensors of its state, `[*L, ..., H]` each."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 4, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """One step: `{"input": [*L, ..., in], "hidden": [*L, ..., H], "cell": [*L, ..., H]}` -> new hidden, cell."""
        gates = _input_gates(params, x["input"], prefix)
        gates = gates + linear(x["hidden"], params[prefix + "weight_hh"], None)
        hidden, cell, *_ = _advance_lstm(gates, x["cell"])
        return {"hidden": hidden, "cell": cell}

    def unroll(self, params: Params, x: Tree, begins: Tensor | None, prefix: str = "") -> Tree:
        """Unroll over sequences, as `GRUCell.unroll`."""
        weight, gates = params[prefix + "weight_hh"], _input_gates(params, x["input"], prefix)
        gates, hidden, begins, cell = _by_learner(gates, x["hidden"], begins, x["cell"])
        tensors = (gates, hidden, cell, begins, *_by_learner(weight, like=x["hidden"]))
        states = _lstm(*tensors) if _is_plain() else _LSTM.apply(*tensors)  # type: ignore[no-untyped-call]
        hiddens, cells = (state.reshape(*x["input"].shape[:-1], -1) for state in states)
        return {"hidden": hiddens, "cell": cells}


class GRUCell(Block):
    """GRU cell (Cho et al., 2014) with the parameter names and gate order of `nn.GRUCell`.

    r, z, n = W_ih x + b_ih;  r', z', n' = W_hh h + b_hh
    c = tanh(n + σ(r + r') n');  h' = c + σ(z + z') (h - c)

    `weight_ih` `[*L, 3H, in]`, `weight_hh` `[*L, 3H, H]`, `bias_ih` and `bias_hh` `[*L, 3H]`.
    """

    parts = ("hidden",)
    """Names of the tensors of its state, `[*L, ..., H]` each."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        """Create the cell with torch's initial weights, uniform in ±1 / √H."""
        super().__init__()
        self.hidden_size = hidden_size
        _register(self, 3, in_features, hidden_size)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """One step: `{"input": [*L, ..., in], "hidden": [*L, ..., H]}` -> the new `{"hidden": [*L, ..., H]}`."""
        own = linear(x["hidden"], params[prefix + "weight_hh"], params[prefix + "bias_hh"])
        gates = linear(x["input"], params[prefix + "weight_ih"], params[prefix + "bias_ih"])
        return {"hidden": _advance_gru(gates, own, x["hidden"])[0]}

    def unroll(self, params: Params, x: Tree, begins: Tensor | None, prefix: str = "") -> Tree:
        """Unroll over sequences: the state after every step, its tensors `[*L, T, B, H]`.

        Args:
            params: this cell's tensors are those whose name starts with `prefix`.
            x: `input` `[*L, T, B, in]`, and the state before the first step, its tensors `[*L, B, H]`.
            begins: `[*L, T, B]` bool, set at the first step of an episode, before which the state is reset to 0; None
                for no reset.
            prefix: of this cell's names in `params`.
        """
        weight, bias = params[prefix + "weight_hh"], params[prefix + "bias_hh"].unsqueeze(-2)
        gates = linear(x["input"], params[prefix + "weight_ih"], params[prefix + "bias_ih"])
        tensors = (*_by_learner(gates, x["hidden"], begins), *_by_learner(weight, bias, like=x["hidden"]))
        states: Tensor = _gru(*tensors) if _is_plain() else _GRU.apply(*tensors)  # type: ignore[no-untyped-call]
        return {"hidden": states.reshape(*x["input"].shape[:-1], -1)}


CELLS: dict[CellName, type[ElmanCell | GRUCell | LSTMCell]] = {"elman": ElmanCell, "gru": GRUCell, "lstm": LSTMCell}
"""Cells by name."""


class Recurrent(Block):
    """Recurrent network of one or more layers, with the parameter names of `nn.RNN`, `nn.GRU` and `nn.LSTM`.

    Layer k reads the hidden states of layer k - 1. A bidirectional one (Schuster and Paliwal, 1997) reads whole
    sequences forwards and backwards, and its features are both hidden states.

    Its state is one tensor for each layer and part, `[*L, *rows, H]`: `hidden_l0`, of an LSTM `cell_l0`, and those of
    the backward cells `hidden_l0_reverse`.
    """

    def __init__(
        self, cell: CellName, in_features: int, hidden_size: int, layers: int = 1, bidirectional: bool = False
    ) -> None:
        """Create the network with torch's initial weights, uniform in ±1 / √H.

        Args:
            cell: "elman", "gru" or "lstm".
            in_features: size of the last axis of the input.
            hidden_size: H.
            layers: how many.
            bidirectional: whether every layer has a second cell, which reads backwards.

        Raises:
            SettingError: a cell of another name, or a number below 1.
        """
        super().__init__()
        require_choice("cell", cell, CellName)
        for name, count in (("in_features", in_features), ("hidden_size", hidden_size), ("layers", layers)):
            require_count(f"Recurrent: {name}", count)
        self.hidden_size, self.bidirectional = hidden_size, bidirectional
        self.features = (1 + bidirectional) * hidden_size
        sizes = [in_features, *[self.features] * (layers - 1)]
        directions = ("", "_reverse") if bidirectional else ("",)
        self._layers = [
            [(f"_l{k}{way}", CELLS[cell](size, hidden_size)) for way in directions] for k, size in enumerate(sizes)
        ]
        self._cell_names = tuple(self._layers[0][0][1]._parameters)
        for suffix, each in (pair for layer in self._layers for pair in layer):
            for name in self._cell_names:
                self.register_parameter(name + suffix, each._parameters[name])

    def initial(self, rows: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """State at the start of an episode: zeros for `rows` `[*L, *rows]`."""
        names = [part + suffix for layer in self._layers for suffix, cell in layer for part in cell.parts]
        return {name: torch.zeros(*rows, self.hidden_size, dtype=torch.float32, device=device) for name in names}

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Unroll over sequences from the initial state: `[*L, T, B, in]` -> features `[*L, T, B, D]`."""
        axes = params[f"{prefix}weight_hh_l0"].dim() - 2
        state = self.initial((*x.shape[:axes], x.shape[axes + 1]), x.device)
        return self.unroll(params, x, {name: value.to(x.dtype) for name, value in state.items()}, None, ctx, prefix)

    def step(
        self, params: Params, x: Tensor, state: dict[str, Tensor], ctx: Context, prefix: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: `[*L, *rows, in]` -> features `[*L, *rows, D]`, and the new state.

        Raises:
            SettingError: it is bidirectional, and one step does not say what follows.
        """
        if self.bidirectional:
            raise SettingError(
                "a bidirectional network reads whole sequences, it can't act step by step: use bidirectional=False"
            )
        new: dict[str, Tensor] = {}
        for ((suffix, cell),) in self._layers:
            inputs = {"input": x, **{part: state[part + suffix] for part in cell.parts}}
            after = cell.run(self._of_cell(params, prefix, suffix), inputs, ctx)
            new |= {part + suffix: value for part, value in after.items()}
            x = after["hidden"]
        return x, new

    def unroll(
        self,
        params: Params,
        x: Tensor,
        state: dict[str, Tensor],
        begins: Tensor | None,
        ctx: Context,
        prefix: str = "",
    ) -> Tensor:
        """Unroll over sequences: features `[*L, T, B, D]`; see `trace`."""
        return self.trace(params, x, state, begins, ctx, prefix)[0]

    def trace(
        self,
        params: Params,
        x: Tensor,
        state: dict[str, Tensor],
        begins: Tensor | None,
        ctx: Context,
        prefix: str = "",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Unroll over sequences: features `[*L, T, B, D]`, and the state after every step, `[*L, T, B, H]`.

        A backward cell has read the steps from the last to this one.

        Args:
            params: this block's tensors are those whose name starts with `prefix`.
            x: `[*L, T, B, in]`.
            state: before the first step, of backward cells after the last, `[*L, B, H]`.
            begins: first steps of episodes, `[*L, T, B]` bool; None for none.
            ctx: of no matter.
            prefix: of this block's names in `params`.
        """
        axes = params[f"{prefix}weight_hh_l0"].dim() - 2
        states: dict[str, Tensor] = {}
        for layer in self._layers:
            hidden = []
            for suffix, cell in layer:
                backwards = suffix.endswith("_reverse")
                inputs = {"input": x.flip(axes) if backwards else x}
                inputs |= {part: state[part + suffix] for part in cell.parts}
                resets = _seen_backwards(begins, axes) if backwards else begins
                after = cell.unroll(self._of_cell(params, prefix, suffix), inputs, resets)
                after = {part: value.flip(axes) for part, value in after.items()} if backwards else after
                states |= {part + suffix: value for part, value in after.items()}
                hidden.append(after["hidden"])
            x = hidden[0] if len(hidden) == 1 else torch.cat(hidden, -1)
        return x, states

    def peek(
        self,
        params: Params,
        x: Tensor,
        following: Tensor,
        state: dict[str, Tensor],
        begins: Tensor | None,
        ctx: Context,
        prefix: str = "",
    ) -> Tensor:
        """Features `[*L, T, B, D]` of what follows each step, as if the next step were to begin with it.

        That is `following` `[*L, T, B, in]`, in the episode of the step; the rest as in `trace`.
        """
        states = self.trace(params, x, state, begins, ctx, prefix)[1]
        return self.step(params, following, states, ctx, prefix)[0]

    def _of_cell(self, params: Params, prefix: str, suffix: str) -> Params:
        """Tensors of one cell, under the cell's own names."""
        return {name: params[prefix + name + suffix] for name in self._cell_names}


def _seen_backwards(begins: Tensor | None, axis: int) -> Tensor | None:
    """First steps of episodes read backwards, those before a `begins`, in the order of reading."""
    if begins is None:
        return None
    back = begins.flip(axis)
    return torch.cat((torch.zeros_like(back.narrow(axis, 0, 1)), back.narrow(axis, 0, back.shape[axis] - 1)), axis)


def _is_plain() -> bool:
    """Whether a loop of plain operations is unrolled: nothing is differentiated, or more than a node provides."""
    return not torch.is_grad_enabled() or is_plain_graph() or torch._C._are_functorch_transforms_active()


def _by_learner(first: Tensor, *others: Tensor | None, like: Tensor | None = None) -> list[Any]:
    """Fold the learner axes of tensors into one: `[*L, ...]` -> `[S, ...]`; flags get an axis of features.

    Args:
        first: input gates with the state as the second tensor, or weights.
        others: further tensors; None stays None.
        like: a state `[*L, B, H]`, which has two axes behind the learners'; by default the second tensor.
    """
    state = others[0] if like is None else like
    assert state is not None
    shape = state.shape[:-2]
    tensors = [x.unsqueeze(-1) if x is not None and x.dtype == torch.bool else x for x in (first, *others)]
    return [None if x is None else x.reshape(shape.numel(), *x.shape[len(shape) :]) for x in tensors]


def _input_gates(params: Params, x: Tensor, prefix: str) -> Tensor:
    """Contribution of the input and of both biases to the gates, for all steps at once."""
    return linear(x, params[prefix + "weight_ih"], params[prefix + "bias_ih"] + params[prefix + "bias_hh"])


def _elman(gates: Tensor, hidden: Tensor, begins: Tensor | None, weight: Tensor) -> Tensor:
    """Unrolled Elman cell by a loop over time: `[S, T, B, H]`, `[S, B, H]`, flags, `[S, H, H]` -> `[S, T, B, H]`."""
    states = []
    for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
        hidden = hidden if begin is None else hidden.masked_fill(begin, 0.0)
        hidden = torch.tanh(torch.baddbmm(gate, hidden, weight.mT))
        states.append(hidden)
    return torch.stack(states, 1)


# ---------------------------------------------------------------------- LSTM


def _advance_lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LSTM step from the gates `[..., 4H]` and the cell `[..., H]`.

    Returns:
        The new hidden state and cell, and of the gates: input and forget `[..., 2H]`, candidate, output, and tanh c'.
    """
    size = cell.shape[-1]
    switches, output = torch.sigmoid(gates[..., : 2 * size]), torch.sigmoid(gates[..., 3 * size :])
    candidate = torch.tanh(gates[..., 2 * size : 3 * size])
    enter, stay = switches.chunk(2, -1)
    cell = torch.addcmul(enter * candidate, stay, cell)
    squashed = torch.tanh(cell)
    return output * squashed, cell, switches, candidate, output, squashed


def _lstm(gates: Tensor, hidden: Tensor, cell: Tensor, begins: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unrolled LSTM by a loop over time.

    Args:
        gates: contribution of the inputs and biases, `[S, T, B, 4H]`.
        hidden: initial hidden state, `[S, B, H]`.
        cell: initial cell, `[S, B, H]`.
        begins: `[S, T, B, 1]` bool, set where the state is reset before the step; None for no reset.
        weight: `[S, 4H, H]`.

    Returns:
        Hidden states and cells, `[S, T, B, H]`.
    """
    hiddens, cells = [], []
    for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
        if begin is not None:
            hidden, cell = hidden.masked_fill(begin, 0.0), cell.masked_fill(begin, 0.0)
        hidden, cell, *_ = _advance_lstm(torch.baddbmm(gate, hidden, weight.mT), cell)
        hiddens.append(hidden)
        cells.append(cell)
    return torch.stack(hiddens, 1), torch.stack(cells, 1)


class _LSTM(torch.autograd.Function):
    """Unrolled LSTM as one autograd node, which computes the weights' gradient over all steps in one product."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, hidden: Tensor, cell: Tensor, begins: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Forward pass that saves the previous state and the gates of every step."""
        hiddens, cells, kept = [], [], []
        now, held = hidden, cell
        for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
            if begin is not None:
                now, held = now.masked_fill(begin, 0.0), held.masked_fill(begin, 0.0)
            kept += [now, held]
            now, held, *opened = _advance_lstm(torch.baddbmm(gate, now, weight.mT), held)
            kept += opened
            hiddens.append(now)
            cells.append(held)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, hidden, cell, begins, weight, *kept)
        return torch.stack(hiddens, 1), torch.stack(cells, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Backpropagation through time; by autograd where the gradient is itself differentiated."""
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():
            return _LSTM._differentiable(grads, *inputs)
        gates, _, _, begins, weight = inputs
        steps = gates.shape[1]
        forget = _of_steps(begins, steps)
        of_hidden: Tensor | None = None
        of_cell: Tensor | None = None
        gate_grads: list[Tensor] = []
        for t in reversed(range(steps)):
            _, before, switches, candidate, output, squashed = kept[6 * t : 6 * t + 6]
            enter, stay = switches.chunk(2, -1)
            here = _sum(None if grads[0] is None else grads[0][:, t], of_hidden)
            inner = _sum(None if grads[1] is None else grads[1][:, t], of_cell)
            if here is None:
                here = torch.zeros_like(before)
            inner = _sum(torch.ops.aten.tanh_backward(here * output, squashed), inner)
            assert inner is not None
            both = torch.ops.aten.sigmoid_backward(torch.cat((inner * candidate, inner * before), -1), switches)
            new = torch.ops.aten.tanh_backward(inner * enter, candidate)
            gate_grads.append(torch.cat((both, new, torch.ops.aten.sigmoid_backward(here * squashed, output)), -1))
            of_hidden, of_cell = torch.bmm(gate_grads[-1], weight), inner * stay
            begin = forget[t]
            if begin is not None:
                of_hidden, of_cell = of_hidden.masked_fill(begin, 0.0), of_cell.masked_fill(begin, 0.0)
        down, states = torch.cat(gate_grads, 1), [kept[6 * t] for t in reversed(range(steps))]
        return torch.stack(gate_grads[::-1], 1), of_hidden, of_cell, None, torch.bmm(down.mT, torch.cat(states, 1))

    @staticmethod
    def _differentiable(grads: Sequence[Tensor | None], *inputs: Tensor | None) -> Any:
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        pairs = [(out, grad) for out, grad in zip(_lstm(*inputs), grads) if grad is not None]  # type: ignore[arg-type]
        outputs, downs = [out for out, _ in pairs], [grad for _, grad in pairs]
        gradients = iter(torch.autograd.grad(outputs, wanted, downs, create_graph=True, allow_unused=True))
        return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients; None stands for 0."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


# ---------------------------------------------------------------------- GRU


def _advance_gru(gates: Tensor, own: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _gru(gates: Tensor, hidden: Tensor, begins: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
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
        hidden, _, _ = _advance_gru(gate, torch.baddbmm(bias, hidden, weight.mT), hidden)
        states.append(hidden)
    return torch.stack(states, 1)


def _of_steps(begins: Tensor | None, steps: int) -> Sequence[Tensor | None]:
    return [None] * steps if begins is None else begins.unbind(1)


class _GRU(torch.autograd.Function):
    """Unrolled GRU as one autograd node, which computes the weights' gradient over all steps in one product."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, hidden: Tensor, begins: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """Forward pass that saves the previous state, the gates and the candidate of every step."""
        states, kept, now = [], [], hidden
        for gate, begin in zip(gates.unbind(1), _of_steps(begins, gates.shape[1])):
            before = now if begin is None else now.masked_fill(begin, 0.0)
            own = torch.baddbmm(bias, before, weight.mT)
            now, switches, candidate = _advance_gru(gate, own, before)
            states.append(now)
            kept += [before, own, switches, candidate]
        ctx.save_for_backward(gates, hidden, begins, weight, bias, *kept)
        return torch.stack(states, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Backpropagation through time; by autograd where the gradient is itself differentiated."""
        inputs, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():
            return _GRU._differentiable(grad, *inputs)
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
        gradients = iter(torch.autograd.grad(_gru(*inputs), wanted, grad, create_graph=True))  # type: ignore[arg-type]
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
