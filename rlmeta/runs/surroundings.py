"""What is global in a process, which no run obeys and none moves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from rlmeta.nn.block import alone


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, torch is as it is when a process starts: float32, the CPU, derivatives; afterwards all is as it was.

    A run's numbers depend on its seeds and settings alone, so it takes no default type, no default device and no mode
    from its caller. What a user's code draws from torch's, numpy's or Python's own generator is put back.
    """
    with alone:  # another thread may be building networks under a seed
        generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device() != torch.device("cpu"):  # a mode of its own, which slows every call
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
