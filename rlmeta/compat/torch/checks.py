"""Checks of modules and samples, and contexts of evaluation mode and no gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlmeta.errors import SettingError

Batch: TypeAlias = Any
"""Batch of samples: a tensor `[n, ...]`, or a tuple, list or dictionary of such tensors with the same n."""

Named: TypeAlias = dict[str, Tensor]
"""Tensors by name."""


def require_module(module: nn.Module, who: str) -> None:
    """Refuse a value that is no module."""
    if not isinstance(module, nn.Module):
        raise SettingError(f"{who} was given {module!r}, expected a torch.nn.Module, built (not its class)")


def trainable(module: nn.Module, who: str) -> dict[str, nn.Parameter]:
    """Collect the parameters that require a gradient, tied ones once."""
    require_module(module, who)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if any(nn.parameter.is_lazy(p) for p in parameters.values()):
        raise SettingError(f"{who}: a lazy module has no parameters before its first call: call it once")
    if any(p.is_meta for p in parameters.values()):
        raise SettingError(f'{who}: the module is on the device "meta" and has no numbers: move it with to_empty')
    parameters = {name: p for name, p in parameters.items() if p.numel()}
    if not parameters:
        raise SettingError(f"{who}: no parameter of this {type(module).__name__} requires a gradient: nothing to do")
    return parameters


def rest_of(module: nn.Module, trained: Mapping[str, Tensor]) -> Named:
    """Collect the frozen parameters and the buffers of a module."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in tensors.items() if name not in trained}


def require_gradients(parameters: Mapping[str, nn.Parameter], what: str) -> None:
    """Refuse parameters without any gradient, or with a sparse gradient."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not gradients:
        raise SettingError(f"{what}: no parameter has a gradient: call it after loss.backward(), before the step")
    sparse = [name for name, gradient in gradients.items() if gradient.layout is not torch.strided]
    if sparse:
        raise SettingError(f"{what}: the gradient of {sparse[0]} is sparse: give its layer sparse=False")


def leaves_of(batch: Batch, who: str) -> tuple[list[Tensor], pytree.TreeSpec]:
    """Flatten a batch to its tensors and structure, after a check of the number of samples."""
    leaves, structure = pytree.tree_flatten(batch)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        kinds = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        raise SettingError(f"{who} was given {kinds}, expected tensors [n, ...] of n samples")
    shapes = [list(leaf.shape) for leaf in leaves]
    if len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
        raise SettingError(f"{who} was given tensors {shapes}, expected as many samples, one or more, in each")
    return leaves, structure


def take(leaf: Tensor, rows: Tensor) -> Tensor:
    """Select samples by index, as a detached copy."""
    return leaf.detach()[rows.to(leaf.device)]


def precise(x: Tensor) -> Tensor:
    """Convert to single precision or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_number(what: str, value: object, low: float, high: float = math.inf) -> None:
    """Refuse a value that is no finite number in [low, high]."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not low <= number <= high or math.isinf(number):
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise SettingError(f"{what} is {value!r}, expected a number, at least {low:g}{most}")


def check_state(state: Mapping[str, Any], names: Sequence[str], who: str) -> None:
    """Refuse a state with other entries than `names`."""
    if not isinstance(state, Mapping) or set(state) != set(names):
        actual = ", ".join(map(str, state)) if isinstance(state, Mapping) else repr(state)
        raise SettingError(f"{who}: the state has {actual}, expected what its state_dict() gives: {', '.join(names)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Context without gradients and without inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode; afterwards every submodule has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
