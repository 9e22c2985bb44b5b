"""Sizes of launches, on the host: Triton's own functions cost microseconds a call there."""

from __future__ import annotations


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than `n`; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def padded(n: int) -> int:
    """Columns of a tile for `n` elements: a power of 2, at least 16."""
    return max(16, power_of_2(n))


def pieces(n: int, size: int) -> int:
    """How many pieces of `size` hold `n`."""
    return -(-n // size)
