"""What instructions compute from registers.

Semantics from NVIDIA's PTX ISA: `prmt` in its default mode (four selectors of four bits: three
choose a byte of the pair {b, a}, the fourth replicates that byte's sign), `lop3` bit by bit by its
look-up table, shifts that take every bit out for counts beyond the width.

Floats are computed in float32, products that are fused with a sum in float64 and rounded then.
Approximations of the hardware (`ex2.approx`, `div.full`) are the exact function, rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.parse import Statement, UnknownPtx, Vector, register
from tests.emulator.registers import NOT_A_NUMBER, POISON, SIGNED, UNSIGNED, Array, Registers

Execute = Callable[[Array], None]

_TINY = np.float32(2.0**-126)  # the smallest normal float32


def width(kind: str) -> int:
    """Bits of a PTX type: 32 of "f16x2", 64 of "f32x2", 1 of "pred"."""
    if kind == "pred":
        return 1
    if kind in ("f16x2", "bf16x2", "tf32"):
        return 32
    if kind == "f32x2":
        return 64
    return int(kind.lstrip("bfsu"))


# Floats and their bits


def floats(bits: Array, kind: str) -> Array:
    """Float32 of the bits of a float, exactly."""
    bits = np.ascontiguousarray(bits)
    if kind == "f32":
        return bits.view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise UnknownPtx(f"floats of type {kind}")


def bits_of(values: Array, kind: str) -> Array:
    """The bits of floats, rounded to the nearest and to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == "f32":
        return values.view(np.uint32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    raise UnknownPtx(f"floats of type {kind}")


def tf32_bits(bits: Array) -> Array:
    """Float32 rounded to tf32, to the nearest and away from zero (`cvt.rna`)."""
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))


def _exp2(x: Array) -> Array:
    """2^x with subnormal arguments and results taken as zero, as `.ftz` wants."""
    result = np.exp2(np.where(np.abs(x) < _TINY, 0, x).astype(np.float64))
    return np.where(result < _TINY, 0, result).astype(np.float32)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _min(*values: Array) -> Array:
    """Of two, or from sm_100 on of three; of a NaN and a number, the number."""
    return functools.reduce(np.fmin, values)


def _max(*values: Array) -> Array:
    return functools.reduce(np.fmax, values)


_FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": _min,
    "max": _max,
    "neg": np.negative,
    "abs": np.abs,
    "fma": _fused,
    "ex2": _exp2,
    "sqrt": np.sqrt,
}
_FLOAT_MODIFIERS = {"rn", "approx", "ftz", "full", "f32", "f32x2"}


def _check_count(function: Callable[..., Array], values: list[Any], statement: Statement) -> None:
    """Refuse more operands than a function of numpy takes: the next is where it writes."""
    if getattr(function, "nin", len(values)) != len(values):
        raise UnknownPtx(statement.text)


def _float(statement: Statement, registers: Registers) -> Execute:
    """Of one float32, or, from sm_100 on, of the two that a word of 64 bits holds."""
    function = _FLOAT.get(statement.opcode)
    if function is None or not set(statement.modifiers) <= _FLOAT_MODIFIERS:
        raise UnknownPtx(statement.text)
    if statement.type == "f32x2" and statement.opcode not in ("add", "sub", "mul", "fma"):
        raise UnknownPtx(statement.text)
    bits = width(statement.type)
    readers = [registers.reader(x, bits) for x in statement.operands[1:]]
    _check_count(function, readers, statement)
    write = registers.writer(statement.operands[0])

    def execute(active: Array) -> None:
        values = (np.ascontiguousarray(read()).view(np.float32) for read in readers)
        write(function(*values).view(UNSIGNED[bits]), active)

    return execute


def _float_mixed(statement: Statement, registers: Registers) -> Execute:
    """float32, but for the first operand, or the two factors of `fma`: from sm_100 on."""
    kind, sources = statement.type, statement.operands[1:]
    if statement.modifiers[:-1] != ("rn", "f32") or statement.opcode not in ("add", "sub", "fma"):
        raise UnknownPtx(statement.text)
    function, kinds = _FLOAT[statement.opcode], [*(kind for _ in sources[1:]), "f32"]
    readers = [registers.reader(x, width(k)) for x, k in zip(sources, kinds, strict=True)]
    write = registers.writer(statement.operands[0])

    def execute(active: Array) -> None:
        values = (floats(read(), k) for read, k in zip(readers, kinds, strict=True))
        write(function(*values).view(np.uint32), active)

    return execute


def _float_pairs(statement: Statement, registers: Registers) -> Execute:
    """a b + c of two float16 each, rounded once."""
    if statement.modifiers != ("rn", "f16x2"):
        raise UnknownPtx(statement.text)
    readers = [registers.reader(x, 32) for x in statement.operands[1:]]
    write = registers.writer(statement.operands[0])

    def execute(active: Array) -> None:
        a, b, c = (read().view(np.float16).astype(np.float64) for read in readers)
        write((a * b + c).astype(np.float16).view(np.uint32), active)

    return execute


# Integers


def shift_left(a: Array, count: Array) -> Array:
    """a << count, 0 for counts beyond the width."""
    width = 8 * a.dtype.itemsize
    return np.where(
        count < width, a << np.minimum(count, width - 1).astype(a.dtype), a.dtype.type(0)
    )


def shift_right(a: Array, count: Array) -> Array:
    """a >> count, filled up with zeros, or with the sign of signed numbers."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(count < width, shifted, a.dtype.type(0))


def divide(a: Array, b: Array) -> Array:
    """Quotients towards zero; all ones where b is 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~b.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    """What `divide` leaves, of the sign of a."""
    return np.where(b == 0, a, a - divide(a, b) * b)


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """`length` bits from bit `start` on, the top one being the sign of signed numbers."""
    assert int(start.max()) + int(length.max()) <= 8 * a.dtype.itemsize, "a field beyond the word"
    spare = (8 * a.dtype.itemsize - length).astype(a.dtype)
    return (a << (spare - start.astype(a.dtype))) >> spare


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """b with the lowest `length` bits of a in the place of those from bit `start` on."""
    assert int(start.max()) + int(length.max()) <= 8 * a.dtype.itemsize, "a field beyond the word"
    one = a.dtype.type(1)
    mask = ((one << length.astype(a.dtype)) - one) << start.astype(a.dtype)
    return (b & ~mask) | (a << start.astype(a.dtype) & mask)


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """`prmt`: four bytes of {b, a}, each by a nibble of the selectors."""
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(0xF)
        place = (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = ((pair >> place) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(selector & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """`lop3`: bit by bit, entry 4 a + 2 b + c of a table of eight bits."""
    out = np.zeros_like(a)
    for entry in range(8):
        if int(table[0]) >> entry & 1:
            out |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return out


_INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "div": divide,
    "rem": remainder,
    "shl": shift_left,
    "shr": shift_right,
    "bfe": bit_field,
    "bfi": insert_field,
    "prmt": permute,
    "lop3": logic,
    "abs": np.abs,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
}
_COUNTS = {
    "shl": 1,
    "shr": 1,
    "bfe": 2,
    "bfi": 2,
}  # last operands that are of 32 bits whatever the type


def _integer(statement: Statement, registers: Registers) -> Execute:
    function, kind = _INTEGER[statement.opcode], statement.type
    bits, high = width(kind), "hi" in statement.modifiers
    wide = "wide" in statement.modifiers or high
    if set(statement.modifiers[:-1]) - {"lo", "wide", "hi"} or (wide and bits > 32):
        raise UnknownPtx(statement.text)
    if high and statement.opcode != "mul":
        raise UnknownPtx(statement.text)
    types = SIGNED if kind[0] == "s" else UNSIGNED
    # Of `mul.wide` the factors are narrow, the product and what `mad` adds have twice the bits.
    result = types[2 * bits] if wide else types[bits]
    sources = statement.operands[1:]
    widths = [bits] * len(sources)
    if statement.opcode == "mad" and wide:
        widths[2] = 2 * bits
    for i in range(_COUNTS.get(statement.opcode, 0)):
        widths[len(widths) - 1 - i] = 32
    counts = len(sources) - _COUNTS.get(statement.opcode, 0)
    # Triton 3.6 lays single bytes side by side with bytes that nobody reads, of registers that it
    # never writes. Results are compared, so that a read one does not go unnoticed.
    undefined = POISON if statement.opcode == "prmt" else None
    readers = [registers.reader(x, w, undefined) for x, w in zip(sources, widths, strict=True)]
    _check_count(function, readers, statement)
    write = registers.writer(statement.operands[0])

    def execute(active: Array) -> None:
        values = [
            read().view(types[w]).astype(result, copy=False) if i < counts else read()
            for i, (read, w) in enumerate(zip(readers, widths, strict=True))
        ]
        out = function(*values)
        if high:
            out = (out >> out.dtype.type(bits)).astype(types[bits])
        write(out.view(UNSIGNED[8 * out.dtype.itemsize]), active)

    return execute


def _pairs(statement: Statement, registers: Registers) -> Execute:
    """Both halves of a word, each on its own."""
    if statement.opcode not in ("add", "sub", "min", "max") or len(statement.modifiers) > 1:
        raise UnknownPtx(statement.text)
    function = _INTEGER[statement.opcode]
    half = (SIGNED if statement.type[0] == "s" else UNSIGNED)[16]
    readers = [registers.reader(x, 32) for x in statement.operands[1:]]
    write = registers.writer(statement.operands[0])

    def execute(active: Array) -> None:
        values = (np.ascontiguousarray(read()).view(half) for read in readers)
        write(function(*values).view(np.uint32), active)

    return execute


_SIGNS = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}


def _without_sign(statement: Statement, registers: Registers) -> Execute:
    """`abs` of 16-bit floats."""
    target, source = statement.operands
    read, write = registers.reader(source, width(statement.type)), registers.writer(target)

    def execute(active: Array) -> None:
        value = read()
        write(value & ~value.dtype.type(_SIGNS[statement.type]), active)

    return execute


_PREDICATES: dict[str, Callable[..., Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
}


def _predicate(statement: Statement, registers: Registers) -> Execute:
    function = _PREDICATES[statement.opcode]
    readers = [registers.reader(x, 1) for x in statement.operands[1:]]
    write = registers.writer(statement.operands[0])
    return lambda active: write(function(*(read() for read in readers)), active)


# Moves, choices and conversions


def _move(statement: Statement, registers: Registers) -> Execute:
    target, source = statement.operands
    bits = width(statement.type)
    if isinstance(target, Vector):
        part = bits // len(target.parts)
        read, writers = registers.reader(source, bits), [registers.writer(x) for x in target.parts]

        def split(active: Array) -> None:
            value = read()
            for i, write in enumerate(writers):
                write((value >> value.dtype.type(part * i)).astype(UNSIGNED[part]), active)

        return split
    write = registers.writer(target)
    if isinstance(source, Vector):
        part, dtype = bits // len(source.parts), UNSIGNED[bits]
        # An odd float has a neighbour that nobody reads where they are computed by twos.
        undefined = NOT_A_NUMBER if part == 32 else None
        readers = [registers.reader(x, part, undefined) for x in source.parts]

        def join(active: Array) -> None:
            value = np.zeros(registers.threads, dtype)
            for i, read in enumerate(readers):
                value |= read().astype(dtype) << dtype(part * i)
            write(value, active)

        return join
    read = registers.reader(source, bits)
    return lambda active: write(read(), active)


def _select(statement: Statement, registers: Registers) -> Execute:
    target, first, second, predicate = statement.operands
    bits = width(statement.type)
    read_first, read_second = registers.reader(first, bits), registers.reader(second, bits)
    choose, write = registers.reader(predicate, 1), registers.writer(target)
    return lambda active: write(np.where(choose(), read_first(), read_second()), active)


def _cut_off(words: Array) -> Array:
    """Float32 to int32, towards zero: to the nearest there is, and of NaN 0."""
    numbers = np.nan_to_num(words.view(np.float32).astype(np.float64), nan=0.0)
    return numbers.clip(-(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)


def _convert(statement: Statement, registers: Registers) -> Execute:
    *how, to, source = statement.modifiers
    write = registers.writer(statement.operands[0])
    target_bits = register(statement.operands[0]).bits
    if to == "tf32" and how == ["rna"]:
        read = registers.reader(statement.operands[1], 32)
        return lambda active: write(tf32_bits(read()), active)
    if (how, to, source) == (["rzi"], "s32", "f32"):
        read = registers.reader(statement.operands[1], 32)
        return lambda active: write(_cut_off(read()), active)
    if how not in ([], ["rn"]) or "ftz" in how:
        raise UnknownPtx(statement.text)
    if to in ("f16x2", "bf16x2"):
        kind = to[:-2]
        upper, lower = (registers.reader(x, 32) for x in statement.operands[1:])

        def pack(active: Array) -> None:
            high, low = (
                bits_of(x().view(np.float32), kind).astype(np.uint32) for x in (upper, lower)
            )
            write(low | high << np.uint32(16), active)

        return pack
    read = registers.reader(statement.operands[1], width(source))

    def convert(active: Array) -> None:
        value: Any = read()
        if source in ("f16", "bf16", "f32"):
            value = floats(value, source)
        elif source[0] == "s":
            value = value.view(SIGNED[width(source)])
        if to in ("f16", "bf16", "f32"):
            write(bits_of(value, to), active)
            return
        # A narrow result fills up its register, with its sign where it has one.
        types = SIGNED if to[0] == "s" else UNSIGNED
        value = value.astype(types[width(to)]).astype(types[target_bits])
        write(value.view(UNSIGNED[target_bits]), active)

    if source in ("f16", "bf16", "f32") and to not in ("f16", "bf16", "f32"):
        raise UnknownPtx(statement.text)
    return convert


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


# For floats: false for a NaN, but for those that end in u. "lo" and its like are of integers.
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~_unordered(a, b),
    "nan": _unordered,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


def _compare(statement: Statement, registers: Registers) -> Execute:
    how, kind = statement.modifiers[0], statement.type
    compare = _COMPARISONS.get(how)
    if compare is None or len(statement.modifiers) != 2 or len(statement.operands) != 3:
        raise UnknownPtx(statement.text)
    bits = width(kind)
    first, second = (registers.reader(x, bits) for x in statement.operands[1:])
    write = registers.writer(statement.operands[0])

    def typed(value: Array) -> Array:
        if kind in ("f16", "bf16", "f32"):
            return floats(value, kind)
        return value.view(SIGNED[bits]) if kind[0] == "s" else value

    return lambda active: write(compare(typed(first()), typed(second())), active)


def _shuffle(statement: Statement, registers: Registers) -> Execute:
    """`shfl.sync`: the value of another lane of the warp."""
    mode = statement.modifiers[1]
    if mode not in ("bfly", "idx") or statement.modifiers[0] != "sync":
        raise UnknownPtx(statement.text)
    target, source, lanes, limits, members = statement.operands
    read, write = registers.reader(source, 32), registers.writer(target)
    which, limit = registers.reader(lanes, 32), registers.reader(limits, 32)
    member = registers.reader(members, 32)
    thread = np.arange(registers.threads)
    lane = thread & 31

    def execute(active: Array) -> None:
        if (member() != 0xFFFFFFFF).any() or (limit() != 31).any():
            raise UnknownPtx(f"a shuffle of part of a warp: {statement.text}")
        number = which().astype(np.int64) & 31
        write(read()[thread - lane + (lane ^ number if mode == "bfly" else number)], active)

    return execute


def _reduce(statement: Statement, registers: Registers) -> Execute:
    """`redux.sync`: in every thread the min or max of the warp's float32; from sm_100 on."""
    mode = statement.modifiers[1]
    if statement.modifiers != ("sync", mode, "f32") or mode not in ("min", "max"):
        raise UnknownPtx(statement.text)
    target, source, members = statement.operands
    read, write = registers.reader(source, 32), registers.writer(target)
    member = registers.reader(members, 32)
    function = np.fmin if mode == "min" else np.fmax

    def execute(active: Array) -> None:
        warps = active.reshape(-1, 32)
        if (member() != 0xFFFFFFFF).any() or (warps.any(axis=1) != warps.all(axis=1)).any():
            raise UnknownPtx(f"a reduction of part of a warp: {statement.text}")
        values = np.ascontiguousarray(read()).view(np.float32).reshape(-1, 32)
        write(function.reduce(values, axis=1).repeat(32).view(np.uint32), active)

    return execute


def build(statement: Statement, registers: Registers) -> Execute | None:
    """What executes a statement on registers alone; None for other statements."""
    opcode = statement.opcode
    special = {
        "mov": _move,
        "selp": _select,
        "cvt": _convert,
        "setp": _compare,
        "shfl": _shuffle,
        "redux": _reduce,
    }
    if opcode in special:
        return special[opcode](statement, registers)
    if opcode not in _FLOAT and opcode not in _INTEGER:
        return None
    if statement.type == "pred":
        return _predicate(statement, registers)
    if statement.type in ("f32", "f32x2"):
        return _float(statement, registers)
    if statement.type in ("f16", "bf16") and "f32" in statement.modifiers:
        return _float_mixed(statement, registers)
    if statement.type == "f16x2" and opcode == "fma":
        return _float_pairs(statement, registers)
    if opcode == "abs" and statement.type in _SIGNS:
        return _without_sign(statement, registers)
    if opcode not in _INTEGER or statement.type[0] == "f" or statement.type[:2] == "bf":
        raise UnknownPtx(statement.text)
    if statement.type.endswith("16x2"):
        return _pairs(statement, registers)
    return _integer(statement, registers)
