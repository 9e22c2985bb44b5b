"""A block of inline assembly, run on given words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.parse import UnknownPtx, parse_assembly
from tests.emulator.registers import Registers


def run(assembly: str, inputs: Sequence[int], outputs: int, **special: int) -> list[int]:
    """Run a block of inline assembly on words of 32 bits.

    Args:
        assembly: the text, with operands $0, $1, ...
        inputs: values of the operands after the outputs.
        outputs: how many operands are outputs.
        special: values of special registers (`lanemask_eq`).
    """
    names = [f"${i}" for i in range(outputs + len(inputs))]
    kernel, known = parse_assembly(assembly, dict.fromkeys(names, 32))
    registers = Registers(kernel, threads=1)
    registers.special.update({f"%{k}": np.array([v]) for k, v in special.items()})
    for name, value in zip(names[outputs:], inputs, strict=True):
        word = np.array([value & 0xFFFFFFFF], dtype=np.uint32)
        registers.writer(known[name])(word, registers.everyone)
    with np.errstate(all="ignore"):
        for statement in kernel.statements:
            execute = arithmetic.build(statement, registers)
            if execute is None:
                raise UnknownPtx(statement.text)
            execute(registers.everyone)
    return [int(registers.reader(known[x], 32)()[0]) for x in names[:outputs]]
