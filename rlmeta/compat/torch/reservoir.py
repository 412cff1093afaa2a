"""Replay buffer by reservoir sampling, for a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rlmeta.compat.torch.checks import Batch, check_state, leaves_of, quiet, take
from rlmeta.errors import SettingError, require_count
from rlmeta.functional.reservoir import last_on_place, reservoir_places


class Reservoir:
    """Replay buffer by reservoir sampling (Vitter, 1985): all samples ever added are kept with equal probability.

    ```python
    buffer = Reservoir(200, torch.Generator().manual_seed(0))
    old_x, old_y = buffer.sample(32) if len(buffer) else (x, y)
    buffer.add(x, y)
    ```

    Args:
        capacity: largest number of samples.
        generator: of the random choices in `add` and `sample`.

    Raises:
        SettingError: the capacity is less than 1, or `generator` is no generator.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        require_count("Reservoir: capacity", capacity)
        if not isinstance(generator, torch.Generator):
            raise SettingError(
                f"Reservoir: generator is {generator!r}, expected a torch.Generator: torch.Generator().manual_seed(0)"
            )
        self.capacity, self.generator = capacity, generator
        self.added = 0
        """Number of samples ever added."""
        self._kept: list[Tensor] = []
        self._structure: pytree.TreeSpec | None = None

    def __len__(self) -> int:
        """Number of samples in the buffer."""
        return min(self.added, self.capacity)

    @quiet()
    def add(self, *batch: Batch) -> None:
        """Add a minibatch; the n-th sample ever added is stored with probability min(1, capacity / n).

        Args:
            batch: such as inputs and targets, each a `Batch` of the same samples.

        Raises:
            SettingError: there are no samples, their numbers differ, or shapes or dtypes differ from earlier samples.
        """
        leaves, structure = leaves_of(batch, "Reservoir")
        if self._structure is None:
            self._structure = structure
            self._kept = [leaf.new_zeros((self.capacity, *leaf.shape[1:])) for leaf in leaves]
        elif [_form(leaf) for leaf in leaves] != [_form(room) for room in self._kept] or structure != self._structure:
            raise SettingError(
                f"Reservoir: was given {', '.join(map(_form, leaves))}, expected samples like those before, "
                f"{', '.join(map(_form, self._kept))}"
            )
        count, device = len(leaves[0]), self.generator.device
        number = self.added + torch.arange(1, count + 1, device=device)
        chance = torch.rand(count, generator=self.generator, device=device, dtype=torch.float64)
        place = reservoir_places(number, (chance * number).floor().long(), self.capacity)
        last = last_on_place(place.clamp(max=self.capacity), self.capacity)
        into = (last >= 0).nonzero().flatten()
        for room, leaf in zip(self._kept, leaves):
            room[into.to(room.device)] = take(leaf, last[into]).to(room.device)
        self.added += count

    @quiet()
    def sample(self, count: int) -> Any:
        """Draw a minibatch uniformly with replacement, in the structure that was added.

        Args:
            count: number of samples; some may be equal.

        Raises:
            SettingError: the buffer is empty, or `count` is less than 1.
        """
        require_count("Reservoir: count", count)
        if self._structure is None:
            raise SettingError("Reservoir: sample() of an empty buffer: add to it first, or check `if len(buffer)`")
        rows = torch.randint(len(self), (count,), generator=self.generator, device=self.generator.device)
        batch = pytree.tree_unflatten([take(room, rows) for room in self._kept], self._structure)
        return batch[0] if len(batch) == 1 else batch

    def state_dict(self) -> dict[str, Any]:
        """State to save: the samples, the number ever added, and the generator's state."""
        kept = [tensor.clone() for tensor in self._kept]
        held = None if self._structure is None else pytree.tree_unflatten(kept, self._structure)
        return {"samples": held, "added": self.added, "generator": self.generator.get_state()}

    @quiet()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of `state_dict`.

        Raises:
            SettingError: the state is of a buffer of another capacity.
        """
        check_state(state, ("samples", "added", "generator"), "Reservoir")
        kept, structure = pytree.tree_flatten(state["samples"])
        if state["samples"] is not None and len(kept[0]) != self.capacity:
            raise SettingError(f"Reservoir: the state is of capacity {len(kept[0])}, this one's is {self.capacity}")
        self.added = int(state["added"])
        self._kept, self._structure = ([], None) if state["samples"] is None else ([x.clone() for x in kept], structure)
        self.generator.set_state(state["generator"])


def _form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} [n{''.join(f', {size}' for size in leaf.shape[1:])}]"
