"""The text of a PTX kernel as statements.

Only what Triton and the project's inline assembly write is understood: one entry a module, no
calls, registers declared before use, blocks in braces with registers of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|lanemask_eq)")


class UnknownPtx(Exception):
    """Something in the text that the emulator does not know."""


@dataclass(frozen=True)
class Register:
    """A register by its place among the kernel's; `bits` is 1 for a predicate."""

    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Negated:
    """A predicate register, read as its opposite."""

    register: Register


@dataclass(frozen=True)
class Constant:
    """The bits of a number, of two's complement where it is negative."""

    value: int


@dataclass(frozen=True)
class Special:
    """A register of the hardware, like `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]; or a parameter's name as the base."""

    base: Operand | str
    offset: int


@dataclass(frozen=True)
class Label:
    """Where a branch goes."""

    name: str


@dataclass(frozen=True)
class Sink:
    """A result that nobody wants, `_`."""


@dataclass(frozen=True)
class Vector:
    """Operands in braces."""

    parts: tuple[Operand, ...]


def register(operand: Operand) -> Register:
    """An operand that has to be a register."""
    if not isinstance(operand, Register):
        raise UnknownPtx(f"{operand} in the place of a register")
    return operand


Operand = Register | Negated | Constant | Special | Address | Label | Sink | Vector


@dataclass(frozen=True)
class Statement:
    """One instruction.

    Attributes:
        text: as written, on one line.
        opcode: the first part of the name, "ld" of "ld.global.b32"; modifiers: the other parts.
        guard: a predicate of the threads that take part; None for all.
    """

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None

    @property
    def name(self) -> str:
        """The instruction with its modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def type(self) -> str:
        """The last modifier: the type of the operands."""
        return self.modifiers[-1]


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        parameters: name and bytes of each. threads: of a program, 0 for a block of assembly.
        registers: all, in the order of their indices.
        labels: the statement that comes after each.
    """

    name: str = ""
    parameters: list[tuple[str, int]] = field(default_factory=list)
    threads: int = 0
    statements: list[Statement] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse_kernel(text: str) -> Kernel:
    """The entry of a PTX module."""
    entry = text[text.index(".visible .entry") :]
    found = re.match(r"\.visible \.entry (\w+)\(", entry)
    threads = re.search(r"\.reqntid (\d+)", entry)
    if found is None or threads is None:
        raise UnknownPtx("the module has no entry with a fixed number of threads")
    head, body = entry[: entry.index("\n{")], entry[entry.index("\n{") + 1 :]
    parameters = [
        (name, int(bits) // 8)
        for bits, name in re.findall(r"\.param \.[ubsf](\d+)[^,\n]*?(\w+_param_\d+)", head)
    ]
    kernel = Kernel(found[1], parameters, int(threads[1]))
    _Reader(kernel, {}).read(body)
    return kernel


def parse_assembly(text: str, registers: dict[str, int]) -> tuple[Kernel, dict[str, Register]]:
    """A block of inline assembly, its operands being registers of given widths by name."""
    kernel = Kernel()
    reader = _Reader(kernel, {})
    known = {name: reader.declare(name, bits) for name, bits in registers.items()}
    reader.read(text)
    return kernel, known


class _Reader:
    """Turns text into statements, with the registers of the blocks that are open."""

    def __init__(self, kernel: Kernel, outermost: dict[str, Register]) -> None:
        self.kernel = kernel
        self.scopes = [outermost]

    def declare(self, name: str, bits: int) -> Register:
        register = Register(len(self.kernel.registers), bits, name)
        self.kernel.registers.append(register)
        self.scopes[-1][name] = register
        return register

    def read(self, body: str) -> None:
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"^\s*\.(loc|pragma|file|section)\b[^\n]*$", "", body, flags=re.M)
        # A brace opens a block at the start of a statement, and a vector elsewhere.
        token = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)")
        place = 0
        while found := token.match(body, place):
            place = found.end()
            if found["brace"] == "{":
                self.scopes.append({})
            elif found["brace"]:
                self.scopes.pop()
                if len(self.scopes) == 1:
                    return  # the end of the kernel; sections of debugging come after it
            elif found["label"]:
                self.kernel.labels[found["label"]] = len(self.kernel.statements)
            else:
                self._statement(" ".join(found["text"].split()))

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declaration(text)
            return
        found = re.match(r"(?:@(!?[%\w]+) )?([\w.:]+) ?(.*)$", text)
        if found is None:
            raise UnknownPtx(text)
        guard = self._operand(found[1]) if found[1] else None
        assert guard is None or isinstance(guard, Register | Negated), text
        opcode, *modifiers = found[2].split(".")
        operands = tuple(self._operand(x) for x in _split(found[3]))
        self.kernel.statements.append(Statement(text, opcode, tuple(modifiers), operands, guard))

    def _declaration(self, text: str) -> None:
        found = re.match(r"\.reg \.(?:[bfsu](\d+)|(pred)) (.*)$", text)
        if found is None:
            raise UnknownPtx(text)
        bits = WIDTHS[found[1] or found[2]]
        for name in found[3].split(","):
            many = re.fullmatch(r"(.*)<(\d+)>", name.strip())
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for each in names:
                self.declare(each, bits)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            if "_param_" in base:
                return Address(base, int(offset or "0", 0))
            return Address(self._operand(base), int(offset or "0", 0))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
            if text[1:] in scope and text[0] == "!":
                return Negated(scope[text[1:]])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Constant(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        if text == "global_smem":  # where a program's shared memory begins
            return Constant(0)
        if text == "_":
            return Sink()
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text.startswith("$"):
            return Label(text)
        raise UnknownPtx(f"operand {text}")


def _split(text: str) -> list[str]:
    """Operands, separated by the commas outside of brackets and braces."""
    return [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", text) if x.strip()]
