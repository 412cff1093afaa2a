"""Gymnasium's spaces and values as trees of tensors, and back.

| space | tensor of an observation or action | what an environment gets |
|---|---|---|
| `Box`, uint8 | uint8 | clipped to the bounds, in the space's own dtype |
| `Box`, any other dtype | float32 | clipped to the bounds (rounded for integers), in the space's own dtype |
| `Discrete` | int64, counted from 0 | `start` added |
| `MultiDiscrete` | int64, counted from 0 | `start` added |
| `MultiBinary` | int64, 0 or 1 | int8 |
| `Dict` | a dictionary of these | the same |
| `Tuple` | a dictionary with the names "0", "1", ... | a tuple |

Nothing is cast in silence that could lose more than precision: a float for an integer space, or any array of another
shape, is a `SpaceError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlmeta.errors import SpaceError
from rlmeta.functional.tree import Tree, flatten, unflatten

Array = np.ndarray[Any, np.dtype[Any]]


class FrameStack(spaces.Box):
    """Space of stacked frames: the last k observations of an environment, along the first axis, the newest last.

    At a reset the first one is repeated k times, as by gymnasium's FrameStackObservation. Of an environment that
    declares its observations so, a replay memory stores each frame once.
    """


_ADVICE = (
    "rlmeta takes Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple; "
    "wrap the environment (gymnasium.ObservationWrapper or ActionWrapper) to turn it into one of these"
)


@dataclass(frozen=True, eq=False)
class Leaf:
    """Leaf of a space: one array within its values, and the dtype that it is stored in as a tensor."""

    path: tuple[str | int, ...]
    space: gym.Space[Any]

    @cached_property
    def name(self) -> str:
        """Its path in the flattened tree; '' where the space is no Dict or Tuple."""
        return "/".join(map(str, self.path))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value."""
        return tuple(self.space.shape or ())

    @cached_property
    def is_box(self) -> bool:
        """Whether it is a Box; everything else is discrete."""
        return isinstance(self.space, spaces.Box)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that the environment declares."""
        return np.dtype(self.space.dtype)

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """Dtype of the stored tensor."""
        if not self.is_box:
            return np.dtype(np.int64)
        return self.dtype if self.dtype == np.uint8 else np.dtype(np.float32)

    @cached_property
    def start(self) -> Any:
        """The smallest element of a discrete space."""
        if isinstance(self.space, spaces.Discrete):
            return int(self.space.start)
        return np.asarray(self.space.start, np.int64) if isinstance(self.space, spaces.MultiDiscrete) else 0

    @cached_property
    def count(self) -> Any:
        """How many elements a discrete space has, by dimension."""
        if isinstance(self.space, spaces.Discrete):
            return int(self.space.n)
        return np.asarray(self.space.nvec, np.int64) if isinstance(self.space, spaces.MultiDiscrete) else 2

    @cached_property
    def log_dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every stored value; logs of actions are long."""
        small = not self.is_box and bool(np.max(self.count) <= 256)
        return np.dtype(np.uint8) if small else self.stored

    @cached_property
    def bounds(self) -> tuple[Any, Any] | None:
        """The bounds of a Box, in its own dtype; None where there are none."""
        if not isinstance(self.space, spaces.Box):
            return None
        bounded = np.isfinite(self.space.low).any() or np.isfinite(self.space.high).any()
        return (self.space.low, self.space.high) if bounded else None

    def writer(self, buffer: Array, source: str) -> Callable[[int, Any], None]:
        """Return a function that writes one value of the environment into a row of a buffer `[R, *shape]`."""
        is_box, dtype, shape, read = self.is_box, self.dtype, self.shape, self.read

        def write(row: int, value: Any) -> None:
            if is_box and type(value) is np.ndarray and value.dtype == dtype and value.shape == shape:
                buffer[row] = value
            else:
                buffer[row] = read(value, (), source)

        return write

    def read(self, value: Any, leading: tuple[int, ...], source: str) -> Array:
        """Convert an observation `[*leading, *shape]` of the environment to the stored dtype, as a copy.

        Raises:
            SpaceError: wrong shape or dtype, or an element that a discrete space doesn't have.
        """
        array = _array(value)
        if not self.fits(array) or array.shape != leading + self.shape:
            raise SpaceError(
                f"{source} gave an observation{self.where} of shape {array.shape} and dtype {array.dtype}, but its "
                f"space {self.space} declares shape {leading + self.shape} and dtype {self.dtype}: "
                f"correct the environment's observation_space or what it returns"
            )
        if self.is_box:
            return np.array(array, self.stored)
        return self._in_range(np.asarray(array.astype(np.int64) - self.start), f"{source} gave an observation")

    def fits(self, array: Array) -> bool:
        """Whether an array's dtype can be read as one of this space without losing more than precision."""
        if self.is_box:
            return np.can_cast(array.dtype, self.dtype, "same_kind")
        return array.dtype.kind in "biu"

    def check_unit(self, array: Array, what: str) -> None:
        """Refuse whole numbers for a Box of floats that lie outside of it, such as bytes of a picture for 0 to 1.

        Args:
            array: `[..., *shape]`.
            what: `array` is, in the plural, for the message.

        Raises:
            SpaceError: some lie outside.
        """
        if self.is_box and self.dtype.kind == "f" and array.dtype.kind in "iu" and self.outside(array):
            raise SpaceError(
                f"{what}{self.where} are {array.dtype} from {array.min()} to {array.max()}, outside of {self.space}: "
                "scale them as the task's are"
            )

    def outside(self, array: Array) -> bool:
        """Whether some values `[..., *shape]` are outside of the bounds of a Box; False for other spaces."""
        low, high = self.bounds or (-np.inf, np.inf)
        return bool(((array < low) | (array > high)).any())

    def to_stored_action(self, action: Any, leading: tuple[int, ...]) -> Array:
        """Convert policy actions `[*leading, *shape]`, a tensor or an array, to the stored dtype.

        Raises:
            SpaceError: wrong shape, a float for a discrete space, or an element that it doesn't have.
        """
        array = action.detach().cpu().numpy() if isinstance(action, Tensor) else np.asarray(action)
        if array.shape != leading + self.shape:
            raise SpaceError(
                f"an action{self.where} has shape {array.shape}, expected {leading + self.shape}: "
                f"the learner and environment axes, then the shape of {self.space}"
            )
        if self.is_box:
            if self.stored == np.uint8 and array.dtype != np.uint8:
                array = np.rint(np.clip(_without_nan(array), 0, 255))
            return np.asarray(array, self.stored)
        if array.dtype.kind not in "biu":
            raise SpaceError(f"an action{self.where} has dtype {array.dtype}, expected integers for {self.space}")
        return self._in_range(np.asarray(array, np.int64), "an agent gave an action")

    def to_env_action(self, action: Array) -> Array:
        """Convert stored actions `[R, *shape]` to environment actions: clipped, `start` added, in the space's dtype.

        A Box is clipped to its bounds. NaN becomes 0 there: the learner it comes from is frozen by its own loss, and
        must not stop the others by bringing an environment down.
        """
        if not self.is_box:
            return (action + self.start).astype(self.dtype)
        action = _without_nan(action)
        if self.dtype.kind in "biu":
            return self._rounded(action)
        action = action.astype(self.dtype)  # before clipping: a bound may not be representable in float32
        return np.clip(action, *self.bounds) if self.bounds else action

    def _rounded(self, action: Array) -> Array:
        """Round to whole numbers within the bounds, which need not be representable as floats."""
        box: Any = self.space
        low, high = (np.broadcast_to(bound, action.shape) for bound in (box.low, box.high))
        rounded = np.rint(action.astype(np.float64))
        above, below = rounded >= high.astype(np.float64), rounded <= low.astype(np.float64)
        inside = np.where(above | below, 0, rounded).astype(self.dtype)
        return np.asarray(np.where(above, high, np.where(below, low, inside)), self.dtype)

    @property
    def where(self) -> str:
        """Its place in a larger space, for messages."""
        return f" at {self.name!r}" if self.path else ""

    def _in_range(self, array: Array, what: str) -> Array:
        if ((array < 0) | (array >= self.count)).any():
            wrong = array[(array < 0) | (array >= self.count)].flat[0]
            raise SpaceError(f"{what}{self.where} outside of its space {self.space}: element {wrong}, counted from 0")
        return array


def _without_nan(array: Array) -> Array:
    return np.where(np.isnan(array), array.dtype.type(0), array) if array.dtype.kind == "f" else array


def check_space(space: gym.Space[Any], role: str = "observation", path: tuple[str | int, ...] = ()) -> None:
    """Refuse a space whose values can't be trees of tensors.

    Args:
        space: of observations or actions.
        role: "observation" or "action".
        path: where it lies in a larger one.

    Raises:
        SpaceError: it is not supported; the message names the entry of a Dict or Tuple.
    """
    where = f"the entry {'/'.join(map(str, path))!r} of the {role} space" if path else f"the {role} space"
    if isinstance(space, spaces.Dict | spaces.Tuple):
        if not len(space):
            raise SpaceError(f"{where} {space} is empty: {_ADVICE}")
        if isinstance(space, spaces.Dict):
            _check_keys(space, where)
        for name, part in parts(space):
            check_space(part, role, (*path, name))
    elif not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise SpaceError(f"{where} {space} is a {_kind(space)}, which is not supported: {_advice(path)}")
    elif np.dtype(space.dtype).kind not in "fiub":
        raise SpaceError(f"{where} {space} has dtype {space.dtype}, expected floats, integers or bool")


def _kind(space: gym.Space[Any]) -> str:
    """The space's class, and gymnasium's that it extends where it is another's."""
    own = type(space)
    known = next((cls for cls in own.__mro__ if cls.__module__.startswith("gymnasium.spaces")), own)
    return own.__name__ if known in (own, gym.Space) else f"{own.__name__} (a {known.__name__})"


def _advice(path: tuple[str | int, ...]) -> str:
    """What to do about a space that is not supported; an entry of a Dict can be left out."""
    if len(path) == 1 and isinstance(path[0], str):
        return f"{_ADVICE}, or gymnasium.wrappers.FilterObservation to leave {path[0]!r} out"
    return _ADVICE


def _check_keys(space: spaces.Dict, where: str) -> None:
    for name in space.spaces:
        if not isinstance(name, str):
            raise SpaceError(f"{where} has the key {name!r}, which is no string: rename it with a wrapper")
        if "/" in name or name == "":
            raise SpaceError(
                f"{where} has the key {name!r}; keys are strings, not empty, and without '/', "
                f"which separates names of tensors: rename it with a wrapper"
            )


def parts(space: spaces.Dict | spaces.Tuple) -> list[tuple[Any, gym.Space[Any]]]:
    """The spaces within, with their keys in alphabetical order or their positions.

    Not in the order in which a Dict was filled: what is equal for gymnasium must lie in the same order.
    """
    return sorted(space.spaces.items()) if isinstance(space, spaces.Dict) else list(enumerate(space.spaces))


def _leaves(space: gym.Space[Any], path: tuple[str | int, ...] = ()) -> tuple[Leaf, ...]:
    """The arrays that a value of the space is made of, in the order of `parts`."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return tuple(leaf for name, part in parts(space) for leaf in _leaves(part, (*path, name)))
    return (Leaf(path, space),)


class Layout:
    """Array layout of a space: its values as arrays `[R, *shape]`, one per leaf, and as trees of tensors.

    Args:
        space: of one environment.
        role: "observation" or "action", for messages.

    Raises:
        SpaceError: the space is not supported.
    """

    def __init__(self, space: gym.Space[Any], role: str = "observation") -> None:
        check_space(space, role)
        self.space = space
        self.leaves = _leaves(space)

    @property
    def signature(self) -> list[tuple[Any, ...]]:
        """Shapes and dtypes of the arrays, equal for spaces whose values fit the same ones; bounds may differ."""
        kinds = [(leaf.path, type(leaf.space), leaf.shape, leaf.dtype) for leaf in self.leaves]
        counts = [
            () if leaf.is_box else (np.asarray(leaf.start).tolist(), np.asarray(leaf.count).tolist())
            for leaf in self.leaves
        ]
        return list(zip(kinds, counts))

    def empty(self, rows: int) -> list[Array]:
        """Allocate arrays for `rows` values in the stored dtypes."""
        return [np.zeros((rows, *leaf.shape), leaf.stored) for leaf in self.leaves]

    def writer(self, buffers: Sequence[Array], source: str) -> Callable[[int, Any], None]:
        """Return a function that writes one observation into a row of `empty`'s buffers."""
        writers = [(leaf.path, leaf.writer(buffer, source)) for leaf, buffer in zip(self.leaves, buffers)]
        if len(writers) == 1 and not writers[0][0]:
            return writers[0][1]  # the usual case, once a row and step

        def write(row: int, value: Any) -> None:
            for path, write_leaf in writers:
                write_leaf(row, pick(value, path, source))

        return write

    def read(self, value: Any, leading: tuple[int, ...], source: str) -> list[Array]:
        """Convert an observation `[*leading, ...]` to arrays, as copies."""
        return [leaf.read(pick(value, leaf.path, source), leading, source) for leaf in self.leaves]

    def tree(self, arrays: Sequence[Array], batch: tuple[int, ...], device: torch.device | str = "cpu") -> Tree:
        """Convert arrays `[R, *shape]` to a tree of tensors `[*batch, *shape]` that shares their memory on the CPU."""
        tensors = [
            torch.from_numpy(array).view((*batch, *leaf.shape)).to(device) for leaf, array in zip(self.leaves, arrays)
        ]
        return self.nest(tensors)

    def nest(self, tensors: Sequence[Tensor]) -> Tree:
        """Build the tree of a list of leaves."""
        return unflatten({leaf.name: tensor for leaf, tensor in zip(self.leaves, tensors)})

    def unnest(self, tree: Tree, what: str) -> list[Any]:
        """Flatten a tree to its leaves, in the order of the space.

        Raises:
            SpaceError: they are not those of the space.
        """
        flat, expected = flatten(tree), [leaf.name for leaf in self.leaves]
        if set(flat) != set(expected):
            raise SpaceError(f"{what} has the parts {sorted(flat)}, expected {sorted(expected)} for {self.space}")
        return [flat[name] for name in expected]

    def to_stored_actions(self, action: Tree, batch: tuple[int, ...]) -> list[Array]:
        """Convert policy actions `[*batch, *shape]` to arrays `[R, *shape]` in the stored dtypes.

        Raises:
            SpaceError: see `Leaf.to_stored_action`.
        """
        parts = self.unnest(action, "an action")
        return [leaf.to_stored_action(part, batch).reshape(-1, *leaf.shape) for leaf, part in zip(self.leaves, parts)]

    def to_env_actions(self, stored: Sequence[Array]) -> list[Array]:
        """Convert stored actions `[R, *shape]` to environment actions: clipped, `start` added, in the space's dtype."""
        return [leaf.to_env_action(array) for leaf, array in zip(self.leaves, stored)]

    def assemble(self, arrays: Sequence[Array]) -> Any:
        """Assemble arrays to one batched value of the space: the actions of a `VectorEnv`."""
        return _assemble(self.space, iter(arrays))

    def rows(self, arrays: Sequence[Array]) -> list[Any]:
        """Assemble arrays to one value of the space per row: an action for each environment."""
        return _rows(self.space, self.assemble(arrays))


def pick(value: Any, path: tuple[str | int, ...], source: str) -> Any:
    """Select the part of an observation at `path`.

    Raises:
        SpaceError: it isn't there.
    """
    for name in path:
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            raise SpaceError(
                f"{source} gave an observation without {'/'.join(map(str, path))!r}, which its observation_space "
                f"declares (given: {sorted(value) if isinstance(value, dict) else type(value).__name__})"
            ) from None
    return value


def _assemble(space: gym.Space[Any], arrays: Iterator[Array]) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _assemble(part, arrays) for name, part in parts(space)}
    if isinstance(space, spaces.Tuple):
        return tuple(_assemble(part, arrays) for _, part in parts(space))
    return next(arrays)


def _rows(space: gym.Space[Any], value: Any) -> list[Any]:
    if isinstance(space, spaces.Dict):
        names = [name for name, _ in parts(space)]
        columns = [_rows(part, value[name]) for name, part in parts(space)]
        return [dict(zip(names, row)) for row in zip(*columns)]
    if isinstance(space, spaces.Tuple):
        return list(zip(*(_rows(part, value[name]) for name, part in parts(space))))
    if isinstance(space, spaces.Box) and space.shape == ():
        return [np.asarray(scalar) for scalar in value]  # iterating gives scalars, which are no values of a Box
    return list(value)


def to_tree(space: gym.Space[Any], value: Any, batch: tuple[int, ...] = (), source: str = "the environment") -> Tree:
    """Convert an observation of an environment to a tree of tensors.

    Args:
        space: of one environment.
        value: one observation; or with `batch`, one of a `VectorEnv`, whose arrays have R = prod(batch) rows.
        batch: the leading axes of the result, such as `[*L, N]`.
        source: whom to name in an error.

    Returns:
        A tree of `[*batch, *shape]`, see the table above.

    Raises:
        SpaceError: unsupported space, or a value of another shape or dtype than the space declares.
    """
    layout = Layout(space)
    leading = (math.prod(batch),) if batch else ()
    return layout.tree(layout.read(value, leading, source), batch)


def batch_size(space: gym.Space[Any], value: Any) -> int | None:
    """Batch size of observations that a caller gives; None for a single observation.

    Raises:
        SpaceError: they have another shape or dtype than the space; a Tuple's observation, or batch of them, is
            no tuple of as many parts.
    """
    _check_tuples(space, value)
    sizes = set[int | None]()
    for leaf in Layout(space).leaves:
        array = _array(pick(value, leaf.path, "the caller"))
        rows = array.shape[: max(array.ndim - len(leaf.shape), 0)]
        if not leaf.fits(array) or array.shape != rows + leaf.shape or len(rows) > 1:
            shape = "".join(f", {size}" for size in leaf.shape)
            raise SpaceError(
                f"the observation{leaf.where} to act on has the shape {list(array.shape)} and dtype {array.dtype}, "
                f"expected {list(leaf.shape)}, or [B{shape}] for a batch, of {leaf.space}"
            )
        sizes.add(rows[0] if rows else None)
    if len(sizes) > 1:
        shown = ", ".join("none" if size is None else str(size) for size in sizes)
        raise SpaceError(f"the parts of the observation to act on have batches of {shown}, expected one size")
    return sizes.pop()


def _array(value: Any) -> Array:
    """Convert a caller's value to an array, a ragged one to an array of objects."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(value, dtype=object)


def _check_tuples(space: gym.Space[Any], value: Any) -> None:
    """Refuse a list or an array in the place of a Tuple's parts: its rows would be read as parts."""
    if isinstance(space, spaces.Tuple) and not (isinstance(value, tuple) and len(value) == len(space)):
        raise SpaceError(
            f"an observation of {space} is given as {type(value).__name__}, expected a tuple of its {len(space)} parts "
            "(a batch of them: one of arrays)"
        )
    for name, part in parts(space) if isinstance(space, spaces.Dict | spaces.Tuple) else ():
        _check_tuples(part, pick(value, (name,), "the caller"))


def to_numpy(space: gym.Space[Any], action: Tree, batch: tuple[int, ...] = ()) -> Any:
    """Convert policy actions to environment actions: Boxes clipped to their bounds, `start` added, the space's dtype.

    Args:
        space: of one environment.
        action: a tree of `[*batch, *shape]`.
        batch: the leading axes, such as `[*L, N]`; without, one action for one environment.

    Returns:
        One action; or with `batch` the batched action of a `VectorEnv`, R = prod(batch) rows.

    Raises:
        SpaceError: unsupported space, wrong shape, a float for a discrete space, or an element that it doesn't have.
    """
    layout = Layout(space, "action")
    arrays = layout.to_env_actions(layout.to_stored_actions(action, batch))
    return layout.assemble(arrays) if batch else layout.rows(arrays)[0]
