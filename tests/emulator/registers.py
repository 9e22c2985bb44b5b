"""The registers of all threads of a program, each a vector with an element a thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.parse import (
    Constant,
    Kernel,
    Negated,
    Operand,
    Register,
    Sink,
    Special,
    UnknownPtx,
)

Array = NDArray[Any]
Reader = Callable[[], Array]
Writer = Callable[[Array, Array], None]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
POISON = 0xA5A5A5A5
"""A word of what the compiler has left undefined."""
NOT_A_NUMBER = 0xFFFFFFFF
"""The same, of floats: sums do not hide it."""


class Fault(Exception):
    """What a correct kernel does not do; the program ends with it."""


@functools.lru_cache(maxsize=4096)
def _constant(value: int, bits: int, threads: int) -> Array:
    return np.full(threads, value, dtype=np.bool_ if bits == 1 else UNSIGNED[bits])


class Registers:
    """Values of registers as unsigned integers of the registers' widths, predicates as booleans.

    Attributes:
        threads: of the program. everyone: a mask of all of them.
        special: the hardware's registers by name.
        group: number of the `wgmma`s that are not committed yet.
        busy: registers that a `wgmma` under way still writes, with its group. lent: those that it
            still reads.
    """

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.everyone = np.ones(threads, dtype=bool)
        self.special: dict[str, Array] = {}
        self.group = 1
        self.busy: dict[int, int] = {}
        self.lent: dict[int, int] = {}
        self._asynchronous = any(x.opcode == "wgmma" for x in kernel.statements)
        self.clear()

    def clear(self) -> None:
        """As before the first statement: no register has been written."""
        self.values: list[Array | None] = [None] * len(self.kernel.registers)
        self.busy.clear()
        self.lent.clear()

    def commit(self) -> None:
        """The `wgmma`s since the last commit are a group."""
        self.group += 1

    def wait(self, allowed: int) -> int:
        """Let all groups end but for the last `allowed`; the number of the last that has."""
        ended = self.group - 1 - allowed
        for held in (self.busy, self.lent):
            for index in [i for i, group in held.items() if group <= ended]:
                del held[index]
        return ended

    def reader(self, operand: Operand, bits: int, undefined: int | None = None) -> Reader:
        """What reads an operand as unsigned integers of `bits`, or as a predicate (1).

        With `undefined` a register that was never written is no fault, but has that value.
        """
        if isinstance(operand, Constant):
            constant = _constant(operand.value & ((1 << bits) - 1), bits, self.threads)
            return lambda: constant
        if isinstance(operand, Special):
            name, special = operand.name, self.special
            return lambda: special[name].astype(UNSIGNED[bits])
        if isinstance(operand, Negated):
            positive = self.reader(operand.register, bits)
            return lambda: ~positive()
        if not isinstance(operand, Register):
            raise UnknownPtx(f"{operand} as a value")
        return self._register(operand, bits, undefined)

    def _register(self, register: Register, bits: int, undefined: int | None) -> Reader:
        index = register.index
        dtype = np.bool_ if bits == 1 else UNSIGNED[bits]
        if (bits == 1) != (register.bits == 1):
            raise UnknownPtx(f"{register.name} has {register.bits} bits and is read as {bits}")

        instead = None if undefined is None else _constant(undefined, bits, self.threads)

        def read() -> Array:
            value = self.values[index]
            if value is None and instead is not None:
                return instead
            if value is None:
                raise Fault(f"{register.name} is read and was never written")
            return value if value.dtype == dtype else value.astype(dtype)

        def read_checked() -> Array:
            if index in self.busy:
                raise Fault(f"{register.name} is read while a wgmma writes it")
            return read()

        return read_checked if self._asynchronous else read

    def writer(self, operand: Operand) -> Writer:
        """What writes a register in the threads of a mask; a narrow value fills up with zeros."""
        if isinstance(operand, Sink):
            return lambda value, active: None
        if not isinstance(operand, Register):
            raise UnknownPtx(f"{operand} as a result")
        index, name = operand.index, operand.name
        dtype = np.bool_ if operand.bits == 1 else UNSIGNED[operand.bits]

        def write(value: Array, active: Array) -> None:
            if self._asynchronous and (index in self.busy or index in self.lent):
                raise Fault(f"{name} is written while a wgmma uses it")
            value = value.astype(dtype, copy=False)
            if active is not self.everyone:
                old = self.values[index]
                if old is None:  # in the other threads it holds anything: here all ones
                    old = np.full(self.threads, ~dtype(0))
                value = np.where(active, value, old)
            self.values[index] = value

        return write
