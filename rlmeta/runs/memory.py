"""Memory of a run: what is freed is kept for the next gradient step, and what does not fit is said in a sentence."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlmeta.errors import SettingError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h's names of the settings
_MEGABYTE = 1 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's allocator not to give freed blocks back to the system at once.

    By default every tensor of more than a few hundred kilobytes may be mapped afresh, page fault by page fault. Memory
    in use is what it was; what is free for reuse stays in the process, up to a gigabyte.

    Returns:
        Whether the allocator took it; others than glibc's do not know the call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = {_MMAP_THRESHOLD: 1024 * _MEGABYTE, _TRIM_THRESHOLD: 1024 * _MEGABYTE, _TOP_PAD: 64 * _MEGABYTE}
    return min(int(mallopt(name, value)) for name, value in settings.items()) > 0


@contextmanager
def told_what_does_not_fit() -> Iterator[None]:
    """Within, an allocation that fails says what asks for less.

    Raises:
        SettingError: there is not as much memory.
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
