"""RAM of a run: keep freed blocks for the next gradient step, and explain out-of-memory errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlmeta.errors import SettingError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h's names of the settings
_MEGABYTE = 1 << 20


def keep_freed_memory() -> bool:
    """Set glibc's allocator (`mallopt`) to keep freed blocks instead of returning them to the system at once.

    By default every tensor of more than a few hundred kilobytes may be mapped anew, page fault by page fault. The RAM
    in use stays the same; up to a gigabyte of freed blocks stays in the process for reuse.

    Returns:
        Whether the allocator accepted the settings; only glibc's does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = {_MMAP_THRESHOLD: 1024 * _MEGABYTE, _TRIM_THRESHOLD: 1024 * _MEGABYTE, _TOP_PAD: 64 * _MEGABYTE}
    return min(int(mallopt(name, value)) for name, value in settings.items()) > 0


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error within the block into a `SettingError` that says which settings need less RAM.

    Raises:
        SettingError: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_torch = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not of_torch and not isinstance(error, MemoryError):
            raise
        raise SettingError(
            "the run does not fit into memory: take fewer learners (seeds, settings) at once, fewer environments "
            "(num_envs), shorter rollouts (num_steps) or smaller networks"
        ) from error
