"""Fisher information of any module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlmeta.compat.torch.checks import Batch, Named, leaves_of, quiet, rest_of, trainable
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.packed import Packed
from rlmeta.nn.block import Context
from rlmeta.nn.fisher import FisherKind, categorical_fisher, gaussian_fisher, score_fisher
from rlmeta.nn.lift import lift

Outputs: TypeAlias = Callable[[Callable[..., Any], Batch], Tensor]
"""Function from a callable of the module and a batch to an output per sample, such as `lambda model, x: model(x)`."""


class FisherArguments(TypedDict, total=False):
    """Keyword arguments of `fisher_information`: output distribution, kind of Fisher information, labels, seed."""

    logits: Outputs
    mean: Outputs
    log_prob: Outputs
    kind: FisherKind
    target: Tensor
    seed: int
    chunk: int


@quiet()
def fisher_information(
    module: nn.Module,
    batch: Batch,
    *,
    logits: Outputs | None = None,
    mean: Outputs | None = None,
    log_prob: Outputs | None = None,
    kind: FisherKind = "exact",
    target: Tensor | None = None,
    seed: int = 0,
    chunk: int = 512,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a module's predictive distribution, per sample on average.

    One of three functions defines the distribution; by default the module's output is logits. The function must call
    its argument `model`, which runs in evaluation mode: without dropout, with running statistics.

    Args:
        module: any module; its mode, gradients and buffers are left as they are.
        batch: n samples.
        logits: of a categorical distribution, `[n, C]`.
        mean: of a Gaussian of variance 1, `[n, D]` or `[n]` (regression by squared error).
        log_prob: log-probability of the samples under any distribution, `[n]`: an estimate of the Fisher information if
            the module drew the samples itself, else the empirical one.
        kind: with logits, the origin of the labels; see `rlmeta.nn.fisher`.
        target: kind "empirical": the labels `[n]`.
        seed: kind "sample": of the labels.
        chunk: samples at a time.

    Returns:
        `{name: tensor of the parameter's shape}`, of parameters that require a gradient.

    Raises:
        SettingError: no parameter requires a gradient or affects the outputs, a sample's output depends on other
            samples, or arguments exclude each other.
    """
    parameters = trainable(module, "fisher_information")
    chosen = {"logits": logits, "mean": mean, "log_prob": log_prob}
    functions = [name for name, function in chosen.items() if function is not None]
    if len(functions) > 1:
        raise SettingError(f"fisher_information was given {' and '.join(functions)}, expected one of them")
    what = functions[0] if functions else "logits"
    if what != "logits" and (kind != "exact" or target is not None):
        raise SettingError(f"fisher_information: kind and target are for logits, but {what} was given: leave them out")
    leaves, structure = leaves_of(batch, "fisher_information")
    named = {str(place): leaf for place, leaf in enumerate(leaves)}
    model, outputs = _model(module), chosen[what] or (lambda model, x: model(x))

    def forward(p: dict[str, Named], batch: Named, ctx: Context) -> Tensor:
        samples = pytree.tree_unflatten([batch[name] for name in named], structure)
        out = outputs(lambda *inputs, **further: model(p, ctx, inputs, further), samples)
        if what != "mean" or not isinstance(out, Tensor):
            return out
        out = out.unsqueeze(-1) if out.dim() == 1 else out.flatten(1)
        return torch.cat([out, torch.zeros_like(out)], -1)

    weights: Named = dict(parameters)
    p = {"weights": weights, "rest": rest_of(module, parameters)}
    if what == "logits":
        key = random.make_keys([seed], next(iter(parameters.values())).device)[0]
        information = categorical_fisher(forward, p, named, 0, kind, target=target, key=key, chunk=chunk)
    else:
        information = (gaussian_fisher if what == "mean" else score_fisher)(forward, p, named, 0, chunk=chunk)
    return dict(Packed.view(information, weights, 0))


def _model(module: nn.Module) -> Callable[[dict[str, Named], Context, tuple[Any, ...], dict[str, Any]], Any]:
    """Build a function that runs the module on given weights, with the context's taps unless weights are tied."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, value in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if first.setdefault(id(value), name) != name:
            ties[name] = first[id(value)]
    block, several = lift(module), cache(lambda: lift(_Several(module)))

    def run(p: dict[str, Named], ctx: Context, inputs: tuple[Any, ...], further: dict[str, Any]) -> Any:
        tensors = {**p["rest"], **p["weights"]}
        tensors |= {name: tensors[original] for name, original in ties.items()}
        # a tied weight is used in two places, of which taps would see one
        ctx = replace(ctx, learner_axes=0, taps=None if ties else ctx.taps)
        if len(inputs) == 1 and not further and isinstance(inputs[0], Tensor | dict):
            return block.run(tensors, inputs[0], ctx)
        tensors = {f"module.{name}": value for name, value in tensors.items()}
        return several().run(tensors, {"inputs": inputs, "further": further}, ctx)

    return run


class _Several(nn.Module):
    """Module of several inputs as a module of a single input, as `lift` requires."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.module(*arguments["inputs"], **arguments["further"])
