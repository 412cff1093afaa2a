"""Numbers as text: 3e-4, 100k, 1M, 1_000_000; the command line, saved plans and settings read them alike."""

from __future__ import annotations

import sys
from decimal import Decimal, DecimalException, localcontext

_SUFFIXES = {"k": 1_000, "K": 1_000, "M": 1_000_000}


def number(text: str) -> float:
    """Parse a number: 3e-4, 100k, 1M, 1_000_000, inf.

    Raises:
        ValueError: the text is no such number.
    """
    return float(_exact(text))


def whole(text: str) -> int:
    """Parse a whole number: 32, 100k, 1e6; exact whatever its size.

    Raises:
        ValueError: the text is no such number.
    """
    value = _exact(text)
    if not value.is_finite() or value.adjusted() > sys.float_info.max_10_exp or value != value.to_integral_value():
        raise ValueError(text)
    return int(value)


def _exact(text: str) -> Decimal:
    """Parse a number with an optional suffix k, K or M to an exact Decimal.

    Raises:
        ValueError: the text is no such number.
    """
    digits, factor = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    try:
        with localcontext(prec=1_000):  # enough that the product is exact
            value = Decimal(digits) * factor
    except DecimalException:
        raise ValueError(text) from None
    if value.is_nan():
        raise ValueError(text)
    return value
