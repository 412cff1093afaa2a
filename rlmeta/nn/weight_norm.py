"""Weight normalisation and spectral normalisation of linear and convolutional layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rlmeta.nn.block import Block, Context, Params, latest, learner_axes, share_tensors

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)
NORM_PARTS = (parametrize.ParametrizationList, *_NORMS)
"""Modules that a layer with a normalised weight has inside."""

_OWN = "parametrizations.weight."
"""Prefix of the names that torch gives to the tensors of a parametrized weight."""


class NormedWeight(Block):
    """Weight or spectral normalisation: a linear or convolutional layer whose weight is computed from other tensors.

    Weight normalisation: W = g v / |v|, with a norm and a g for every output (`dim` 0), or one of each (`dim` -1).
    Spectral normalisation: W / σ, where σ = uᵀ W v approximates the largest singular value of W as a matrix
    `[out, rest]`; in training u `[*L, out]` and v `[*L, rest]` take a step of the power method first, and the new ones
    go to `ctx.new_buffers`. Names, arithmetic and modes are those of `torch.nn.utils.parametrizations.weight_norm` and
    `spectral_norm`.

    Source: Salimans and Kingma, "Weight Normalization", 2016; Miyato et al., "Spectral Normalization for Generative
    Adversarial Networks", 2018.
    """

    def __init__(self, module: nn.Module, to_block: Callable[[nn.Module], Block]) -> None:
        """Create the block of a normalised layer of torch's, whose tensors it shares.

        Args:
            module: as `weight_norm(layer)` or `spectral_norm(layer)` returns it; see `is_normed`.
            to_block: converts the layer without the normalisation.
        """
        super().__init__()
        norm: Any = module.get_submodule("parametrizations.weight.0")
        spectral = isinstance(norm, parametrizations._SpectralNorm)
        self._dim: int = norm.dim
        self._steps: int = norm.n_power_iterations if spectral else 0
        self._eps: float = norm.eps if spectral else 0.0
        self._layer = (to_block(_without_norm(module)).to("meta"),)
        share_tensors(self, module)

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Apply the layer with its normalised weight, for instance `[*L, ..., in]` -> `[*L, ..., out]`."""
        axes = learner_axes(self, params, ctx, prefix)
        if self._steps:
            weight = self._spectral(params, axes, ctx, prefix)
        else:
            weight = _normed(params[f"{prefix}{_OWN}original0"], params[f"{prefix}{_OWN}original1"], self._dim, axes)
        own = {f"{prefix}weight": weight}
        if self._parameters.get("bias") is not None:
            own[f"{prefix}bias"] = params[f"{prefix}bias"]
        # Without taps: those of a linear layer would be of a weight that is no parameter.
        return self._layer[0].run(own, x, replace(ctx, learner_axes=axes, taps=None), prefix)

    def _spectral(self, params: Params, axes: int, ctx: Context, prefix: str) -> Tensor:
        """Weight divided by its largest singular value; in training after a step of the power method."""
        weight = params[f"{prefix}{_OWN}original"]
        matrix = weight.movedim(axes + self._dim, axes).flatten(axes + 1)
        names = [f"{prefix}{_OWN}0._u", f"{prefix}{_OWN}0._v"]
        u, v = (latest(params, ctx, name) for name in names)
        if self.trains(ctx):
            with torch.no_grad():
                for _ in range(self._steps):
                    u = F.normalize(_times(matrix, v), dim=-1, eps=self._eps)
                    v = F.normalize(_times(matrix.mT, u), dim=-1, eps=self._eps)
            ctx.new_buffers.update(zip(names, (u, v)))
        sigma = (u * _times(matrix, v)).sum(-1)
        return weight / sigma.reshape(*sigma.shape, *(1,) * (weight.dim() - axes))


def _without_norm(module: nn.Module) -> nn.Module:
    """Copy a normalised layer as one of its plain class; torch's own way of removing a norm changes the original."""
    layer: Any = copy.deepcopy(module)
    weight = layer.weight.detach()
    del layer._modules["parametrizations"]
    layer.__class__ = type(module).__bases__[0]
    layer.register_parameter("weight", nn.Parameter(weight))
    plain: nn.Module = layer
    return plain


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _normed(g: Tensor, v: Tensor, dim: int, axes: int) -> Tensor:
    """Weight g v / |v| `[*L, ...]`, the norm over all axes of a weight but `dim`; over all of them if that is -1."""
    norm = torch.linalg.vector_norm(v, dim=[d for d in range(axes, v.dim()) if d != axes + dim], keepdim=True)
    return v * (g.reshape(norm.shape) / norm)


def is_normed(module: nn.Module) -> bool:
    """Whether a module is a linear or convolutional layer of torch's with a normalised weight, and nothing else."""
    parts = module._modules.get("parametrizations")
    if type(module).__bases__[0] not in _LAYERS or not isinstance(parts, nn.ModuleDict) or list(parts) != ["weight"]:
        return False
    chain = parts["weight"]
    return isinstance(chain, parametrize.ParametrizationList) and len(chain) == 1 and type(chain[0]) in _NORMS
