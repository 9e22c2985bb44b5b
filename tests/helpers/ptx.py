"""A few instructions of PTX on 32-bit words, to run inline assembly without a GPU.

Semantics from NVIDIA's PTX ISA: `prmt` in its default mode (four selectors of four bits: three
choose a byte of the pair {b, a}, the fourth replicates that byte's sign), `lop3` bit by bit by its
look-up table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

WORD = 0xFFFFFFFF


def _prmt(a: int, b: int, selectors: int) -> int:
    pair, out = a | b << 32, 0
    for i in range(4):
        selector = selectors >> (4 * i) & 0xF
        byte = pair >> (8 * (selector & 7)) & 0xFF
        if selector & 8:
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << (8 * i)
    return out


def _lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for bit in range(32):
        entry = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        out |= (table >> entry & 1) << bit
    return out


_INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shl": lambda a, n: a << n,
    "shr": lambda a, n: a >> n,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "popc": lambda a: bin(a).count("1"),
    "prmt": _prmt,
    "lop3": _lop3,
}


def run(assembly: str, inputs: Sequence[int], outputs: int, **special: int) -> list[int]:
    """Run a block of inline assembly.

    Args:
        assembly: the text, with operands $0, $1, ...
        inputs: values of the operands after the outputs.
        outputs: how many operands are outputs.
        special: values of special registers (`lanemask_eq`).
    """
    registers = {f"${outputs + i}": value & WORD for i, value in enumerate(inputs)}
    registers |= {f"%{name}": value & WORD for name, value in special.items()}

    def value(operand: str) -> int:
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    for statement in assembly.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, operands = statement.split(maxsplit=1)
        target, *sources = (x.strip() for x in operands.split(","))
        assert re.fullmatch(r"\w+\.[bus]32", name), name
        result = _INSTRUCTIONS[name.partition(".")[0]](*(value(x) for x in sources))
        registers[target] = result & WORD
    return [registers[f"${i}"] for i in range(outputs)]
