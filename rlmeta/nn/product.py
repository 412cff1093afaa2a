"""Batched matrix products of every learner's data and weights, and fused linear layers as one autograd node.

For small networks, autograd nodes for every product, transpose and activation cost as much as the arithmetic, and
matrix libraries are slow where one side of a product is narrow. This module avoids both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Elementwise: TypeAlias = Callable[[Tensor], Tensor]

_NARROW = 8
"""Up to this many output features the transposed product is computed, which is faster."""

_LARGE = 6_000_000
"""From this many multiplications on, products use oneDNN, which is faster than MKL there (on an AMD EPYC)."""

_ONEDNN: bool = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether this machine is of the kind on which that was measured."""


def _tanh_(x: Tensor) -> Tensor:
    """In-place tanh x = 1 - 2 / (1 + exp 2x), faster than `torch.tanh`; its absolute error is that of rounding 1."""
    return torch.rsub(x.mul_(-2).sigmoid_(), 1, alpha=2)


_IN_PLACE: dict[Elementwise, Elementwise] = {
    torch.tanh: _tanh_,
    torch.relu: torch.relu_,
    torch.sigmoid: torch.sigmoid_,
}
"""In-place versions of activation functions."""

_SLOPES: dict[Elementwise | None, Callable[[Tensor, Tensor], Tensor]] = {
    None: lambda grad, out: grad,
    torch.tanh: torch.ops.aten.tanh_backward,
    torch.relu: lambda grad, out: torch.ops.aten.threshold_backward(grad, out, 0),
    torch.sigmoid: torch.ops.aten.sigmoid_backward,
}
"""Backward functions of activations: from the output's gradient and the output to the input's gradient."""


class _Graph(threading.local):
    plain = False


_graph = _Graph()


@contextmanager
def plain_graph() -> Iterator[None]:
    """Context in which layers are plain autograd nodes, since a fused node computes second derivatives twice."""
    before, _graph.plain = _graph.plain, True
    try:
        yield
    finally:
        _graph.plain = before


def is_plain_graph() -> bool:
    """Whether layers are to be plain autograd nodes, because the graph will be differentiated twice."""
    return _graph.plain


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product as `torch.matmul`, of equal leading axes: `[..., M, K]`, `[..., K, N]` -> `[..., M, N]`."""
    weight = b.mT
    if not (_large(a, weight) and _plain(a, weight)):
        return a @ b
    flat = a.reshape(-1, *a.shape[-2:]), weight.reshape(-1, *weight.shape[-2:])
    return _onednn(*flat, None).reshape(*a.shape[:-1], -1)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Affine map of one learner, as `torch.nn.functional.linear`: `[..., in]`, `[out, in]`, `[out]` -> `[..., out]`."""
    if bias is None or x.dim() < 2 or not _large(x.reshape(-1, x.shape[-1]), weight):
        return F.linear(x, weight, bias)
    tensors = weight.unsqueeze(0), bias.reshape(1, 1, -1)
    return layers(x.reshape(1, -1, x.shape[-1]), tensors, (None,)).reshape(*x.shape[:-1], -1)


def _large(a: Tensor, weight: Tensor) -> bool:
    """Whether the product of `[..., M, K]` and `[..., N, K]` is large enough for oneDNN, in float32 on the CPU.

    No in a program that is compiled or exported: it is for every batch size, and for machines of other kinds.
    """
    if torch.compiler.is_compiling():
        return False
    if not _ONEDNN or a.shape[-2] * a.shape[-1] * weight.shape[-2] < _LARGE or a.shape[:-2] != weight.shape[:-2]:
        return False
    single = a.dtype == weight.dtype == torch.float32
    return single and a.device.type == weight.device.type == "cpu"


def _plain(a: Tensor, weight: Tensor) -> bool:
    """Whether a product needs no derivative: no gradient is required and no functorch transform is active."""
    if torch.is_grad_enabled() and (a.requires_grad or weight.requires_grad):
        return False
    return not torch._C._are_functorch_transforms_active()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layers by oneDNN, one call per learner: `[S, M, K]`, `[S, N, K]`, `[S, 1, N]` -> `[S, M, N]`."""
    out: Tensor = torch.ops.rlmeta.products(x, weight, bias)
    return out


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    call = torch.ops.mkldnn._linear_pointwise
    offsets = (None,) * len(x) if bias is None else bias.squeeze(-2).unbind()
    factors = zip(x.unbind(), map(_dense, weight.unbind()), offsets)
    outputs = [call(*tensors, "none", [], "") for tensors in factors]
    return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)


def _dense(weight: Tensor) -> Tensor:
    """Weight `[N, K]` without gaps: for a transposed one with gaps, as behind convolutions, oneDNN needs 300 times as
    long."""
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


_library = torch.library.Library("rlmeta", "DEF")  # type: ignore[no-untyped-call]
_library.define("products(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("products", _products, "CPU")  # type: ignore[no-untyped-call]
# A custom operator: the operator it calls has arguments that a recorded program cannot hold.


def learner_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer of all learners, a batched product: `[S, B, in]`, `[S, out, in]`, `[S, 1, out]` -> `[S, B, out]`."""
    if not _plain(x, weight):
        return _differentiable_product(x, weight, bias)
    if _large(x, weight):
        return _onednn(x, weight, bias)
    if weight.shape[-2] <= _NARROW:
        out = torch.bmm(weight, x.mT) if bias is None else torch.baddbmm(bias.mT, weight, x.mT)
        return out.mT
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)


def _differentiable_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer of all learners where it is differentiated, perhaps twice, or under a functorch transform."""
    multiply = torch.bmm if torch._C._are_functorch_transforms_active() else _Product.apply
    narrow = weight.shape[-2] <= _NARROW
    out: Tensor = multiply(weight, x.mT).mT if narrow else multiply(x, weight.mT)
    return out if bias is None else out + bias


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product; as (bᵀ aᵀ)ᵀ where both matrices are stored transposed, which `torch.bmm` is slow at."""
    if a.stride(-2) == b.stride(-2) == 1 and a.stride(-1) > 1 and b.stride(-1) > 1:
        return torch.bmm(b.mT, a.mT).mT
    return torch.bmm(a, b)


class _Product(torch.autograd.Function):
    """Batched matrix product `_bmm` as an autograd function, whose derivatives of every order use `_bmm`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Product `[S, M, K]`, `[S, K, N]` -> `[S, M, N]`."""
        ctx.save_for_backward(a, b)
        return _bmm(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients g bᵀ and aᵀ g, as nodes of this kind where they are differentiated again."""
        a, b = ctx.saved_tensors
        multiply = _Product.apply if torch.is_grad_enabled() else _bmm
        wanted = ctx.needs_input_grad
        return multiply(grad, b.mT) if wanted[0] else None, multiply(a.mT, grad) if wanted[1] else None


def layers(x: Tensor, tensors: Sequence[Tensor], functions: Sequence[Elementwise | None]) -> Tensor:
    """Multi-layer perceptron of all learners: linear layers, each followed by its elementwise function.

    Args:
        x: `[S, B, in]`.
        tensors: weight `[S, out, in]` and bias `[S, 1, out]` of each layer.
        functions: activation of each layer, None for none.

    Returns:
        `[S, B, out]`
    """
    if not torch.is_grad_enabled():
        # A product is used nowhere else: overwriting it saves a third of a large forward pass.
        return _one_by_one(x, tensors, [_IN_PLACE.get(f, f) if f else None for f in functions])
    transformed = torch._C._are_functorch_transforms_active()
    if _graph.plain or transformed or any(function not in _SLOPES for function in functions):
        return _one_by_one(x, tensors, functions)
    return _Layers.apply(x, functions, *tensors)  # type: ignore[no-untyped-call]


def _one_by_one(x: Tensor, tensors: Sequence[Tensor], functions: Sequence[Elementwise | None]) -> Tensor:
    for weight, bias, function in zip(tensors[::2], tensors[1::2], functions):
        x = learner_product(x, weight, bias)
        if function is not None:
            x = function(x)
    return x


class _Layers(torch.autograd.Function):
    """Multi-layer perceptron as one autograd node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, functions: Sequence[Elementwise | None], *tensors: Tensor) -> Tensor:
        """Forward pass that saves the input of every layer."""
        ctx.functions = functions
        inputs = [x]
        for weight, bias, function in zip(tensors[::2], tensors[1::2], functions):
            out = learner_product(inputs[-1], weight, bias)
            inputs.append(out if function is None else _IN_PLACE[function](out))
        ctx.save_for_backward(*inputs, *tensors)
        return inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Backpropagation layer by layer; by autograd where the gradient is itself differentiated."""
        count = len(ctx.functions)
        inputs, tensors = ctx.saved_tensors[: count + 1], ctx.saved_tensors[count + 1 :]
        if torch.is_grad_enabled():
            return _Layers._differentiable(ctx, grad, inputs[0], tensors)
        wanted = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None] * (2 * count)
        for i in reversed(range(count)):
            grad = _SLOPES[ctx.functions[i]](grad, inputs[i + 1])
            if wanted[2 * i]:
                gradients[2 * i] = _weight_gradient(grad, inputs[i])
            if wanted[2 * i + 1]:
                gradients[2 * i + 1] = grad.sum(-2, keepdim=True)
            if i > 0 or ctx.needs_input_grad[0]:
                grad = product(grad, tensors[2 * i])
        return grad if ctx.needs_input_grad[0] else None, None, *gradients

    @staticmethod
    def _differentiable(ctx: Any, grad: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        wanted = [tensor for tensor in (x, *tensors) if tensor.requires_grad]
        out = _one_by_one(x, tensors, ctx.functions)
        gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        first, *rest = [next(gradients) if tensor.requires_grad else None for tensor in (x, *tensors)]
        return first, None, *rest


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight: `[S, B, out]`, `[S, B, in]` -> `[S, out, in]`."""
    if x.shape[-1] <= _NARROW:
        return torch.bmm(x.mT, grad).mT
    return product(grad.mT, x)
