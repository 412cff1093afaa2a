"""Default device: `pytest --default-device-meta` runs the suite as if torch's default device were "meta".

Only for tensors that rlmeta's own code makes: tests go on making theirs on the CPU. So whatever the package makes on
the default device, instead of on the one it was asked for, has no numbers, and the first operation on it fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

PACKAGE = str(Path(__file__).parents[1] / "rlmeta")
BENCH = str(Path(PACKAGE) / "bench")
BLOCKS = str(Path(PACKAGE) / "nn")
TORCH = str(Path(torch.__file__).parent)


class DefaultDeviceMeta(TorchFunctionMode):
    """Makes tensors on "meta" where rlmeta gives no device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and _called_by_rlmeta():
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _called_by_rlmeta() -> bool:
    """Whether the nearest caller besides torch is the package's code, and not a block that a test makes for itself.

    A block made by hand is on the default device, as every `nn.Module` is, and benchmarks are programs.
    """
    frame = sys._getframe(2)
    in_block = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(BLOCKS):
            in_block = True
        elif not file.startswith(TORCH) and file != __file__:
            return file.startswith(PACKAGE) and not file.startswith(BENCH)
        frame = frame.f_back  # type: ignore[assignment]
    return in_block
