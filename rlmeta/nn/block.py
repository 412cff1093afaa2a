"""Blocks: PyTorch modules that also run on stacked parameters with any number of leading learner axes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError
from rlmeta.functional.tree import Tree

Params: TypeAlias = dict[str, Tensor]
"""Parameters and buffers under torch's state-dict names, each `[*L, ...]` with torch's own shape at its end."""

alone = threading.RLock()
"""Lock around state that all threads share: torch's seeded generator, and the tensors inside a lifted module."""


class NeedsKey(SettingError):
    """A block draws random numbers and the context has no key for them."""


@dataclass(slots=True)
class Context:
    """Options and outputs of a forward pass besides its input: mode, random key, new buffers.

    Attributes:
        training: False evaluates every block; True trains those that are in training mode themselves, so that a
            block in `eval()` (a frozen batch normalisation) is not changed.
        key: random key `[*L]` of blocks that draw numbers; a caller passes another one at every step.
        new_buffers: filled in training by blocks with running statistics, under the names of `Params`; the next step
            starts from `{**params, **new_buffers}`. Nothing is written in place.
        learner_axes: number of learner axes, for blocks without a parameter that shows it. Containers fill it in.
        taps: None, or a dictionary in which every linear layer records its calls, `{prefix in params: [(input,
            output), ...]}`. With the gradient at the output they give per-sample gradients (`nn.sample_gradients`).
    """

    training: bool = False
    key: Tensor | None = None
    new_buffers: Params = field(default_factory=dict)
    learner_axes: int | None = None
    taps: dict[str, list[tuple[Tensor, Tensor]]] | None = None


class _Finished(type):
    """Metaclass that marks a block as complete once its `__init__` has returned."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        block = super().__call__(*args, **named)
        block.__dict__["_finished"] = True
        return block


class Block(nn.Module, metaclass=_Finished):
    """Module whose forward pass also runs on the stacked parameters of any number of learners at once.

    `block(x)` runs it on its own parameters as every `nn.Module` does; `run` takes parameters as an argument.
    Subclasses implement `run`, and register parameters and buffers as usual, in float32 on the CPU.

    A block computes with its submodules' tensors without calling them as modules. Hooks, replaced layers and
    parametrizations (weight norm, pruning) would therefore have no effect: apply them to a module before it is lifted;
    on a complete block they are refused.
    """

    _finished = False
    _bare = False
    """Whether the block has no values of its own and only runs on parameters passed to `run`; see `bare`."""
    _calls_parts = False
    """Whether it calls its submodules as modules, after putting the tensors to use into them."""

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """Forward pass on the tensors in `params`.

        Args:
            params: tensors `[*L, ...]`; this block's are those whose name starts with `prefix`.
            x: `[*L, ..., features]`, with exactly the learner axes of the parameters in front.
            ctx: mode, key, and where new buffers go.
            prefix: of this block's names in `params`, empty or ending in a dot.

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
        """Whether tied weights of this block are one tensor in `params`, under their first name."""
        return False

    def trains_otherwise(self) -> bool:
        """Whether this block itself, in its own mode, computes something else in training than in evaluation."""
        return False

    def trains(self, ctx: Context) -> bool:
        """Whether this block itself is in training mode: the context trains, and it was not put in `eval()`."""
        return ctx.training and self.training

    def forward(self, x: Tree) -> Tree:
        """Forward pass on the block's own tensors, as in any module: no learner axes, buffers updated in place."""
        if self._bare:
            _refuse_bare(self)
        params: Params = {}
        draws, training = _collect(self, "", params)
        with alone:
            key = torch.randint(-(2**62), 2**62, (), device="cpu") if draws else None
        ctx = Context(training=training, key=key, learner_axes=0)
        out = self.run(params, x, ctx)
        with torch.no_grad():
            for name, value in ctx.new_buffers.items():
                params[name].copy_(value)
        return out

    # ------------------------------------------------------------------ submodules and tensors cannot change

    def __setattr__(self, name: str, value: Any) -> None:
        if self._finished and isinstance(value, nn.Module):
            self._refuse(f"new part {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if any(name in parts for parts in (self._parameters, self._buffers, self._modules)):
            self._refuse(f"removal of {name!r}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`'s; once the block is complete, only to replace a parameter of the same name."""
        if self._finished and name not in self._parameters:
            self._refuse(f"new part {name!r}")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As `nn.Module`'s, until the block is complete."""
        if self._finished:
            self._refuse(f"new part {name!r}")
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As `nn.Module`'s, until the block is complete."""
        if self._finished:
            self._refuse(f"new part {name!r}")
        super().add_module(name, module)

    def register_forward_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: a block does not call its submodules, so hooks would not run."""
        self._refuse("hook")

    def register_forward_pre_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: a block does not call its submodules, so hooks would not run."""
        self._refuse("hook")

    def register_full_backward_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: a block does not call its submodules, so hooks would not run."""
        self._refuse("hook")

    def register_full_backward_pre_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: a block does not call its submodules, so hooks would not run."""
        self._refuse("hook")

    def _refuse(self, what: str) -> NoReturn:
        raise SettingError(
            f"{type(self).__name__} is a block, which computes with its parts without calling them, so once it is made "
            f"it takes no {what}: change, prune, parametrize or hook the torch.nn.Module first, then lift it"
        )


AnyBlock = TypeVar("AnyBlock", bound=Block)


def _collect(module: nn.Module, prefix: str, params: Params) -> tuple[bool, bool]:
    """Collect the module's tensors, faster than `own_tensors`; whether a part may draw, and whether one trains."""
    draws, training = isinstance(module, Block) and module.may_draw(), module.training
    for tensors in (module._parameters, module._buffers):
        for name, value in tensors.items():
            if value is not None:
                params[prefix + name] = value
    for name, child in module._modules.items():
        if child is not None:
            child_draws, child_trains = _collect(child, f"{prefix}{name}.", params)
            draws, training = child_draws or draws, child_trains or training
    return draws, training


# ---------------------------------------------------------------------- blocks without tensors of their own


def bare(networks: Callable[[], Mapping[str, AnyBlock]]) -> dict[str, AnyBlock]:
    """Build networks without weights of their own, which run on a learner's parameters alone.

    Initial weights could be mistaken for trained ones, so their tensors are on the device "meta", and calling such a
    network as a module, or asking for its state dict, is refused.

    Args:
        networks: builds them by name; torch's generator is left as it was.
    """
    with alone, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        built = networks()
    return {name: _without_numbers(block) for name, block in built.items()}


def _without_numbers(block: AnyBlock) -> AnyBlock:
    """Copy a block with its tensors on the device "meta"; the block itself may share a user's tensors."""
    memo: dict[int, Any] = {}
    for value in own_tensors(block).values():
        empty = torch.empty_like(value, device="meta")
        is_parameter = isinstance(value, nn.Parameter)
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
    copied = copy.deepcopy(block, memo)
    _mark_bare(copied)
    return copied


def _mark_bare(block: Block) -> None:
    block._bare = True
    block.register_state_dict_pre_hook(_refuse_bare)  # type: ignore[no-untyped-call]
    if not block._calls_parts:
        for part in block._modules.values():
            if isinstance(part, Block):
                _mark_bare(part)


def _refuse_bare(block: nn.Module, *_: Any) -> NoReturn:
    raise SettingError(
        f"this {type(block).__name__} has no weights of its own, those of the learners are in the run's state: "
        "run.module(learner) gives a trained torch.nn.Module to call, to save or to export"
    )


def own_tensors(module: nn.Module) -> Params:
    """Collect the parameters and buffers of a module by name, without copies."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def apply(block: Block, params: Params, x: Tree, ctx: Context | None = None) -> Tree:
    """Run a block on stacked parameters: `block(x[i])` with parameters `[i]` for all learners at once.

    Args:
        block: any block; its own tensors are not used.
        params: as `stack` returns them, each `[*L, ...]`.
        x: `[*L, ..., features]`, or a dictionary of such tensors where the block takes one.
        ctx: mode and key; None for evaluation without a key.

    Returns:
        `[*L, ..., features]`

    Raises:
        ValueError: `x` does not start with the learner axes of `params`, or its features do not fit.
        SettingError: there is no context, gradients of `params` are recorded, and a part in training mode (dropout,
            batch normalisation) would be evaluated: it does not follow whether that is meant.
    """
    if ctx is None:
        _check_mode(block, params)
        ctx = Context()
    return block.run(params, x, ctx)


def _check_mode(block: Block, params: Params) -> None:
    """Refuse to differentiate an evaluation that nobody asked for, of a block that trains otherwise."""
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in params.values()):
        return
    for name, part in block.named_modules():
        if differs_in_training(part):
            raise SettingError(
                f"{type(part).__name__} {name!r} is in training mode and gradients are recorded, but apply was given "
                "no ctx: pass Context(training=True, key=...) to train it, Context() to evaluate it, or lift the "
                "module after eval()"
            )


def differs_in_training(module: nn.Module) -> bool:
    """Whether a module itself, in its own mode, computes something else in training: dropout, batch normalisation."""
    if isinstance(module, Block):
        return module.trains_otherwise()
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.training and module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0.0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.training and module.dropout > 0.0
    return module.training and isinstance(module, nn.RReLU)


def stack(factory: Callable[[], nn.Module], seeds: Tensor) -> Params:
    """Initialise stacked parameters and buffers, one set per learner.

    Every module is built under its own seed, so that a learner's weights depend on its seed alone: not on the other
    learners, and not on torch's global generator, which is left as it was. They are built on the CPU, so that they are
    the same on every device.

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
    with alone, torch.random.fork_rng(devices=[]), torch.device("cpu"):
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
    """Split parameters into trainable ones and the rest.

    Args:
        block: the module that `params` belongs to.
        params: parameters and buffers.

    Returns:
        The parameters that require gradients in `block`, and the frozen ones with the buffers.
    """
    trainable = {name for name, value in block.named_parameters() if value.requires_grad}
    parameters = {name: value for name, value in params.items() if name in trainable}
    return parameters, {name: value for name, value in params.items() if name not in trainable}


def learner_axes(block: Block, params: Params, ctx: Context, prefix: str) -> int:
    """Number of learner axes: by the context, else by a parameter of the block, else by the key, else 0."""
    if ctx.learner_axes is not None:
        return ctx.learner_axes
    anchor = _first_tensor(block, "_parameters") or _first_tensor(block, "_buffers")
    if anchor is not None:
        name, dims = anchor
        return params[prefix + name].dim() - dims
    return 0 if ctx.key is None else ctx.key.dim()


def _first_tensor(module: nn.Module, kind: str) -> tuple[str, int] | None:
    """Find the first tensor of a module: its name, and its number of axes for one learner."""
    for name, value in getattr(module, kind).items():
        if value is not None:
            return name, value.dim()
    for name, child in module._modules.items():
        first = None if child is None else _first_tensor(child, kind)
        if first is not None:
            return f"{name}.{first[0]}", first[1]
    return None


def with_learner_axes(block: Block, params: Params, ctx: Context, prefix: str) -> Context:
    """Fill in the learner axes of a context; the copy shares `new_buffers` with `ctx`."""
    if ctx.learner_axes is not None:
        return ctx
    return replace(ctx, learner_axes=learner_axes(block, params, ctx, prefix))


def share_tensors(block: Block, module: nn.Module) -> None:
    """Let `block` share the tensors and children of `module` under the same names, so that state dicts fit both."""
    block._parameters, block._buffers, block._modules = module._parameters, module._buffers, module._modules
    block._non_persistent_buffers_set = module._non_persistent_buffers_set
    block.training = module.training


def fetch(block: nn.Module, params: Params, prefix: str, name: str) -> Tensor | None:
    """Look up a tensor of a block in `params`; None if the block has none of this name (no bias, for example).

    Args:
        block: whose tensor it is.
        params: tensors by name.
        prefix: of the block's names in `params`.
        name: of the tensor within the block.
    """
    if block._parameters.get(name) is None and block._buffers.get(name) is None:
        return None
    return params[prefix + name]


def latest(params: Params, ctx: Context, name: str) -> Tensor:
    """Look up the latest value of a buffer: from an earlier forward pass in this context, else from `params`."""
    value = ctx.new_buffers.get(name)
    return params[name] if value is None else value


def between(parameter: Tensor, x: Tensor, axes: int) -> Tensor:
    """Reshape a parameter `[*L, *F]` to `[*L, 1, ..., 1, *F]`, which broadcasts against `x` `[*L, ..., *F]`.

    Args:
        parameter: a tensor with `axes` learner axes.
        x: data `[*L, ..., *F]`.
        axes: number of learner axes.

    Raises:
        ValueError: `x` does not start with the learner axes of `parameter`.
    """
    if x.shape[:axes] != parameter.shape[:axes] or x.dim() < parameter.dim():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected the learner axes {tuple(parameter.shape[:axes])} in front and "
            f"features {tuple(parameter.shape[axes:])} behind"
        )
    return parameter.reshape(parameter.shape[:axes] + (1,) * (x.dim() - parameter.dim()) + parameter.shape[axes:])
