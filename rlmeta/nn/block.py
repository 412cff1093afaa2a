"""Blocks: ordinary modules that also run on parameters with any number of leading learner axes."""

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
"""Held by whoever uses what all threads share: torch's generator under a seed, the tensors inside a lifted module."""


class NeedsKey(SettingError):
    """A block draws random numbers, and its context has no key."""


@dataclass(slots=True)
class Context:
    """What travels with a forward pass.

    Attributes:
        training: False evaluates every block; True trains those that are in training mode themselves, so that one
            that was put in `eval()` (a frozen batch normalisation) stays as it is.
        key: `[*L]`, for what draws random numbers; a caller passes another one in every step.
        new_buffers: filled in training by what keeps statistics, under the names of `Params`; `{**params,
            **new_buffers}` is what the next step starts from. Nothing is written in place.
        learner_axes: how many learner axes there are, where a block has no parameter to tell it by. Containers fill it.
        taps: None, or what every linear layer leaves its calls in, `{place in params: [(input, output), ...]}`: with
            the gradient at the output, the gradient of every single sample follows (`nn.sample_gradients`).
    """

    training: bool = False
    key: Tensor | None = None
    new_buffers: Params = field(default_factory=dict)
    learner_axes: int | None = None
    taps: dict[str, list[tuple[Tensor, Tensor]]] | None = None


class _Finished(type):
    """Tells a block when it has been made."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        block = super().__call__(*args, **named)
        block.__dict__["_finished"] = True
        return block


class Block(nn.Module, metaclass=_Finished):
    """A module with one computation for its own tensors and for any number of learners at once.

    `block(x)` runs it on its own parameters as every `nn.Module` does; `run` on those it is given. Subclasses
    implement `run`, and register parameters and buffers as usual, in float32 on the CPU.

    A block knows its parts, and computes with them without calling them as modules. So what torch does by hooks, by
    replacing a layer or by a parametrization (weight norm, pruning) is for the module before it is lifted; on a block
    it is refused, once that is made.
    """

    _finished = False
    _bare = False
    """Whether the block serves to run on others' tensors alone, and has none of its own; see `bare`."""
    _calls_parts = False
    """Whether it calls its parts as modules, with the tensors they are to use in them."""

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

    def trains(self, ctx: Context) -> bool:
        """Whether this block itself is to train: in a context that trains, unless it was put in `eval()`."""
        return ctx.training and self.training

    def forward(self, x: Tree) -> Tree:
        """Run on the block's own tensors as an ordinary module: no learner axes, buffers written, torch's generator."""
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

    # ------------------------------------------------------------------ what a block is made of stays

    def __setattr__(self, name: str, value: Any) -> None:
        if self._finished and isinstance(value, nn.Module):
            self._refuse(f"new part {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if any(name in parts for parts in (self._parameters, self._buffers, self._modules)):
            self._refuse(f"removal of {name!r}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's, until the block is made; afterwards a parameter may only take the place of its like."""
        if self._finished and name not in self._parameters:
            self._refuse(f"new part {name!r}")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As torch's, until the block is made."""
        if self._finished:
            self._refuse(f"new part {name!r}")
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch's, until the block is made."""
        if self._finished:
            self._refuse(f"new part {name!r}")
        super().add_module(name, module)

    def register_forward_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: see the class."""
        self._refuse("hook")

    def register_forward_pre_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: see the class."""
        self._refuse("hook")

    def register_full_backward_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: see the class."""
        self._refuse("hook")

    def register_full_backward_pre_hook(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: see the class."""
        self._refuse("hook")

    def _refuse(self, what: str) -> NoReturn:
        raise SettingError(
            f"{type(self).__name__} is a block, which computes with its parts without calling them, so once it is made "
            f"it takes no {what}: change, prune, parametrize or hook the torch.nn.Module first, then lift it"
        )


AnyBlock = TypeVar("AnyBlock", bound=Block)


def _collect(module: nn.Module, prefix: str, params: Params) -> tuple[bool, bool]:
    """Gather the module's own tensors, faster than `own_tensors`; whether anything in it may draw, and is to train."""
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
    """Networks to run on a learner's weights, with no numbers of their own that could be taken for trained ones.

    Their tensors are on the device "meta", and calling one as a module, or asking for its state, is refused.

    Args:
        networks: makes them by name; torch's generator is left as it was.
    """
    with alone, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        made = networks()
    return {name: _without_numbers(block) for name, block in made.items()}


def _without_numbers(block: AnyBlock) -> AnyBlock:
    """A copy whose tensors have shapes alone; the block, which may share its own with a user's module, stays."""
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
    anchor = _first_tensor(block, "_parameters") or _first_tensor(block, "_buffers")
    if anchor is not None:
        name, dims = anchor
        return params[prefix + name].dim() - dims
    return 0 if ctx.key is None else ctx.key.dim()


def _first_tensor(module: nn.Module, kind: str) -> tuple[str, int] | None:
    """Name of a tensor of the module and how many axes it has for one learner."""
    for name, value in getattr(module, kind).items():
        if value is not None:
            return name, value.dim()
    for name, child in module._modules.items():
        found = None if child is None else _first_tensor(child, kind)
        if found is not None:
            return f"{name}.{found[0]}", found[1]
    return None


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
