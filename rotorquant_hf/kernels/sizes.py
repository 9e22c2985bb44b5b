"""Sizes of launches, on the host: Triton's own functions cost microseconds a call there."""

from __future__ import annotations


def padded(n: int) -> int:
    """Columns of a tile for `n` elements: the smallest power of 2, at least 16, that holds them."""
    return max(16, 1 << max(0, n - 1).bit_length())


def pieces(n: int, size: int) -> int:
    """How many pieces of `size` hold `n`."""
    return -(-n // size)
