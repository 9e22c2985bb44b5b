"""The layouts of matrix instructions, and their products.

A fragment is what the threads of a warp hold of a matrix (PTX ISA, "Matrix Fragments"): thread 4 g
+ t holds parts of row g of A and D and of column g of B. `wgmma` multiplies the rows of four warps
with a matrix in shared memory, which a descriptor points to.

Products are summed in float64 and rounded once. Of tf32 operands the hardware reads the upper 19
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.emulator.arithmetic import floats
from tests.emulator.parse import UnknownPtx
from tests.emulator.registers import Array

_LANE = np.arange(32)
_GROUP, _PLACE = _LANE // 4, _LANE % 4


# Elements of an operand that a register holds.
PIECES = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4}


def operand_floats(words: Array, kind: str) -> Array:
    """Elements (..., pieces) of the words (...) of an operand, of integers too."""
    if kind == "s8":
        return np.ascontiguousarray(words)[..., None].view(np.int8).astype(np.float64)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=-1)
    return floats(halves.astype(np.uint16), kind)


def left(registers: list[Array], kind: str) -> Array:
    """A of every warp, (warps, 16, k), of four registers (threads,)."""
    size = PIECES[kind]
    out = np.zeros((len(registers[0]) // 32, 16, 8 * size))
    for i, words in enumerate(registers):
        elements = operand_floats(words.reshape(-1, 32), kind)
        for j in range(size):
            columns = _PLACE * size + j + 4 * size * (i // 2)
            out[:, _GROUP + 8 * (i % 2), columns] = elements[..., j]
    return out


def right(registers: list[Array], kind: str) -> Array:
    """B of every warp, (warps, k, 8), of two registers (threads,)."""
    size = PIECES[kind]
    out = np.zeros((len(registers[0]) // 32, 8 * size, 8))
    for i, words in enumerate(registers):
        elements = operand_floats(words.reshape(-1, 32), kind)
        for j in range(size):
            out[:, _PLACE * size + j + 4 * size * i, _GROUP] = elements[..., j]
    return out


def sums(registers: list[Array], dtype: type = np.float32) -> Array:
    """The float32 or int32 sums of every warp, (warps, 16, n), of n / 2 registers (threads,)."""
    out = np.zeros((len(registers[0]) // 32, 16, 2 * len(registers)))
    for i, words in enumerate(registers):
        rows, columns = _sum_place(i)
        out[:, rows, columns] = words.view(dtype).reshape(-1, 32)
    return out


def sum_registers(matrix: Array, dtype: type = np.float32) -> list[Array]:
    """The registers (threads,) that hold sums (warps, 16, n) in float32 or int32."""
    if dtype == np.int32:  # they saturate
        matrix = matrix.clip(-(2**31), 2**31 - 1)
    rounded = matrix.astype(dtype)
    found = []
    for i in range(matrix.shape[2] // 2):
        rows, columns = _sum_place(i)
        found.append(np.ascontiguousarray(rounded[:, rows, columns]).reshape(-1).view(np.uint32))
    return found


def _sum_place(i: int) -> tuple[Array, Array]:
    """Rows and columns of register i of the sums, of every lane."""
    return _GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * _PLACE + i % 2


def matrices_to_registers(rows: Array, transposed: bool) -> list[Array]:
    """`ldmatrix`: rows (warps, 8 x, 16) of bytes to x registers (threads,)."""
    count = rows.shape[1] // 8
    if transposed:
        halves = rows.view(np.uint16).astype(np.uint32)
        low = [halves[:, 8 * j + 2 * _PLACE, _GROUP] for j in range(count)]
        high = [halves[:, 8 * j + 2 * _PLACE + 1, _GROUP] for j in range(count)]
        return [(a | b << np.uint32(16)).reshape(-1) for a, b in zip(low, high, strict=True)]
    words = rows.view(np.uint32)
    return [words[:, 8 * j + _GROUP, _PLACE].reshape(-1) for j in range(count)]


def registers_to_matrices(registers: list[Array], transposed: bool) -> Array:
    """`stmatrix`: the rows (warps, 8 x, 16) of bytes of x registers (threads,)."""
    words = np.stack([x.reshape(-1, 8, 4) for x in registers], axis=1)
    halves = np.ascontiguousarray(words).view(np.uint16)  # (warps, x, 8, 8)
    halves = halves.swapaxes(-1, -2) if transposed else halves
    return np.ascontiguousarray(halves.reshape(-1, 8 * len(registers), 8)).view(np.uint8)


@dataclass(frozen=True)
class Descriptor:
    """Where `wgmma` finds a matrix: PTX ISA, "Matrix-descriptor" and "Canonical layouts".

    The matrix lies there in blocks of 8 lines of `line` bytes; what follows along a line, beyond
    it, is in another block.

    Attributes:
        start: byte of shared memory. leading, stride: distances of blocks in bytes.
        line: bytes of a line, which are swizzled; 16 for none.
    """

    start: int
    leading: int
    stride: int
    line: int

    @classmethod
    def of(cls, word: int) -> Descriptor:
        """Taken apart."""
        if word >> 62 and word >> 49 & 7:  # without a swizzle it has no meaning
            raise UnknownPtx("a swizzle of wgmma that begins at a base offset")
        start, leading, stride = ((word >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return cls(start, leading, stride, (16, 128, 64, 32)[word >> 62])

    def places(self, lines: int, chunks: int, k_along: bool) -> Array:
        """Where the `chunks` pieces of 16 bytes of every line lie, (lines, chunks).

        Args:
            k_along: k goes along the lines, or else across them.
        """
        line, chunk = np.arange(lines)[:, None], np.arange(chunks)[None, :]
        in_line = self.line // 16
        along, across = self.leading, self.stride
        if not k_along and self.line == 16:  # the leading distance is along k then
            along, across = across, along
        place = self.start + line // 8 * across + line % 8 * self.line
        place = place + chunk % in_line * 16 + chunk // in_line * along
        # Bits 4, 5 and 6, as many as there are chunks in a line, are turned by the three above.
        return place ^ (place >> 3 & (self.line - 16))
