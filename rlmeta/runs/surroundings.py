"""Isolation of runs from a process's global state: default dtype and device, grad mode, random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from rlmeta.nn.block import alone


@contextmanager
def undisturbed() -> Iterator[None]:
    """Use torch's defaults within the block (float32, CPU, gradients enabled) and restore the caller's afterwards.

    A run's numbers depend on its seeds and settings alone, so it takes no default dtype, device or mode from its
    caller. The states of torch's, numpy's and Python's global random generators are restored, too.
    """
    with alone:  # another thread may be building networks under a seed
        generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device() != torch.device("cpu"):  # the device context slows every call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with alone:
                torch.set_rng_state(generators[0])
                np.random.set_state(generators[1])
                random.setstate(generators[2])
