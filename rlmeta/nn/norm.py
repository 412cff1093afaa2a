"""Layer normalisation and batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmeta.nn.block import Block, Context, Params, between, fetch, latest, learner_axes
from rlmeta.nn.initialisers import parameter


class LayerNorm(Block):
    """Layer normalisation, (x - mean) / sqrt(var + eps) * weight + bias over the last axes: `[*L, ..., *shape]`.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    def __init__(
        self, shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        """Create the layer with the arguments of `nn.LayerNorm`."""
        super().__init__()
        self._shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._eps = eps
        self.register_parameter("weight", parameter(*self._shape, value=1.0) if elementwise_affine else None)
        has_bias = elementwise_affine and bias
        self.register_parameter("bias", parameter(*self._shape) if has_bias else None)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Normalise `[*L, ..., *shape]`, with any number of axes in between."""
        if tuple(x.shape[x.dim() - len(self._shape) :]) != self._shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {('...', *self._shape)}")
        weight, bias = fetch(self, params, prefix, "weight"), fetch(self, params, prefix, "bias")
        axes = 0 if weight is None else weight.dim() - len(self._shape)
        if weight is None or axes == 0:
            return F.layer_norm(x, self._shape, weight, bias, self._eps)
        x = F.layer_norm(x, self._shape, None, None, self._eps)
        scaled = x * between(weight, x, axes)
        return scaled if bias is None else scaled + between(bias, x, axes)


class BatchNorm1d(Block):
    """Batch normalisation of each channel over the whole batch of its learner: `[*L, ..., C]`.

    (x - mean) / sqrt(var + eps) * weight + bias. In training the statistics are the batch's, and new running ones go to
    `ctx.new_buffers`; in evaluation, and where the block was put in `eval()`, the running ones are used. Names and
    arithmetic are those of `torch.nn.BatchNorm1d`. A block from `from_torch`, also of the 2d and 3d modules, keeps
    torch's layout: `[*L, B, C]` or `[*L, B, C, ...]`.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        """Create the layer with the arguments of `nn.BatchNorm1d`."""
        super().__init__()
        self._features, self._eps, self._momentum = features, eps, momentum
        self._channels_last = True
        self.register_parameter("weight", parameter(features, value=1.0) if affine else None)
        self.register_parameter("bias", parameter(features) if affine else None)
        zero = torch.zeros(features, dtype=torch.float32, device="cpu")
        self.register_buffer("running_mean", zero if track_running_stats else None)
        self.register_buffer("running_var", torch.ones_like(zero) if track_running_stats else None)
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        self.register_buffer("num_batches_tracked", count if track_running_stats else None)

    @classmethod
    def from_torch(cls, module: nn.modules.batchnorm._BatchNorm) -> BatchNorm1d:
        """Create a block that shares the tensors of torch's batch normalisation module and expects its layout."""
        block = cls(module.num_features, module.eps, module.momentum, affine=False, track_running_stats=False)
        block._channels_last = False
        block._parameters, block._buffers = module._parameters, module._buffers
        block.training = module.training
        return block

    def trains_otherwise(self) -> bool:
        """Whether it is in training mode and keeps running statistics, which evaluation uses."""
        return self.training and self._buffers["running_mean"] is not None

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Normalise `x`; the shape stays the same."""
        axes = learner_axes(self, params, ctx, prefix)
        channel = x.dim() - 1 if self._channels_last else axes + 1
        if channel <= axes or channel >= x.dim() or x.shape[channel] != self._features:
            layout = ("...", self._features) if self._channels_last else ("B", self._features, "...")
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {layout} behind {axes} learner axes")
        stored = {name: fetch(self, params, prefix, name) for name in ("running_mean", "running_var", "weight", "bias")}
        for value in stored.values():
            if value is not None and value.shape != (*x.shape[:axes], self._features):
                raise ValueError(f"x has shape {tuple(x.shape)}, expected {tuple(value.shape[:-1])} in front")
        mean, var, weight, bias = stored["running_mean"], stored["running_var"], stored["weight"], stored["bias"]
        if self.trains(ctx) or mean is None or var is None:
            channels = x.reshape(*x.shape[:axes], -1, self._features) if self._channels_last else x
            out = self._by_batch(params, channels, axes, weight, bias, ctx, prefix)
            return out.reshape(x.shape)
        shape = (
            *x.shape[:axes],
            *(size if axis == channel else 1 for axis, size in enumerate(x.shape) if axis >= axes),
        )
        out = (x - mean.reshape(shape)) * (var + self._eps).rsqrt().reshape(shape)
        return out if weight is None or bias is None else out * weight.reshape(shape) + bias.reshape(shape)

    def _by_batch(
        self,
        params: Params,
        x: Tensor,
        axes: int,
        weight: Tensor | None,
        bias: Tensor | None,
        ctx: Context,
        prefix: str,
    ) -> Tensor:
        """Normalise by batch statistics, in one call of torch with the channels of all learners.

        Args:
            params: as in `Block.run`.
            x: `[*L, B, C, ...]`.
            axes: number of learner axes.
            weight: `[*L, C]` or None.
            bias: `[*L, C]` or None.
            ctx: for new running statistics.
            prefix: as in `Block.run`.
        """
        folded = x.movedim(axes, 0).flatten(1, axes + 1)
        count = folded.numel() // max(1, folded.shape[1])
        if count < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: a batch's statistics need more than one value per channel")
        scale, shift = (None if value is None else value.reshape(-1) for value in (weight, bias))
        out, mean, rstd = torch.native_batch_norm(folded, scale, shift, None, None, True, 0.0, self._eps)
        if self.trains(ctx) and self._buffers["running_mean"] is not None:
            var = rstd.detach().square().reciprocal() - self._eps
            channels = (*x.shape[:axes], self._features)
            self._track(params, mean.detach().reshape(channels), var.reshape(channels), count, ctx, prefix)
        return out.reshape(x.shape[axes], *x.shape[:axes], *x.shape[axes + 1 :]).movedim(0, axes)

    def _track(self, params: Params, mean: Tensor, var: Tensor, count: int, ctx: Context, prefix: str) -> None:
        """Put new running statistics into `ctx.new_buffers`; `mean`, biased `var` `[*L, C]` are of `count` values."""
        tracked = latest(params, ctx, prefix + "num_batches_tracked") + 1
        for name, value in (("running_mean", mean), ("running_var", var * (count / (count - 1)))):
            old = latest(params, ctx, prefix + name)
            weight = (1.0 / tracked.to(old.dtype)).unsqueeze(-1) if self._momentum is None else self._momentum
            ctx.new_buffers[prefix + name] = old + weight * (value.to(old.dtype) - old)
        ctx.new_buffers[prefix + "num_batches_tracked"] = tracked


BATCH_NORMS = cast(
    "tuple[type[nn.modules.batchnorm._BatchNorm], ...]", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
)
"""Batch normalisation modules of torch that `from_torch` accepts."""
