"""Checksums of the arrays that a run depends on: demonstrations, samples, images, tables of user code.

They are kept in `config.toml`, and data that are given or read again for a resume are compared with them. Code is not:
of a function only its name is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.demonstrations import Demonstrations
from rlmeta.errors import SettingError

HOLDS_DATA = (Tensor, np.ndarray, tuple, list, Mapping, Demonstrations)
"""Types of attributes that are searched for arrays in an object that is not a dataclass."""


def digest_of(value: Any) -> str | None:
    """Checksum of all arrays within a value and their paths in it; None without arrays.

    Dataclasses, tuples, lists and dictionaries are searched recursively, other objects by their public attributes.
    """
    checksum, has_arrays = hashlib.sha256(), False
    for path, data in _arrays(value, "", set()):
        has_arrays = True
        checksum.update(path.encode())
        checksum.update(data)
    return checksum.hexdigest()[:16] if has_arrays else None


def check_digests(had: Mapping[str, str], now: Mapping[str, str], where: str) -> None:
    """Refuse data that differ from those a run began with; data that only training needs may be missing.

    Raises:
        SettingError: a digest differs.
    """
    for name, digest in had.items():
        if now.get(name, digest) != digest:
            raise SettingError(
                f"{where}: the {name} are not those the run began with (digest {now[name]}, it was {digest}): give it "
                "the same data"
            )


def _arrays(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, bytes | memoryview]]:
    """Iterate over the arrays within a value: (path with dtype and shape, bytes); `above` holds the ids of parents."""
    if isinstance(value, Demonstrations):
        yield path, value.digest.encode()
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        flat = plain.reshape(-1).view(torch.uint8) if plain.numel() else torch.zeros(0, dtype=torch.uint8, device="cpu")
        yield f"{path} {plain.dtype} {tuple(plain.shape)}", flat.numpy().data
    elif isinstance(value, np.ndarray):
        if value.dtype != object:
            yield f"{path} {value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes()
    elif id(value) not in above:
        for name, child in _parts(value):
            yield from _arrays(child, f"{path}/{name}", above | {id(value)})


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Children of a value to search: its fields, entries or public attributes, by name."""
    if isinstance(value, type | str | gym.Space | gym.Env | torch.nn.Module) or callable(value):
        return []
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if not f.name.startswith("_")]
    if isinstance(value, tuple | list):
        return [(str(i), child) for i, child in enumerate(value)]
    attributes = {name: child for name, child in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    data = {name: child for name, child in attributes.items() if isinstance(child, HOLDS_DATA)}
    named = value if isinstance(value, Mapping) else data
    return sorted(((str(name), child) for name, child in named.items()), key=lambda pair: pair[0])
