"""Lifting: converts PyTorch modules to blocks, which run on stacked parameters; sequences of modules."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlmeta.errors import SettingError
from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params, share_tensors, with_learner_axes
from rlmeta.nn.lifted import Lifted, hooked, replacement
from rlmeta.nn.linear import Activation, Flatten, Linear
from rlmeta.nn.norm import LayerNorm
from rlmeta.nn.weight_norm import NormedWeight, is_normed

_ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)


def lift(module: nn.Module, feature_axes: Tree | None = None) -> Block:
    """Convert a PyTorch module to a block, which runs on stacked parameters.

    A learner `i` gets `module(x[i])` under its own parameters: the module is written for one learner and sees no
    learner axis. Names stay those of the module, so its state dicts can be loaded and saved, and it shares its tensors
    with the block. Linear, LayerNorm, BatchNorm, Dropout, Embedding, Flatten, elementwise activations, layers with
    weight or spectral normalisation (`torch.nn.utils.parametrizations`) and sequences of them become the blocks of this
    package. A copy of any other module runs under `torch.func.vmap`, or in a loop over the learners where an operation
    has no batching rule (an LSTM). In the copy, batch normalisation, dropout, embeddings and normalised weights are
    replaced by this package's, buffers that the module writes are returned, and other random numbers come from torch's
    generator, seeded by the context's key. Every submodule keeps the mode, `train()` or `eval()`, that it has when it
    is lifted; those in `train()` train where the context says so, `Context(training=True, key=key)`.

    Learners and environments share one call of the module, so it must not mix the rows of its batch, keep memory
    between calls, or draw random numbers without a key. Learners check this for a `network=` (`rlmeta.nn.checks`),
    since they know its inputs; `lift` alone does not.

    Args:
        module: any module of one input; blocks are returned as they are. A dictionary of tensors is one input.
        feature_axes: how many axes of `x` are features (for an image 3), as a number or as a dictionary in the shape of
            `x`; see `feature_axes` of a space. All axes between the learners' and these are folded into one batch
            axis for the module. None: the module gets `x[i]` unchanged.

    Returns:
        The block.

    Raises:
        SettingError: `module` is no module, or cannot be copied.
    """
    if not isinstance(module, nn.Module):
        raise SettingError(f"cannot lift {type(module).__name__}: expected a torch.nn.Module, built (not its class)")
    block = _native(module)
    if block is None:
        block = Lifted(module)
    return block if feature_axes is None else Folded(block, feature_axes)


def _native(module: nn.Module) -> Block | None:
    """Convert a module to an equivalent block of this package, sharing its tensors; None if there is none."""
    if isinstance(module, Block):
        return module
    if hooked(module):
        return None
    kind = type(module)
    block: Block
    if kind is nn.Sequential:
        block = Sequential(OrderedDict(module._modules))  # type: ignore[arg-type]
        block.training = module.training
    elif kind is nn.Linear:
        block = Linear(0, 0, bias=False, initialiser="orthogonal")
        share_tensors(block, module)
    elif kind is nn.LayerNorm:
        block = LayerNorm(module.normalized_shape, module.eps)  # type: ignore[arg-type]
        share_tensors(block, module)
    elif kind is nn.Flatten:
        block = Flatten(module.start_dim, module.end_dim)  # type: ignore[arg-type]
    elif kind in _ELEMENTWISE:
        block = Activation(module)
    elif is_normed(module):
        block = NormedWeight(module, lift)
    else:
        return replacement(module)
    return block


class Sequential(Block):
    """Sequence of blocks named "0", "1", ... as in `nn.Sequential`; other modules are lifted."""

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module]) -> None:
        """Create the sequence from modules, or from one ordered dictionary of named modules."""
        super().__init__()
        named = modules[0] if len(modules) == 1 and isinstance(modules[0], OrderedDict) else None
        for name, module in named.items() if named is not None else enumerate(modules):
            if not isinstance(module, nn.Module):
                raise SettingError(f"Sequential was given {type(module).__name__}, expected modules")
            self.add_module(str(name), lift(module))

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """Run the blocks in turn, each on the output of the previous."""
        ctx = with_learner_axes(self, params, ctx, prefix)
        for name, block in self._modules.items():
            x = block.run(params, x, ctx, f"{prefix}{name}.")  # type: ignore[union-attr, operator]
        return x


class Folded(Block):
    """Block whose batch axes, however many, are folded into one before it runs and unfolded afterwards."""

    def __init__(self, inner: Block, feature_axes: Tree) -> None:
        """Create the block around `inner`, whose tensors keep their names; `feature_axes` as for `lift`."""
        super().__init__()
        self._inner = (inner,)
        self._feature_axes = feature_axes
        self._calls_parts = inner._calls_parts
        share_tensors(self, inner)

    def may_draw(self) -> bool:
        """As the inner block."""
        return self._inner[0].may_draw()

    def trains_otherwise(self) -> bool:
        """As the inner block."""
        return self._inner[0].trains_otherwise()

    def keeps_ties(self) -> bool:
        """As the inner block."""
        return self._inner[0].keeps_ties()

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tree:
        """Run the inner block on one batch axis: `[*L, ..., *features]` -> `[*L, ..., *features]`."""
        inner = self._inner[0]
        ctx = with_learner_axes(inner, params, ctx, prefix)
        axes = ctx.learner_axes or 0
        batches: list[torch.Size] = []
        x = _fold(x, self._feature_axes, axes, batches, "")
        if any(batch != batches[0] for batch in batches):
            raise ValueError(
                f"the entries of x have the batch axes {[tuple(batch) for batch in batches]}, expected one"
            )

        def unfold(y: Tensor) -> Tensor:
            return y.reshape(y.shape[:axes] + batches[0] + y.shape[axes + 1 :])

        return pytree.tree_map_only(Tensor, unfold, inner.run(params, x, ctx, prefix))


def _fold(x: Tree, feature_axes: Tree, axes: int, batches: list[torch.Size], path: str) -> Tree:
    if isinstance(feature_axes, dict):
        if not isinstance(x, dict) or not feature_axes.keys() >= x.keys():
            entries = list(x) if isinstance(x, dict) else type(x).__name__
            raise ValueError(f"x{path} has the entries {entries}, expected some of {list(feature_axes)}")
        return {name: _fold(x[name], feature_axes[name], axes, batches, f"{path}[{name!r}]") for name in x}
    end = x.dim() - feature_axes
    if end < axes:
        raise ValueError(
            f"x{path} has shape {tuple(x.shape)}, expected {axes} learner axes and {feature_axes} feature axes, or more"
        )
    batches.append(x.shape[axes:end])
    return x.reshape(*x.shape[:axes], x.shape[axes:end].numel(), *x.shape[end:])
