"""Attention: multi-head attention, positional encodings, Transformer layers, and a memory of the last steps.

Sequences are batch first, `[*L, ..., T, D]`, but those of a memory, which are time first, as of every memory. A mask is
bool, `[..., T, S]`, set where query t may look at key s: causal, of a window, of the edges of a graph, or of episodes.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, require_choice, require_count
from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params, between, learner_axes
from rlmeta.nn.initialisers import initialise, parameter
from rlmeta.nn.linear import Linear, linear
from rlmeta.nn.norm import LayerNorm

NormPlace: TypeAlias = Literal["post", "pre"]
"""Whether a Transformer layer normalises behind a residual connection, as at first, or the input of a sub-layer."""

PositionName: TypeAlias = Literal["none", "sinusoidal", "learned", "rotary"]
"""Name of a positional encoding."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, softmax(q kᵀ / √d) v.

    Args:
        query: `[..., T, d]`.
        key: `[..., S, d]`.
        value: `[..., S, e]`.
        mask: bool `[..., T, S]`, set where a query may look; None for everywhere. A query that may look nowhere, such
            as a node of a graph without edges, gives 0.

    Returns:
        `[..., T, e]`

    Source: Vaswani et al., "Attention is all you need", 2017.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is None:
        return scores.softmax(-1) @ value
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).masked_fill(~mask.any(-1, keepdim=True), 0.0)


def causal_mask(steps: int, window: int | None = None, device: torch.device | None = None) -> Tensor:
    """Causal mask `[T, T]`: step t looks at those up to itself, truncated to itself and the `window` before it."""
    step = torch.arange(steps, device=device)
    back = step.unsqueeze(-1) - step
    return back >= 0 if window is None else (back >= 0) & (back <= window)


def episode_mask(begins: Tensor) -> Tensor:
    """Mask of episodes, `[..., T, T]`: steps look at those of their own; `begins` `[..., T]` marks first steps."""
    episode = begins.cumsum(-1)
    return episode.unsqueeze(-1) == episode.unsqueeze(-2)


# ---------------------------------------------------------------------- positions


def sinusoidal_positions(positions: Tensor, features: int) -> Tensor:
    """Sinusoidal positional encoding of Vaswani et al. (2017), to be added to features.

    PE(p, 2i) = sin(p / 10000^(2i / D)),  PE(p, 2i + 1) = cos(p / 10000^(2i / D))

    Args:
        positions: numbers `[...]`.
        features: D, even.

    Returns:
        `[..., D]`, float32
    """
    angles = _angles(positions, features)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positional encoding (Su et al., 2021): the product of two rotated features knows their distance alone.

    Feature i and feature i + D/2 are turned by the angle p / 10000^(2i / D).

    Args:
        x: queries or keys, `[..., T, D]`, D even.
        positions: p, numbers `[T]`.

    Returns:
        `[..., T, D]`
    """
    angles = _angles(positions, x.shape[-1])
    angles = torch.cat((angles, angles), -1).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def _angles(positions: Tensor, features: int) -> Tensor:
    """Angles p / 10000^(2i / D), `[..., D / 2]` float64."""
    powers = torch.arange(0, features, 2, device=positions.device, dtype=torch.float64) / features
    angles: Tensor = positions.unsqueeze(-1).double() * torch.exp(-math.log(10_000.0) * powers)
    return angles


class LearnedPositions(Block):
    """Learned positional encoding: a vector for each of the first places, added to features `[*L, ..., T, D]`.

    `weight` is `[*L, length, D]`.
    """

    def __init__(self, length: int, features: int) -> None:
        """Create vectors for `length` places, small and normally distributed."""
        super().__init__()
        require_count("LearnedPositions: length", length)
        self.weight = parameter(length, features)
        nn.init.normal_(self.weight, std=0.02)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Add the vectors of the first T places.

        Raises:
            SettingError: the sequence is longer than the places.
        """
        weight = params[prefix + "weight"]
        steps, length = x.shape[-2], weight.shape[-2]
        if steps > length:
            raise SettingError(f"a sequence of {steps} steps has more than the {length} learned positions: give more")
        return x + between(weight[..., :steps, :], x, weight.dim() - 2)


# ---------------------------------------------------------------------- layers


class MultiHeadAttention(Block):
    """Multi-head attention (Vaswani et al., 2017) with the parameter names of `nn.MultiheadAttention`.

    `in_proj_weight` `[*L, 3D, D]` and `in_proj_bias` `[*L, 3D]` of queries, keys and values, `out_proj`.
    """

    def __init__(self, features: int, heads: int, rotary: bool = False) -> None:
        """Create the layer with torch's initial weights.

        Args:
            features: D.
            heads: how many; divides D.
            rotary: whether queries and keys are rotated by their positions.

        Raises:
            SettingError: the features don't divide into the heads, or, for rotary positions, into pairs.
        """
        super().__init__()
        require_count("MultiHeadAttention: heads", heads)
        if features % heads or (rotary and features // heads % 2):
            raise SettingError(
                f"attention over {features} features has {heads} heads, expected a number that divides them"
                f"{', into an even number for each, to be rotated in pairs' if rotary else ''}"
            )
        self.heads, self.rotary = heads, rotary
        self.in_proj_weight = parameter(3 * features, features)
        self.in_proj_bias = parameter(3 * features)
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = Linear(features, features)
        nn.init.zeros_(self.out_proj.bias)  # type: ignore[arg-type]

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Attend: `[*L, ..., T, D]` to itself, or a dictionary of inputs.

        Args:
            params: this block's tensors are those whose name starts with `prefix`.
            x: `query` `[*L, ..., T, D]`; `key` and `value` `[*L, ..., S, D]`, by default the query and the key;
                `mask` bool `[..., T, S]`, for all heads; `positions` `[S]` of the keys for rotary ones, by default
                0, 1, ..., of which the queries have the last T.
            ctx: of no matter.
            prefix: of this block's names in `params`.

        Returns:
            `[*L, ..., T, D]`
        """
        inputs: dict[str, Tensor] = x if isinstance(x, dict) else {"query": x}
        query = inputs["query"]
        key = inputs.get("key", query)
        value = inputs.get("value", key)
        q, k, v = self._projected(params, prefix, query, key, value)
        if self.rotary:
            places = inputs.get("positions")
            places = torch.arange(k.shape[-2], device=k.device) if places is None else places
            q, k = rotate(q, places[k.shape[-2] - q.shape[-2] :]), rotate(k, places)
        mask = inputs.get("mask")
        out = attention(q, k, v, None if mask is None else mask.unsqueeze(-3))
        joined = out.transpose(-3, -2).flatten(-2)
        return linear(joined, params[f"{prefix}out_proj.weight"], params[f"{prefix}out_proj.bias"])

    def _projected(self, params: Params, prefix: str, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project to the queries, keys and values of every head, `[*L, ..., heads, T or S, d]`, by few products."""
        weight, bias = params[f"{prefix}in_proj_weight"], params[f"{prefix}in_proj_bias"]
        size = query.shape[-1]
        if key is query and value is key:
            parts = linear(query, weight, bias).chunk(3, -1)
        elif value is key:
            both = linear(key, weight[..., size:, :], bias[..., size:]).chunk(2, -1)
            parts = (linear(query, weight[..., :size, :], bias[..., :size]), *both)
        else:
            each = zip((query, key, value), weight.chunk(3, -2), bias.chunk(3, -1))
            parts = tuple(linear(*tensors) for tensors in each)
        return [part.reshape(*part.shape[:-1], self.heads, -1).transpose(-3, -2) for part in parts]


class TransformerLayer(Block):
    """Transformer layer, self-attention and a feed-forward network, with the names of `nn.TransformerEncoderLayer`.

    post (Vaswani et al., 2017): x = norm1(x + attention(x));  x = norm2(x + feedforward(x))
    pre (Xiong et al., 2020): x = x + attention(norm1(x));  x = x + feedforward(norm2(x))
    """

    def __init__(
        self, features: int, heads: int, feedforward: int, norm: NormPlace = "post", rotary: bool = False
    ) -> None:
        """Create the layer; `feedforward` is the number of hidden units, and `rotary` as of `MultiHeadAttention`."""
        super().__init__()
        require_choice("norm", norm, NormPlace)
        self.norm_first = norm == "pre"
        self.self_attn = MultiHeadAttention(features, heads, rotary)
        self.linear1, self.linear2 = Linear(features, feedforward), Linear(feedforward, features)
        self.norm1, self.norm2 = LayerNorm(features), LayerNorm(features)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the layer to `[*L, ..., T, D]`, or to `{"input": ..., "mask": [..., T, T]}`."""
        x, mask = (x["input"], x.get("mask")) if isinstance(x, dict) else (x, None)
        seen = self.norm1.run(params, x, ctx, f"{prefix}norm1.") if self.norm_first else x
        given = {"query": seen} if mask is None else {"query": seen, "mask": mask}
        x = x + self.self_attn.run(params, given, ctx, f"{prefix}self_attn.")
        x = x if self.norm_first else self.norm1.run(params, x, ctx, f"{prefix}norm1.")
        seen = self.norm2.run(params, x, ctx, f"{prefix}norm2.") if self.norm_first else x
        x = x + _feedforward(params, seen, prefix)
        return x if self.norm_first else self.norm2.run(params, x, ctx, f"{prefix}norm2.")


class Gate(Block):
    """Gated residual connection of GTrXL (Parisotto et al., 2019): a GRU that is close to the identity at first.

    r = σ(W_r y + U_r x);  z = σ(W_z y + U_z x - b);  c = tanh(W_c y + U_c (r x));  out = x + z (c - x)

    `weight_new` `[*L, 3D, D]` is W of r, z and c, `weight_old` U, `bias` `[*L, D]` is b, 2 at first.
    """

    def __init__(self, features: int) -> None:
        """Create the gate, with torch's initial weights of a linear layer."""
        super().__init__()
        self.weight_new, self.weight_old = parameter(3 * features, features), parameter(3 * features, features)
        self.bias = parameter(features, value=2.0)
        for weight in (self.weight_new, self.weight_old):
            initialise(weight, None, "torch")

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Combine `old`, x, and `new`, y, of a sub-layer, both `[*L, ..., D]`."""
        old, new = x["old"], x["new"]
        size = old.shape[-1]
        of_old, bias = params[f"{prefix}weight_old"], params[f"{prefix}bias"]
        reset, update, candidate = linear(new, params[f"{prefix}weight_new"], None).chunk(3, -1)
        own = linear(old, of_old[..., : 2 * size, :], None)
        reset = torch.sigmoid(reset + own[..., :size])
        update = torch.sigmoid(update + own[..., size:] - between(bias, old, bias.dim() - 1))
        candidate = torch.tanh(candidate + linear(reset * old, of_old[..., 2 * size :, :], None))
        return torch.lerp(old, candidate, update)


class GatedTransformerLayer(Block):
    """Gated Transformer layer of GTrXL (Parisotto et al., 2019), which reinforcement learning trains more stably.

    x = gate1(x, relu(attention(norm1(x))));  x = gate2(x, relu(feedforward(norm2(x))))

    Attention has rotary positions.
    """

    def __init__(self, features: int, heads: int, feedforward: int) -> None:
        """Create the layer; `feedforward` is the number of hidden units."""
        super().__init__()
        self.self_attn = MultiHeadAttention(features, heads, rotary=True)
        self.linear1, self.linear2 = Linear(features, feedforward), Linear(feedforward, features)
        self.norm1, self.norm2 = LayerNorm(features), LayerNorm(features)
        self.gate1, self.gate2 = Gate(features), Gate(features)

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the layer to `input` `[*L, ..., T, D]`.

        Args:
            params: this block's tensors are those whose name starts with `prefix`.
            x: `input`; `earlier` `[*L, ..., C, D]`, inputs of steps before, to look at as well; `mask` bool
                `[..., T, C + T]`; `positions` `[C + T]`.
            ctx: of no matter.
            prefix: of this block's names in `params`.
        """
        old, earlier = x["input"], x["earlier"]
        seen = self.norm1.run(params, torch.cat((earlier, old), -2), ctx, f"{prefix}norm1.")
        given = {
            "query": seen[..., earlier.shape[-2] :, :],
            "key": seen,
            "mask": x["mask"],
            "positions": x["positions"],
        }
        new = torch.relu(self.self_attn.run(params, given, ctx, f"{prefix}self_attn."))
        old = self.gate1.run(params, {"old": old, "new": new}, ctx, f"{prefix}gate1.")
        seen = self.norm2.run(params, old, ctx, f"{prefix}norm2.")
        new = torch.relu(_feedforward(params, seen, prefix))
        return self.gate2.run(params, {"old": old, "new": new}, ctx, f"{prefix}gate2.")


def _feedforward(params: Params, x: Tensor, prefix: str) -> Tensor:
    """Feed-forward network of a Transformer layer, linear2(relu(linear1(x)))."""
    hidden = linear(x, params[f"{prefix}linear1.weight"], params[f"{prefix}linear1.bias"])
    return linear(torch.relu(hidden), params[f"{prefix}linear2.weight"], params[f"{prefix}linear2.bias"])


class Transformer(Block):
    """Transformer encoder of whole sequences: a linear layer, positions, and layers: `[*L, ..., T, in]` -> `[..., D]`.

    Weights are named `embedding.*`, `positions.*` and `0.*`, `1.*`, ... for the layers.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        layers: int = 1,
        heads: int = 1,
        positions: PositionName = "sinusoidal",
        norm: NormPlace = "pre",
        length: int = 512,
    ) -> None:
        """Create the encoder.

        Args:
            in_features: size of the last axis of the input.
            features: D; the feed-forward networks have four times as many hidden units.
            layers: how many.
            heads: of every layer; divides D.
            positions: positional encoding, "none" for sets and graphs.
            norm: see `TransformerLayer`.
            length: most steps of a sequence with learned positions.
        """
        super().__init__()
        require_choice("positions", positions, PositionName)
        require_count("Transformer: layers", layers)
        if positions == "sinusoidal" and features % 2:
            raise SettingError(f"sinusoidal positions need an even number of features, got {features}: add one")
        self.features, self._kind = features, positions
        self.embedding = Linear(in_features, features)
        self.positions = LearnedPositions(length, features) if positions == "learned" else None
        for k in range(layers):
            self.add_module(str(k), TransformerLayer(features, heads, 4 * features, norm, positions == "rotary"))
        self._names = [str(k) for k in range(layers)]

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Encode `[*L, ..., T, in]`, or `{"input": ..., "mask": [..., T, T]}`: features `[*L, ..., T, D]`."""
        x, mask = (x["input"], x.get("mask")) if isinstance(x, dict) else (x, None)
        x = self.embedding.run(params, x, ctx, f"{prefix}embedding.")
        if self._kind == "sinusoidal":
            x = x + sinusoidal_positions(torch.arange(x.shape[-2], device=x.device), self.features).to(x.dtype)
        elif self.positions is not None:
            x = self.positions.run(params, x, ctx, f"{prefix}positions.")
        for name in self._names:
            layer = self._modules[name]
            assert isinstance(layer, TransformerLayer)
            x = layer.run(params, {"input": x, "mask": mask}, ctx, f"{prefix}{name}.")
        return x


# ---------------------------------------------------------------------- memory


class AttentionMemory(Block):
    """Attention over the last steps of an episode, by gated Transformer layers: the memory of an actor.

    A step looks at itself and at the `context` steps before it, of its own episode alone. Kept are the inputs of every
    layer at these steps, as in Transformer-XL (Dai et al., 2019), `window_l0` `[*L, *rows, context, D]` and so on, the
    latest last, and `seen` `[*L, *rows]`, how many of them there are. Gradients reach as far as the steps that are
    unrolled; what was kept before is constant.

    Weights are named `embedding.*` and `0.*`, `1.*`, ... for the layers.
    """

    def __init__(self, in_features: int, features: int, layers: int = 1, context: int = 32, heads: int = 4) -> None:
        """Create the memory.

        Args:
            in_features: size of the last axis of the input.
            features: D; divides into the heads, into an even number for each. The feed-forward networks have twice as
                many hidden units.
            layers: how many.
            context: steps that are kept.
            heads: of every layer.
        """
        super().__init__()
        for name, count in (("layers", layers), ("context", context)):
            require_count(f"AttentionMemory: {name}", count)
        self.features, self.context = features, context
        self.embedding = Linear(in_features, features)
        self._layers = tuple(GatedTransformerLayer(features, heads, 2 * features) for _ in range(layers))
        for k, layer in enumerate(self._layers):
            self.add_module(str(k), layer)

    def initial(self, rows: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """State at the start of an episode: an empty window for `rows` `[*L, *rows]`."""
        shape = (*rows, self.context, self.features)
        windows = {
            f"window_l{k}": torch.zeros(shape, dtype=torch.float32, device=device) for k in range(len(self._layers))
        }
        return {**windows, "seen": torch.zeros(rows, dtype=torch.int64, device=device)}

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Unroll over sequences from an empty window: `[*L, T, B, in]` -> `[*L, T, B, D]`."""
        axes = learner_axes(self, params, ctx, prefix)
        state = self.initial((*x.shape[:axes], x.shape[axes + 1]), x.device)
        state = {name: value.to(x.dtype) if name != "seen" else value for name, value in state.items()}
        return self.unroll(params, x, state, None, ctx, prefix)

    def step(
        self, params: Params, x: Tensor, state: dict[str, Tensor], ctx: Context, prefix: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: `[*L, *rows, in]` -> features `[*L, *rows, D]`, and the new state."""
        x = self.embedding.run(params, x, ctx, f"{prefix}embedding.").unsqueeze(-2)
        seen, new = state["seen"], {}
        place = torch.arange(self.context + 1, device=x.device)
        mask = (place >= self.context - seen.unsqueeze(-1)).unsqueeze(-2)
        for k, layer in enumerate(self._layers):
            name = f"window_l{k}"
            new[name] = torch.cat((state[name][..., 1:, :], x), -2)
            given = {"input": x, "earlier": state[name], "mask": mask, "positions": place}
            x = layer.run(params, given, ctx, f"{prefix}{k}.")
        return x.squeeze(-2), {**new, "seen": (seen + 1).clamp(max=self.context)}

    def unroll(
        self,
        params: Params,
        x: Tensor,
        state: dict[str, Tensor],
        begins: Tensor | None,
        ctx: Context,
        prefix: str = "",
    ) -> Tensor:
        """Attend over sequences: features after every step, `[*L, T, B, D]`.

        Args:
            params: this block's tensors are those whose name starts with `prefix`.
            x: `[*L, T, B, in]`.
            state: before the first step, `[*L, B, ...]`.
            begins: first steps of episodes, `[*L, T, B]` bool; None for none.
            ctx: of no matter.
            prefix: of this block's names in `params`.
        """
        mask = self._mask(state["seen"], _batch_first(begins, x))
        x = self._through(params, x.transpose(-3, -2), state, mask, self._places(x), ctx, prefix)
        return x.transpose(-3, -2)

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

        Args:
            params: as in `unroll`.
            x: of the steps, as in `unroll`.
            following: what follows each of them in its own episode, `[*L, T, B, in]`.
            state: as in `unroll`.
            begins: as in `unroll`.
            ctx: as in `unroll`.
            prefix: as in `unroll`.
        """
        steps, places = x.shape[-3], self._places(x)
        mask = self._mask(state["seen"], _batch_first(begins, x))
        own = torch.eye(steps, dtype=torch.bool, device=x.device).expand(*mask.shape[:-1], steps)
        none = torch.zeros_like(own)
        before = self._nearest(steps, 1, x.device) & self._mask(state["seen"], _batch_first(begins, x), near=False)
        mask = torch.cat((torch.cat((mask, none), -1), torch.cat((before, own), -1)), -2)
        places = torch.cat((places, places[self.context :] + 1))
        both = torch.cat((x, following), -3).transpose(-3, -2)
        out = self._through(params, both, state, mask, places, ctx, prefix)
        return out[..., steps:, :].transpose(-3, -2)

    def _through(
        self,
        params: Params,
        x: Tensor,
        state: dict[str, Tensor],
        mask: Tensor,
        places: Tensor,
        ctx: Context,
        prefix: str,
    ) -> Tensor:
        """Embed steps `[*L, B, T, in]` and run all layers on them."""
        x = self.embedding.run(params, x, ctx, f"{prefix}embedding.")
        for k, layer in enumerate(self._layers):
            given = {"input": x, "earlier": state[f"window_l{k}"], "mask": mask, "positions": places}
            x = layer.run(params, given, ctx, f"{prefix}{k}.")
        return x

    def _places(self, x: Tensor) -> Tensor:
        return torch.arange(self.context + x.shape[-3], device=x.device)

    def _nearest(self, steps: int, ahead: int, device: torch.device) -> Tensor:
        """Mask of the `context` steps before each, `[T, context + T]`: of itself, too, unless it is a step `ahead`."""
        back = torch.arange(steps, device=device).unsqueeze(-1) + self.context + ahead
        back = back - torch.arange(self.context + steps, device=device)
        return (back >= ahead) & (back <= self.context)

    def _mask(self, seen: Tensor, begins: Tensor, near: bool = True) -> Tensor:
        """Mask of the steps in a window, then in a sequence, that each step may look at, `[*L, B, T, context + T]`.

        Args:
            seen: number of steps in the window, `[*L, B]`.
            begins: first steps of episodes, `[*L, B, T]`.
            near: leave out those further away than `context`, and later ones.
        """
        place = torch.arange(self.context, device=seen.device)
        first = (begins.cumsum(-1) == 0).unsqueeze(-1)
        window = first & (place >= self.context - seen.unsqueeze(-1)).unsqueeze(-2)
        mask = torch.cat((window, episode_mask(begins)), -1)
        return mask & self._nearest(begins.shape[-1], 0, seen.device) if near else mask


def _batch_first(begins: Tensor | None, x: Tensor) -> Tensor:
    """First steps of episodes, `[*L, B, T]`, of sequences `[*L, T, B, in]`; none if there are none."""
    if begins is None:
        return torch.zeros_like(x[..., 0], dtype=torch.bool).mT
    return begins.mT
