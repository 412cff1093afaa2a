"""Counter-based random numbers: every draw is a pure function of (key, stream, counter).

A learner's numbers depend on its own key alone, whichever learners it is trained with, and a new consumer with its own
stream changes no other's. The generator is SplitMix64 (Steele, Lea and Flood, 2014) seeded with a hash of the three.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from rlmeta.errors import SettingError

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number nearest 2^64 / golden ratio
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic, it repeats the sign bit."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64: a bijection of 64 bits in which every input bit flips half the output bits."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


@cache
def _stream_number(stream: str) -> int:
    return zlib.crc32(stream.encode()) | (len(stream) << 32)


def make_keys(seeds: Iterable[int] | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Create random keys `[S]` from seeds; equal seeds have equal keys, different seeds different ones.

    Args:
        seeds: integers in [-2^63, 2^63): a sequence, an array or a tensor `[S]`.
        device: where the keys are to be.

    Raises:
        SettingError: a seed is no integer (a real number would be cut, a switch is none), or does not fit 64 bits.
    """
    values = seeds.tolist() if isinstance(seeds, Tensor | np.ndarray) else seeds
    if not isinstance(values, Iterable):
        raise SettingError(f"seeds is {seeds!r}, expected several integers, such as [0] or range(8)")
    numbers = [_seed(seed) for seed in values]
    return _mix(torch.tensor(numbers, dtype=torch.int64, device=device) * _GOLDEN + 1)


def _seed(value: object) -> int:
    """Convert a seed to a Python integer, after a check that it is an integer of 64 bits."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise SettingError(f"seed {value!r} is of type {type(value).__name__}, expected an integer")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise SettingError(f"seed {number} does not fit 64 bits, expected an integer from -2^63 to 2^63 - 1")
    return number


def _mix_number(x: int) -> int:
    """Finaliser of SplitMix64 for a Python integer; the result is signed, as int64."""
    x &= _ALL
    x = ((x ^ (x >> 30)) * _MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * _MIX_2) & _ALL
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


@lru_cache(maxsize=4096)
def _increment(data: int | str) -> int:
    """Increment that `fold` adds to a key for a number or a name."""
    return _mix_number((_stream_number(data) if isinstance(data, str) else data) * _GOLDEN + 2)


def fold(key: Tensor, data: int | str | Tensor) -> Tensor:
    """Fold data into a random key: different integers, or names, give different new keys.

    Args:
        key: `[*L]` int64.
        data: an integer, a name, or a tensor of integers that broadcasts against the key.

    Returns:
        `[*L]` int64

    Raises:
        SettingError: the key is not of int64, or data is a real number, which would be cut.
    """
    if key.dtype is not torch.int64:
        raise SettingError(f"key has dtype {key.dtype}, expected torch.int64, as make_keys(seeds) returns it")
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex():
            raise SettingError(f"data to fold into a key has dtype {data.dtype}, expected integers or a name")
        return _mix(key + _mix(data.to(torch.int64) * _GOLDEN + 2))
    if not isinstance(data, Integral | str):
        raise SettingError(f"data to fold into a key is {data!r}, expected integers or a name")
    return _mix(key + _increment(data if isinstance(data, str) else int(data)))


def bits(key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Random bits, 64 in each int64.

    Args:
        key: `[*L]` int64.
        stream: the consumer's name.
        counter: a number, or `[*L]`: how often this stream was drawn from before.
        shape: of the numbers that each learner gets.

    Returns:
        `[*L, *shape]` int64
    """
    start = fold(fold(key, stream), counter)
    count = math.prod(shape)
    # not cached: a tensor created under torch.export or a torch mode would outlive it
    offsets = torch.arange(1, count + 1, dtype=torch.int64, device=key.device) * _GOLDEN
    drawn = _mix(start.unsqueeze(-1) + offsets)
    return drawn.reshape((*start.shape, *shape))


def uniform(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform random numbers in the open interval (0, 1), `[*L, *shape]`; arguments as for `bits`.

    They lie at the centres of equal cells and have one bit less than the dtype's significand (52 in float64, 23 in
    float32, 10 in float16, 7 in bfloat16), so that every one of them is exact and none is rounded to 1.
    """
    spacing = torch.finfo(dtype).eps
    precision = 1 - math.frexp(spacing)[1]
    integer = _shift_right(bits(key, stream, counter, shape), 64 - precision)
    return integer.to(dtype).add_(0.5).mul_(spacing)


def normal(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal random numbers `[*L, *shape]`, by the inverse distribution function; arguments as for `bits`."""
    return torch.special.ndtri(uniform(key, stream, counter, shape, dtype))


def gumbel(
    key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard Gumbel random numbers `[*L, *shape]`; arguments as for `bits`.

    argmax(logits + gumbel) is a sample of softmax(logits).
    """
    return uniform(key, stream, counter, shape, dtype).log_().neg_().log_().neg_()


def integers(key: Tensor, stream: str, counter: int | Tensor, shape: Sequence[int], high: int | Tensor) -> Tensor:
    """Random integers in [0, high), `[*L, *shape]` int64; arguments as for `bits`.

    `high` is a number or broadcasts against the result.
    """
    draw = uniform(key, stream, counter, shape, torch.float64)
    return (draw * high).floor().to(torch.int64)


def permutation(key: Tensor, stream: str, counter: int | Tensor, n: int) -> Tensor:
    """Random permutation of 0 ... n - 1 for every learner, `[*L, n]` int64; arguments as for `bits`."""
    return bits(key, stream, counter, (n,)).argsort(dim=-1, stable=True)
