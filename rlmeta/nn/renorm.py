"""Batch renormalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.nn.block import Block, Context, Params, fetch, latest, learner_axes
from rlmeta.nn.initialisers import parameter


class BatchRenorm(Block):
    """Batch renormalisation: batch normalisation whose outputs in training are those of evaluation.

    In training, with the batch's mean m and standard deviation s = sqrt(var + eps), and running ones μ and σ:

        y = ((x - m) / s * r + d) * weight + bias,  r = clip(s / σ, 1 / R, R),  d = clip((m - μ) / σ, -D, D)
        μ' = μ + momentum (m - μ),  σ' = σ + momentum (s - σ)

    where no gradient flows through r and d. In evaluation, and where the block was put in `eval()`,
    y = (x - μ) / σ * weight + bias, which is what training computes while neither is clipped. So what a policy acts by
    is what it learns by, and a batch of one task's samples, or of a replay memory's, is not whitened by itself. R is 1
    and D is 0, which is batch normalisation, for the first `start` batches; then they grow linearly. New running
    statistics go to `ctx.new_buffers`.

    Source: Ioffe, "Batch Renormalization", 2017, with its limits and schedule; Bhatt et al., "CrossQ", 2024, for
    reinforcement learning.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        max_r: float = 3.0,
        max_d: float = 5.0,
        start: int = 5_000,
        r_full: int = 40_000,
        d_full: int = 25_000,
        channels_last: bool = True,
    ) -> None:
        """Create the layer.

        Args:
            features: C, the number of channels.
            eps: added to the batch's variance.
            momentum: of the running statistics.
            affine: whether there are a weight and a bias.
            max_r: R in the end, 1 or more.
            max_d: D in the end, 0 or more.
            start: batches of plain batch normalisation.
            r_full: batch from which on R is `max_r`.
            d_full: batch from which on D is `max_d`.
            channels_last: the input is `[*L, ..., C]`; False for torch's layout `[*L, B, C, ...]`, as of pictures.

        Raises:
            SettingError: a limit, the momentum or the schedule is out of range.
        """
        super().__init__()
        if max_r < 1.0 or max_d < 0.0 or not 0.0 < momentum <= 1.0:
            raise SettingError(
                f"batch renormalisation with max_r {max_r}, max_d {max_d} and momentum {momentum}: expected at least "
                "1, at least 0, and a number in (0, 1]"
            )
        if not 0 <= start <= min(r_full, d_full):
            raise SettingError(
                f"batch renormalisation starts at batch {start} and has its limits at {r_full} and {d_full}: expected "
                "0 or more, and limits that are not before the start"
            )
        self._features, self._eps, self._momentum, self._channels_last = features, eps, momentum, channels_last
        self._r, self._d, self._start = (max_r, r_full), (max_d, d_full), start
        self.register_parameter("weight", parameter(features, value=1.0) if affine else None)
        self.register_parameter("bias", parameter(features) if affine else None)
        zero = torch.zeros(features, dtype=torch.float32, device="cpu")
        self.register_buffer("running_mean", zero)
        self.register_buffer("running_std", torch.ones_like(zero))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device="cpu"))

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Normalise `x`; the shape stays the same."""
        axes = learner_axes(self, params, ctx, prefix)
        channel = x.dim() - 1 if self._channels_last else axes + 1
        shape = [size if axis < axes or axis == channel else 1 for axis, size in enumerate(x.shape)]
        mean, std = (latest(params, ctx, prefix + name) for name in ("running_mean", "running_std"))
        if channel <= axes or channel >= x.dim() or mean.shape != (*x.shape[:axes], x.shape[channel]):
            layout = ("...", self._features) if self._channels_last else ("B", self._features, "...")
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected {tuple(mean.shape[:-1])} in front and {layout} behind"
            )
        if self.trains(ctx):
            out = self._by_batch(params, x, (mean, std), shape, ctx, prefix)
        else:
            out = (x - mean.reshape(shape)) / std.reshape(shape)
        weight, bias = fetch(self, params, prefix, "weight"), fetch(self, params, prefix, "bias")
        return out if weight is None or bias is None else out * weight.reshape(shape) + bias.reshape(shape)

    def _by_batch(
        self, params: Params, x: Tensor, running: tuple[Tensor, Tensor], shape: list[int], ctx: Context, prefix: str
    ) -> Tensor:
        """Normalise by batch statistics, corrected towards the running ones, which are updated.

        Args:
            params: as in `Block.run`.
            x: `[*L, ...]`.
            running: mean and standard deviation, `[*L, C]`.
            shape: of statistics that broadcast against `x`.
            ctx: for new running statistics.
            prefix: as in `Block.run`.
        """
        over = [axis for axis in range(running[0].dim() - 1, x.dim()) if shape[axis] == 1]
        if x.numel() < 2 * running[0].numel():
            raise ValueError(f"x has shape {tuple(x.shape)}: a batch's statistics need more than one value per channel")
        mean = x.mean(over, keepdim=True)
        std = (x.var(over, correction=0, keepdim=True) + self._eps).sqrt()
        batches = latest(params, ctx, f"{prefix}num_batches_tracked")
        with torch.no_grad():
            for name, old, new in zip(("running_mean", "running_std"), running, (mean, std)):
                new = new.reshape(old.shape).to(old.dtype)
                ctx.new_buffers[prefix + name] = old + self._momentum * (new - old)
            ctx.new_buffers[f"{prefix}num_batches_tracked"] = batches + 1
            mu, sigma = (value.reshape(shape).to(x.dtype) for value in running)
            ones = (1,) * (x.dim() - batches.dim())
            r_grown, d_grown = (
                self._grown(batches, full).reshape(*batches.shape, *ones) for _, full in (self._r, self._d)
            )
            largest = 1.0 + (self._r[0] - 1.0) * r_grown.to(x.dtype)
            r = torch.minimum(torch.maximum(std / sigma, 1.0 / largest), largest)
            limit = self._d[0] * d_grown.to(x.dtype)
            d = torch.minimum(torch.maximum((mean - mu) / sigma, -limit), limit)
        return (x - mean) / std * r + d

    def _grown(self, batches: Tensor, full: int) -> Tensor:
        """How far a limit has grown after so many batches, from 0 to 1 at `full`."""
        if full == self._start:
            return (batches >= full).to(torch.float32)
        return ((batches - self._start) / (full - self._start)).clamp(0.0, 1.0)
