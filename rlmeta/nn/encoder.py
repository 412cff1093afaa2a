"""Observation encoder: observations of any Gymnasium space as a feature vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional.tree import Tree
from rlmeta.nn.block import Block, Context, Params, own_tensors, with_learner_axes
from rlmeta.nn.lift import lift

ACTION_MASK = "action_mask"
"""Key of the action mask in a Dict observation, which is no feature."""

Choose: TypeAlias = Callable[[gym.Space], nn.Module | None]
"""Function from a part of an observation space to the network of its observations, or None for the plain encoding."""


def feature_axes(space: gym.Space, path: str = "") -> Tree:
    """Count the feature axes of an observation of `space`, after its learner and batch axes.

    Args:
        space: an observation space.
        path: of the space in a larger one, for the error message.

    Returns:
        A number, or a dictionary of them for Dict and Tuple (whose entries are named "0", "1", ...).

    Raises:
        SpaceError: the space is not one of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple.
    """
    if isinstance(space, gym.spaces.Dict):
        return {name: feature_axes(child, f"{path}[{name!r}]") for name, child in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return {str(index): feature_axes(child, f"{path}[{index}]") for index, child in enumerate(space.spaces)}
    if isinstance(space, gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        return len(space.shape or ())
    raise SpaceError(
        f"observation space{path} is {space}, whose size is not fixed: expected Box, Discrete, MultiDiscrete, "
        "MultiBinary, Dict or Tuple; wrap the environment in gymnasium.wrappers.TransformObservation to make it one"
    )


def space_leaves(space: gym.Space, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], gym.Space]]:
    """Parts of an observation space that are no Dict or Tuple, with their paths, in the order of an `Encoder`."""
    if isinstance(space, gym.spaces.Dict):
        for name, child in sorted(space.spaces.items()):
            if name != ACTION_MASK:
                yield from space_leaves(child, (*path, name))
    elif isinstance(space, gym.spaces.Tuple):
        for index, child in enumerate(space.spaces):
            yield from space_leaves(child, (*path, str(index)))
    else:
        yield path, space


def _one_hot(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return (x.unsqueeze(-1) == torch.arange(size, device=x.device)).to(dtype)


def byte_bound(space: gym.Space) -> float | Tensor | None:
    """Divisor of a byte space: its largest declared values, as one number or one for each entry; else None.

    Only bytes (uint8) are scaled, and only while they are bytes: floats and wider integers are taken as they are, also
    where a wrapper or `normalise_observation` has converted bytes to floats.
    """
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8 or space.high.size == 0:
        return None
    high = np.maximum(space.high, 1).reshape(-1)
    if (high == high[0]).all():
        return float(high[0])
    return torch.tensor(high.tolist(), dtype=torch.float32, device="cpu")


def _one_hots(x: Tensor, axes: int, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """One-hot vectors side by side of the entries of `[..., *shape]`, whose shape has so many `axes`."""
    columns = x.reshape(*x.shape[: x.dim() - axes], len(sizes)).unbind(-1)
    return torch.cat([_one_hot(column, size, dtype) for column, size in zip(columns, sizes)], -1)


def _flattened(x: Tensor, axes: int, size: int, bound: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """Entries of `[..., *shape]` as `[..., size]`, bytes divided by their bound."""
    divisor = bound if x.dtype == torch.uint8 else None
    x = x.to(dtype)
    if axes != 1:
        x = x.reshape(*x.shape[: x.dim() - axes], size)
    if divisor is None:
        return x
    return x / (divisor.to(x) if isinstance(divisor, Tensor) else divisor)


def _leaf_encoder(space: gym.Space, dtype: torch.dtype) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Number of features of an elementary space, and its encoding function `[..., *shape]` -> `[..., D]`.

    It is a partial of a module's function, which can be pickled with the network around it; a closure cannot.
    """
    axes = len(space.shape or ())
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n), partial(_one_hot, size=int(space.n), dtype=dtype)
    if isinstance(space, gym.spaces.MultiDiscrete):
        sizes = space.nvec.reshape(-1).tolist()
        return sum(sizes), partial(_one_hots, axes=axes, sizes=sizes, dtype=dtype)
    size = int(np.prod(space.shape or ()))
    return size, partial(_flattened, axes=axes, size=size, bound=byte_bound(space), dtype=dtype)


class Encoder(Block):
    """Observation encoder: any supported space to features `[*L, ..., D]`.

    Box is flattened (bytes, as in images, are divided by their bound, see `byte_bound`); Discrete and MultiDiscrete,
    counted from 0, become one-hot vectors; MultiBinary becomes zeros and ones. Entries of Dict are concatenated in
    alphabetical order, without the key "action_mask"; those of Tuple in their own order. A Tuple's observation is a
    dictionary with the keys "0", "1", ..., or a tuple.

    `choose` gives parts of the space networks of their own: convolutions for pictures (`picture_cnn`), an embedding for
    a Discrete of many values, attention for a set of entities. Without it the encoder has no parameters.
    """

    features: int
    """D, the number of features."""

    def __init__(
        self, observation_space: gym.Space, dtype: torch.dtype = torch.float32, *, choose: Choose | None = None
    ) -> None:
        """Create the encoder.

        Args:
            observation_space: of a single environment.
            dtype: of the features.
            choose: function from a space without parts, as in a Dict, to a network `[B, *shape]` -> `[B, D]` for its
                observations, as they come; or to None for the encoding above.

        Raises:
            SpaceError: a part of the space is not supported, or nothing is left to observe.
            SettingError: a network of `choose` gives no features `[B, D]`.
        """
        super().__init__()
        feature_axes(observation_space)
        self._dtype = dtype
        self._entries: list[tuple[tuple[str, ...], tuple[int, ...], Callable[[Tensor], Tensor] | str]] = []
        self.features = 0
        for index, (path, space) in enumerate(space_leaves(observation_space)):
            shape = tuple(space.shape or ())
            network = None if choose is None else choose(space)
            if network is None:
                size, encode = _leaf_encoder(space, dtype)
                self._entries.append((path, shape, encode))
            else:
                block = lift(network, len(shape))
                size = _width(block, space)
                self.add_module(str(index), block)
                self._entries.append((path, shape, str(index)))
            self.features += size
        if self.features == 0:
            raise SpaceError(f"observation space {observation_space} has no entry to learn from: give it at least one")

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Tensor:
        """Encode observations `[*L, ..., *shape]`, a dictionary of them for Dict, as `[*L, ..., D]`."""
        parts = []
        for path, shape, encode in self._entries:
            leaf = x
            for name in path:
                leaf = _entry(leaf, name)
            if not isinstance(leaf, Tensor) or tuple(leaf.shape[leaf.dim() - len(shape) :]) != shape:
                received = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"observation{list(path) or ''} has shape {received}, expected {('...', *shape)}")
            if isinstance(encode, str):
                block: Block = self._modules[encode]  # type: ignore[assignment]
                parts.append(
                    block.run(params, leaf, with_learner_axes(self, params, ctx, prefix), f"{prefix}{encode}.")
                )
            else:
                parts.append(encode(leaf))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _width(block: Block, space: gym.Space) -> int:
    """Number of features of a network of a part of a space, by a dry run in evaluation."""
    whole = not isinstance(space, gym.spaces.Box)
    dtype = torch.int64 if whole else torch.uint8 if space.dtype == np.uint8 else torch.float32
    own = own_tensors(block)
    device = next((value.device for value in own.values()), torch.device("cpu"))
    with torch.no_grad():
        x = torch.zeros(2, *(space.shape or ()), dtype=dtype, device=device)
        out = block.run(own, x, Context(learner_axes=0))
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != 2 or not out.shape[1]:
        received = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise SettingError(f"the network of {space} must give features [B, D]; for B = 2 it gave {received}")
    return int(out.shape[1])


def _entry(x: Tree, name: str) -> Tree:
    if isinstance(x, dict) and name in x:
        return x[name]
    if isinstance(x, tuple) and name.isdigit() and int(name) < len(x):
        return x[int(name)]
    entries = f"the keys {list(x)}" if isinstance(x, dict) else type(x).__name__
    raise SpaceError(f"the observation has no entry {name!r}, which its space has: it has {entries}")
