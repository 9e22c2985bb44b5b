"""Bit packing of codes in power-of-two planes: no code straddles a byte.

A width of 3 bits is stored as a plane of 2 and a plane of 1 (5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1); the widest plane holds the lowest bits and comes first. Inside one vector of d
codes a plane of w bits takes s = ceil(d w / 8) bytes, and byte j holds, from its lowest bits
up, the elements j, j + s, j + 2 s, ... Unpacking slot k of all bytes therefore yields the
contiguous slice [k s, (k + 1) s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotorquant_hf.quant.lloyd_max import MAX_BITS, MIN_BITS

_PLANES = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code of `bits` bits, in the order of storage."""
    if bits not in _PLANES:
        raise ValueError(f"bits is {bits!r}; choose a whole number from {MIN_BITS} to {MAX_BITS}")
    return _PLANES[bits]


def plane_bytes(d: int, width: int) -> int:
    """Bytes that one plane takes for one vector of `d` codes."""
    return (d * width + 7) // 8


def packed_bytes(d: int, bits: int) -> int:
    """Bytes that one vector of `d` codes of `bits` bits takes."""
    return sum(plane_bytes(d, width) for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: (..., d) integers in [0, 2**bits).
        bits: bits per code, 1 to 8.

    Returns:
        (..., packed_bytes(d, bits)) uint8.
    """
    codes = codes.to(torch.uint8)
    d, shift, packed = codes.shape[-1], 0, []
    for width in planes(bits):
        size, slots = plane_bytes(d, width), 8 // width
        field = (codes >> shift) & ((1 << width) - 1)
        field = torch.nn.functional.pad(field, (0, size * slots - d)).unflatten(-1, (slots, size))
        byte = field[..., 0, :]
        for slot in range(1, slots):
            byte = byte | (field[..., slot, :] << (slot * width))
        packed.append(byte)
        shift += width
    return torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: (..., packed_bytes(d, bits)) uint8.
        bits: bits per code, 1 to 8.
        d: codes per vector.

    Returns:
        (..., d) uint8.

    Raises:
        ValueError: if the last axis is not packed_bytes(d, bits) long.
    """
    if packed.shape[-1] != packed_bytes(d, bits):
        raise ValueError(
            f"{packed.shape[-1]} bytes do not hold {d} codes of {bits} bits; "
            f"expected {packed_bytes(d, bits)}"
        )
    codes, shift, offset = None, 0, 0
    for width in planes(bits):
        size = plane_bytes(d, width)
        byte, offset = packed[..., offset : offset + size], offset + size
        mask = (1 << width) - 1
        slots = [(byte >> (slot * width)) & mask for slot in range(8 // width)]
        field = torch.cat(slots, dim=-1)[..., :d] << shift
        codes = field if codes is None else codes | field
        shift += width
    assert codes is not None
    return codes
