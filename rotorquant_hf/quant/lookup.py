"""Centroids of packed codes by table look-up, several elements at a time.

A *word* holds the codes of all elements that one byte of the widest plane holds: that byte, and
in the next higher byte, in slots of the same width, the bits that the narrower planes have of
these elements. One look-up of a word yields 1 (8 bits), 2 (4 to 7), 4 (2 and 3) or 8 (1 bit)
centroids, and nothing is unpacked. They come in the order of the words, not of the elements;
whoever reads them permutes the query or the sum instead, once.

Where the planes of a vector do not end on the same word (20 codes of 3 bits: 5 bytes and 2.5),
the codes are unpacked and a word is a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.quant.packing import plane_bytes, planes, unpack

# Gathering elements of a wider type moves several float32 elements at once.
_ELEMENTS = {1: torch.float32, 2: torch.float64, 4: torch.complex128}


@dataclass(frozen=True)
class CodeTable:
    """The look-up table of one codebook.

    Attributes:
        bits: bits per code.
        d: codes per vector.
        order: (size,) int64: item i of those looked up is element order[i] of the vector; d is
            padding, whose item means nothing.
        entries: (words, slots) float32, the centroids of each word.
        centroids: (2**bits,) float32, those of a code.
    """

    bits: int
    d: int
    order: Tensor
    entries: Tensor
    centroids: Tensor

    @classmethod
    def of(cls, centroids: Tensor, bits: int, d: int) -> CodeTable:
        """The table of `centroids`, (2**bits,) float32, for vectors of `d` codes."""
        width = _slot_width(bits, d)
        slots, size, above = 8 // width, plane_bytes(d, width), max(0, bits - width)
        max_word = sum(((1 << above) - 1) << (8 + slot * width) for slot in range(slots)) + 255
        words = torch.arange(max_word + 1, device=centroids.device).unsqueeze(-1)
        shifts = torch.arange(slots, device=centroids.device) * width
        low = (words >> shifts) & ((1 << width) - 1)
        high = (words >> (shifts + 8)) & ((1 << above) - 1)
        entries = centroids[(low | (high << width)).clamp(max=len(centroids) - 1)]
        elements = torch.arange(slots * size, device=centroids.device).unflatten(0, (slots, size))
        return cls(bits, d, elements.T.flatten().clamp(max=d), entries, centroids)

    def look_up(self, packed: Tensor) -> Tensor:
        """Centroids of packed codes (..., bytes) uint8: (..., size) float32, in `order`."""
        words, slots = _words(packed, self.bits, self.d), self.entries.shape[1]
        if slots not in _ELEMENTS:
            return torch.embedding(self.entries, words).flatten(-2)
        # A row of indices per vector: gather shares rows among threads, index_select does not.
        rows = words.flatten(0, -2)
        table = self.entries.view(_ELEMENTS[slots]).T.expand(len(rows), -1)
        found = table.gather(1, rows)
        if found.is_complex():
            found = torch.view_as_real(found)
        return found.view(torch.float32).view(*packed.shape[:-1], -1)


def _slot_width(bits: int, d: int) -> int:
    """Bits of a word's slots: the widest plane's, or 8 where a word is an unpacked code."""
    widest, *others = planes(bits)
    size = plane_bytes(d, widest)
    aligned = all(plane_bytes(d, width) * (widest // width) == size for width in others)
    return widest if aligned else 8


def _words(packed: Tensor, bits: int, d: int) -> Tensor:
    """The words (..., size) int64 of packed codes (..., bytes)."""
    widest, *others = planes(bits)
    if _slot_width(bits, d) != widest:
        return unpack(packed, bits, d).long()
    end, shift = plane_bytes(d, widest), 8
    words = packed[..., :end].long()
    for width in others:
        start, size = end, plane_bytes(d, width)
        end = start + size
        byte = packed[..., start:end]
        # Byte i of this plane has, in its slot m, element i + m size, which is in slot
        # m // ratio of word i + (m % ratio) size.
        ratio = widest // width
        slots = sum(((1 << width) - 1) << at for at in range(0, 8, widest))
        for m in range(ratio):
            part = words[..., m * size : (m + 1) * size]
            # Not shifted as bytes: uint8 shifts are slow.
            part.add_((byte & (slots << m * width)).long(), alpha=1 << (shift - m * width))
        shift += width
    return words
