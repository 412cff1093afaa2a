"""Helpers for tests of blocks: a loop over learners as the reference, and parameters that all differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rlmeta import nn
from rlmeta.functional import random

LEARNER_SHAPES = [(), (3,), (3, 2), (1,)]


def keys(*shape: int, seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel()
    return random.make_keys(range(seed, seed + count)).reshape(shape)


def scattered(params: nn.Params, seed: int = 0) -> nn.Params:
    """Random double-precision parameters of the same shapes: weights of ones would hide a misaligned broadcast."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in params.items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.5
            out[name] = drawn.exp() if "var" in name else drawn
        else:
            out[name] = torch.randint(0, 5, value.shape, generator=generator)
    return out


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


def take(tree: Any, index: tuple[int, ...]) -> Any:
    return pytree.tree_map_only(Tensor, lambda value: value[index], tree)


def assert_close(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-10, "atol": 1e-12} | tolerance))


def _with_gradients(tree: Any) -> tuple[Any, list[Tensor]]:
    """Copy of a tree in which all but buffers require gradients, and the leaves that do."""

    def copy(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        buffer = any(name in str(path) for name in ("running", "._u", "._v"))
        return leaf.clone().requires_grad_(leaf.is_floating_point() and not buffer)

    tree = pytree.tree_map_with_path(copy, tree)
    return tree, [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _gradients(out: Any, inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    total = torch.stack([(leaf * c).sum() for leaf, c in zip(outputs, cotangents, strict=True)]).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients)]


def assert_equals_loop(
    run: Callable[[nn.Params, Any], Any],
    reference: Callable[[nn.Params, Any, tuple[int, ...]], Any],
    params: nn.Params,
    x: Any,
    learner_shape: tuple[int, ...],
) -> Any:
    """Outputs of `run(params, x)` and gradients in both, against `reference(params[i], x[i], i)` learner by learner."""
    (own, inputs), variables = _with_gradients((params, x))
    out = run(own, inputs)
    cotangents = [data(*leaf.shape, seed=7) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    gradients = _gradients(out, variables, cotangents)
    for index in indices(learner_shape):
        (own_i, x_i), variables_i = _with_gradients((take(params, index), take(x, index)))
        out_i = reference(own_i, x_i, index)
        assert_close(take(out, index), out_i)
        gradients_i = _gradients(out_i, variables_i, [c[index] for c in cotangents])
        assert_close([g[index] for g in gradients], gradients_i)
    return out


def as_torch(module: torch.nn.Module) -> Callable[[nn.Params, Any, tuple[int, ...]], Any]:
    """Reference for `assert_equals_loop`: the module itself under `torch.func.functional_call`."""
    return lambda params, x, index: torch.func.functional_call(module, params, (x,))
