"""Blocks: ordinary modules that also run on parameters with any number of leading learner axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError
from rlmeta.functional.tree import Tree

Params: TypeAlias = dict[str, Tensor]
"""Parameters and buffers under torch's state-dict names, each `[*L, ...]` with torch's own shape at its end."""


@dataclass(slots=True)
class Context:
    """What travels with a forward pass.

    Attributes:
        training: train or evaluation mode, for dropout and batch normalisation.
        key: `[*L]`, for what draws random numbers; a caller passes another one in every step.
        new_buffers: filled in training by what keeps statistics, under the names of `Params`; `{**params,
            **new_buffers}` is what the next step starts from. Nothing is written in place.
        learner_axes: how many learner axes there are, where a block has no parameter to tell it by. Containers fill it.
        taps: None, or what every linear layer leaves its calls in, `{place in params: [(input, output), ...]}`: with
            the gradient at the output, the gradient of every single sample follows (`functional.sample_gradients`).
    """

    training: bool = False
    key: Tensor | None = None
    new_buffers: Params = field(default_factory=dict)
    learner_axes: int | None = None
    taps: dict[str, list[tuple[Tensor, Tensor]]] | None = None


class Block(nn.Module):
    """A module with one computation for its own tensors and for any number of learners at once.

    `block(x)` runs it on its own parameters as every `nn.Module` does; `run` on those it is given. Subclasses
    implement `run`, and register parameters and buffers as usual.
    """

    _anchor: tuple[str, int] | None = None
    """Name of a tensor and how many axes it has for one learner, by which the learner axes are counted."""

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """The computation.

        Args:
            params: this block's tensors are those whose name starts with `prefix`, each `[*L, ...]`.
            x: `[*L, ..., features]`, with exactly the learner axes of the parameters in front.
            ctx: mode, key, and where new buffers go.
            prefix: this block's place in `params`, empty or ending in a dot.

        Returns:
            `[*L, ..., features]`

        Raises:
            ValueError: the shapes of `x` and the parameters disagree.
        """
        raise NotImplementedError

    def may_draw(self) -> bool:
        """Whether this block itself, in its own mode, may draw random numbers."""
        return False

    def keeps_ties(self) -> bool:
        """Whether a tensor that stands in several places in this block is one tensor in `params`, by its first name."""
        return False

    def forward(self, x: Tree) -> Tree:
        """Run on the block's own tensors as an ordinary module: no learner axes, buffers written, torch's generator."""
        params: Params = {}
        key = torch.randint(-(2**62), 2**62, ()) if _collect(self, "", params) else None
        ctx = Context(training=self.training, key=key, learner_axes=0)
        out = self.run(params, x, ctx)
        with torch.no_grad():
            for name, value in ctx.new_buffers.items():
                params[name].copy_(value)
        return out


def _collect(module: nn.Module, prefix: str, params: Params) -> bool:
    """Gather the module's own tensors, faster than `own_tensors`; whether anything in it may draw random numbers."""
    draws = isinstance(module, Block) and module.may_draw()
    for tensors in (module._parameters, module._buffers):
        for name, value in tensors.items():
            if value is not None:
                params[prefix + name] = value
    for name, child in module._modules.items():
        if child is not None:
            draws = _collect(child, f"{prefix}{name}.", params) or draws
    return draws


def own_tensors(module: nn.Module) -> Params:
    """The module's own parameters and buffers by name, not copied."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def apply(block: Block, params: Params, x: Tree, ctx: Context | None = None) -> Tree:
    """Run a block on stacked parameters: a loop over the learners of `block(x[i])` with parameters `[i]`, in one go.

    Args:
        block: any block; its own tensors are not used.
        params: as `stack` makes them, each `[*L, ...]`.
        x: `[*L, ..., features]`, or a dictionary of such tensors where the block takes one.
        ctx: mode and key; evaluation without a key where it is left out.

    Returns:
        `[*L, ..., features]`

    Raises:
        ValueError: `x` does not start with the learner axes of `params`, or its features do not fit.
    """
    return block.run(params, x, Context() if ctx is None else ctx)


def stack(factory: Callable[[], nn.Module], seeds: Tensor) -> Params:
    """One set of initial parameters and buffers for every learner.

    Every module is built under its own seed, so that a learner's weights depend on that alone: not on the other
    learners, and not on torch's global generator, which is left as it was. They are built on the CPU, so that they
    are the same on every device.

    Args:
        factory: builds the module.
        seeds: integers `[*L]`, keys for instance; the parameters go to its device.

    Returns:
        Every parameter and buffer under its name, `[*L, ...]`.

    Raises:
        SettingError: there is no learner, the factory returns no module, a parameter is lazy or shapes differ.
    """
    if seeds.numel() == 0 or seeds.is_floating_point():
        raise SettingError(
            f"seeds have shape {tuple(seeds.shape)} and dtype {seeds.dtype}, expected integers, one or more"
        )
    states = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for seed in seeds.reshape(-1).tolist():
            torch.default_generator.manual_seed(seed)
            module = factory()
            if not isinstance(module, nn.Module):
                raise SettingError(f"the network factory returned {type(module).__name__}, expected a torch.nn.Module")
            states.append(own_tensors(module))
    if any(nn.parameter.is_lazy(value) for value in states[0].values()):
        raise SettingError("a lazy module has no parameters before its first call: give it its input features")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise SettingError("the factory built networks of different shapes: learners of one batch share every shape")
    return {
        name: torch.stack([state[name].detach() for state in states])
        .reshape(seeds.shape + states[0][name].shape)
        .to(seeds.device)
        for name in states[0]
    }


def split(block: nn.Module, params: Params) -> tuple[Params, Params]:
    """Separate what an optimizer may change from the rest.

    Args:
        block: the module that `params` belongs to.
        params: parameters and buffers.

    Returns:
        The parameters that require gradients in `block`; the frozen ones and the buffers.
    """
    trainable = {name for name, value in block.named_parameters() if value.requires_grad}
    parameters = {name: value for name, value in params.items() if name in trainable}
    return parameters, {name: value for name, value in params.items() if name not in trainable}


def learner_axes(block: Block, params: Params, ctx: Context, prefix: str) -> int:
    """How many learner axes there are: by the context, else by a parameter of the block, else by the key, else none."""
    if ctx.learner_axes is not None:
        return ctx.learner_axes
    if block._anchor is None:
        block._anchor = next(((name, value.dim()) for name, value in own_tensors(block).items()), ("", 0))
    name, dims = block._anchor
    if name:
        return params[prefix + name].dim() - dims
    return 0 if ctx.key is None else ctx.key.dim()


def with_learner_axes(block: Block, params: Params, ctx: Context, prefix: str) -> Context:
    """The context with its learner axes filled in, which shares `new_buffers` with the one given."""
    if ctx.learner_axes is not None:
        return ctx
    return replace(ctx, learner_axes=learner_axes(block, params, ctx, prefix))


def share_tensors(block: Block, module: nn.Module) -> None:
    """Make the tensors and children of `module` those of `block` under the same names, so that state dicts fit both."""
    block._parameters, block._buffers, block._modules = module._parameters, module._buffers, module._modules
    block._non_persistent_buffers_set = module._non_persistent_buffers_set
    block.training = module.training


def fetch(block: nn.Module, params: Params, prefix: str, name: str) -> Tensor | None:
    """The tensor `name` of the block in `params`, or None where the block was made without it."""
    if block._parameters.get(name) is None and block._buffers.get(name) is None:
        return None
    return params[prefix + name]


def latest(params: Params, ctx: Context, name: str) -> Tensor:
    """A buffer as an earlier forward pass in this context left it, so that a second one continues the first."""
    value = ctx.new_buffers.get(name)
    return params[name] if value is None else value


def between(parameter: Tensor, x: Tensor, axes: int) -> Tensor:
    """`[*L, *F]` as `[*L, 1, ..., 1, *F]`, so that it broadcasts against `x` `[*L, ..., *F]`.

    Args:
        parameter: a tensor with `axes` learner axes.
        x: the data it meets.
        axes: how many learner axes there are.

    Raises:
        ValueError: `x` does not start with the learner axes of `parameter`.
    """
    if x.shape[:axes] != parameter.shape[:axes] or x.dim() < parameter.dim():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected the learner axes {tuple(parameter.shape[:axes])} in front and "
            f"features {tuple(parameter.shape[axes:])} behind"
        )
    return parameter.reshape(parameter.shape[:axes] + (1,) * (x.dim() - parameter.dim()) + parameter.shape[axes:])
