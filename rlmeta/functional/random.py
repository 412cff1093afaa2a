"""Counter-based random numbers: every draw is a pure function of (key, stream, counter).

A learner's numbers depend on its own key alone, whatever company it keeps, and a new consumer with its own stream
changes no other's. The generator is SplitMix64 (Steele, Lea and Flood, 2014) started at a hash of the three.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number nearest 2^64 / golden ratio
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit flips half the output bits."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


@cache
def _stream_number(stream: str) -> int:
    return zlib.crc32(stream.encode()) | (len(stream) << 32)


@lru_cache(maxsize=128)
def _kept_offsets(count: int) -> NDArray[np.int64]:
    """An array, since a tensor that is made while torch exports a program is none outside of it."""
    with np.errstate(over="ignore"):
        return np.arange(1, count + 1, dtype=np.int64) * np.int64(_GOLDEN)


_LONGEST_KEPT = 1 << 16  # 512 KiB: making longer ones anew costs little beside the draw itself


def _counter_offsets(count: int, device: torch.device) -> Tensor:
    if count <= _LONGEST_KEPT and device.type == "cpu":
        return torch.from_numpy(_kept_offsets(count))
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN


def make_keys(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys `[S]` of the given seeds, any integers in [-2^63, 2^63)."""
    return _mix(torch.tensor(list(seeds), dtype=torch.int64, device=device) * _GOLDEN + 1)


def _mix_number(x: int) -> int:
    """`_mix` of a Python number, as int64."""
    x &= _ALL
    x = ((x ^ (x >> 30)) * _MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * _MIX_2) & _ALL
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


@lru_cache(maxsize=4096)
def _increment(data: int | str) -> int:
    """What `fold` adds to a key for a number or a name."""
    return _mix_number((_stream_number(data) if isinstance(data, str) else data) * _GOLDEN + 2)


def fold(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A new key `[*L]` from a key `[*L]` and a number, a name, or a tensor of numbers that broadcasts against it."""
    if isinstance(data, Tensor):
        return _mix(key + _mix(data.to(torch.int64) * _GOLDEN + 2))
    return _mix(key + _increment(data))


def bits(key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int]) -> Tensor:
    """64 random bits as int64.

    Args:
        key: `[*L]` int64.
        stream: the consumer's name.
        counter: a number, or `[*L]`: how often this stream was drawn from before.
        shape: what each learner gets.

    Returns:
        `[*L, *shape]` int64
    """
    start = fold(fold(key, stream), counter)
    count = math.prod(shape)
    drawn = _mix(start.unsqueeze(-1) + _counter_offsets(count, key.device))
    return drawn.reshape((*start.shape, *shape))


def uniform(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), `[*L, *shape]`, centred.

    They have one bit less than the dtype's significand (52 in float64, 23 in float32, 10 in float16, 7 in bfloat16),
    so that every one of them is exact and none is rounded to 1.
    """
    spacing = torch.finfo(dtype).eps
    precision = 1 - math.frexp(spacing)[1]
    integer = _shift_right(bits(key, stream, counter, shape), 64 - precision)
    return integer.to(dtype).add_(0.5).mul_(spacing)


def normal(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers `[*L, *shape]`, by the inverse of the distribution function."""
    return torch.special.ndtri(uniform(key, stream, counter, shape, dtype))


def gumbel(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard Gumbel numbers `[*L, *shape]`: argmax(logits + gumbel) samples softmax(logits)."""
    return uniform(key, stream, counter, shape, dtype).log_().neg_().log_().neg_()


def integers(key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], high: int | Tensor) -> Tensor:
    """Integers in [0, high), `[*L, *shape]`; `high` is a number or broadcasts against the result."""
    draw = uniform(key, stream, counter, shape, torch.float64)
    return (draw * high).floor().to(torch.int64)


def permutation(key: Tensor, stream: str, counter: int | Tensor, n: int) -> Tensor:
    """A permutation of 0 ... n - 1 for every learner, `[*L, n]` int64."""
    return bits(key, stream, counter, (n,)).argsort(dim=-1, stable=True)
