"""Runs a kernel: one program after the other, statement by statement, all threads in lock step.

Triton's kernels branch for whole programs only; a branch that threads of a program decide
differently is a fault. Between barriers, threads of different warps run in any order on hardware:
that is what the memories' races are about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.emulator import arithmetic, matrix
from tests.emulator.arithmetic import Execute
from tests.emulator.counts import Counts
from tests.emulator.memory import Buffer, Clock, GlobalMemory, SharedMemory
from tests.emulator.parse import (
    Address,
    Constant,
    Kernel,
    Label,
    Operand,
    Statement,
    UnknownPtx,
    Vector,
    parse_kernel,
    register,
)
from tests.emulator.registers import UNSIGNED, Array, Fault, Registers, Writer

_MAX_STATEMENTS = 3_000_000  # of a program: it would not end


class Machine:
    """A kernel, ready to run.

    Args:
        text: a PTX module. shared: bytes of shared memory of a program.
    """

    def __init__(self, text: str, shared: int) -> None:
        self.kernel: Kernel = parse_kernel(text)
        self._shared_size = shared
        self._registers = Registers(self.kernel, self.kernel.threads)
        self._threads = np.arange(self.kernel.threads)
        self._warps = self._threads // 32
        self._clock = Clock()
        # Of the launch under way.
        self._arguments: list[int] = []
        self._counts: Counts
        self._faults: Counter[str]
        self._global: GlobalMemory
        self._shared: SharedMemory
        self._steps = [self._build(x) for x in self.kernel.statements]
        guards = [x.guard for x in self.kernel.statements]
        self._guards = [None if x is None else self._registers.reader(x, 1) for x in guards]
        self._executed = np.zeros(len(self._steps), dtype=np.int64)

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[int],
        buffers: list[Buffer],
        faults: Counter[str],
        order: Array | None = None,
    ) -> Counts:
        """Run the programs of a grid, and count what they cost.

        Args:
            arguments: the bits of each parameter. buffers: what their addresses may reach.
            faults: counts what is seen that a correct kernel does not do.
            order: the programs' numbers in the order in which they run; by default as counted.

        Raises:
            Fault: if a program cannot go on.
        """
        if len(arguments) != len(self.kernel.parameters):
            raise UnknownPtx(f"{len(arguments)} arguments for {len(self.kernel.parameters)}")
        self._arguments, self._faults, self._counts = list(arguments), faults, Counts()
        self._clock = Clock()
        self._global = GlobalMemory(buffers, self._clock, faults)
        self._executed[:] = 0
        x, y, z = grid
        with np.errstate(all="ignore"):
            for i in range(x * y * z) if order is None else order.tolist():
                self._run((i % x, i // x % y, i // (x * y)), grid)
        self._global.finish()
        self._registers.clear()  # machines are kept
        for statement, count in zip(self.kernel.statements, self._executed, strict=True):
            self._counts.instructions[statement.name] += int(count) * self.kernel.threads // 32
        self._counts.programs = x * y * z
        return self._counts

    def _run(self, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        registers = self._registers
        registers.clear()
        lane = self._threads % 32
        registers.special.update(
            {
                "%tid.x": self._threads,
                "%laneid": lane,
                "%warpid": self._warps,
                "%lanemask_eq": 1 << lane,
            }
        )
        for axis, place, size in zip("xyz", program, grid, strict=True):
            registers.special[f"%ctaid.{axis}"] = np.full_like(lane, place)
            registers.special[f"%nctaid.{axis}"] = np.full_like(lane, size)
        self._clock.begin_program()
        self._counts.begin_program()
        self._shared = SharedMemory(self._shared_size, self._clock, self._faults)
        place, executed, statements = 0, self._executed, self.kernel.statements
        for _ in range(_MAX_STATEMENTS):
            statement, step, guard = statements[place], self._steps[place], self._guards[place]
            executed[place] += 1
            active = registers.everyone
            if guard is not None:
                active = guard()
                if not active.any():
                    place += 1
                    continue
                if active.all():
                    active = registers.everyone
            if step is not None:
                try:
                    step(active)
                except Fault as fault:
                    raise Fault(f"{fault}: {statement.text}") from None
                place += 1
                continue
            if active is not registers.everyone:
                raise Fault(f"threads of a program go different ways: {statement.text}")
            if statement.opcode == "ret":
                self._shared.finish()
                return
            target = statement.operands[0]
            assert isinstance(target, Label)
            place = self.kernel.labels[target.name]
        raise Fault(f"the program does not end within {_MAX_STATEMENTS} statements")

    # What a statement does, made once

    def _build(self, statement: Statement) -> Execute | None:
        """What executes a statement; None for one after which another may be next."""
        opcode = statement.opcode
        if opcode in ("bra", "ret"):
            return None
        builders: dict[str, Callable[[Statement], Execute]] = {
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic_add,
            "bar": self._barrier,
            "fence": self._fence,
            "cp": self._copy,
            "ldmatrix": self._load_matrices,
            "stmatrix": self._store_matrices,
            "mma": self._multiply,
            "wgmma": self._multiply_later,
        }
        if opcode in builders:
            return builders[opcode](statement)
        found = arithmetic.build(statement, self._registers)
        if found is None:
            raise UnknownPtx(statement.text)
        return found

    def _address(self, operand: Operand, bits: int) -> Callable[[], Array]:
        assert isinstance(operand, Address), operand
        assert not isinstance(operand.base, str), operand
        read, offset = self._registers.reader(operand.base, bits), operand.offset
        if bits == 32:  # an offset may lead back from beyond the end
            return lambda: (read().astype(np.int64) + offset) & 0xFFFFFFFF
        return lambda: read().astype(np.int64) + offset

    def _load(self, statement: Statement) -> Execute:
        target, source = statement.operands
        space, bits = statement.modifiers[0], arithmetic.width(statement.type)
        writers = [self._registers.writer(x) for x in _parts(target)]
        if space == "param":
            return self._load_parameter(statement, writers[0])
        if space not in ("global", "shared") or statement.type[0] not in "bs":
            raise UnknownPtx(statement.text)
        is_global, name, what = space == "global", statement.name, statement.text
        address = self._address(source, 64 if is_global else 32)
        size, dtype = bits // 8 * len(writers), UNSIGNED[bits]
        # A signed number fills its register up with its sign.
        filled = [register(x).bits for x in _parts(target)] if statement.type[0] == "s" else []

        def execute(active: Array) -> None:
            places, warps = address(), self._warps
            everyone = active is self._registers.everyone
            where = places if everyone else places[active]
            warps = warps if everyone else warps[active]
            if is_global:
                where = self._global.places(where, size)
                data = self._global.load(where, size, warps, what)
                self._counts.of_global(name, places, active, size)
            else:
                data = self._shared.load(where, size, warps, what)
                self._counts.shared(name, places, active, size)
            values = data.view(dtype)
            for i, write in enumerate(writers):
                value = values[:, i]
                if not everyone:
                    value = np.zeros(len(places), dtype)
                    value[active] = values[:, i]
                if filled:
                    value = value.view(f"i{bits // 8}").astype(f"i{filled[i] // 8}")
                    value = value.view(UNSIGNED[filled[i]])
                write(value, active)

        return execute

    def _load_parameter(self, statement: Statement, write: Writer) -> Execute:
        source = statement.operands[1]
        assert isinstance(source, Address)
        assert isinstance(source.base, str)
        names = [name for name, _ in self.kernel.parameters]
        index, bits = names.index(source.base), arithmetic.width(statement.type)
        if source.offset or self.kernel.parameters[index][1] * 8 < bits:
            raise UnknownPtx(statement.text)
        # Narrower than the register only for a signed number, which fills it up with its sign.
        bits_there = register(statement.operands[0]).bits

        def execute(active: Array) -> None:
            value = self._arguments[index] & ((1 << bits) - 1)
            if statement.type[0] == "s" and value >> (bits - 1):
                value += (1 << bits_there) - (1 << bits)
            write(np.full(len(active), value, dtype=UNSIGNED[bits_there]), active)

        return execute

    def _store(self, statement: Statement) -> Execute:
        target, source = statement.operands
        space, bits = statement.modifiers[0], arithmetic.width(statement.type)
        if space not in ("global", "shared") or statement.type[0] != "b":
            raise UnknownPtx(statement.text)
        readers = [self._registers.reader(x, bits) for x in _parts(source)]
        is_global, name, what = space == "global", statement.name, statement.text
        address = self._address(target, 64 if is_global else 32)
        size = bits // 8 * len(readers)

        def execute(active: Array) -> None:
            places = address()
            values = np.stack([read() for read in readers], axis=1).view(np.uint8)
            where, warps = places[active], self._warps[active]
            if is_global:
                where = self._global.places(where, size)
                self._global.store(where, values[active], warps, what)
                self._counts.of_global(name, places, active, size)
            else:
                self._shared.store(where, values[active], warps, what)
                self._counts.shared(name, places, active, size)

        return execute

    def _atomic_add(self, statement: Statement) -> Execute:
        if statement.modifiers != ("global", "gpu", "acq_rel", "add", "u32"):
            raise UnknownPtx(statement.text)
        target, where, source = statement.operands
        write, read = self._registers.writer(target), self._registers.reader(source, 32)
        address = self._address(where, 64)

        def execute(active: Array) -> None:
            places = self._global.places(address()[active], 4)
            added = zip(places.tolist(), read()[active].tolist(), strict=True)
            before = np.zeros(len(active), dtype=np.uint32)
            before[active] = [self._global.atomic_add(*x, statement.text) for x in added]
            write(before, active)

        return execute

    def _barrier(self, statement: Statement) -> Execute:
        if statement.name == "bar.warp.sync":
            return lambda active: None  # lanes are in step
        if statement.name != "bar.sync" or statement.operands != (Constant(0),):
            raise UnknownPtx(statement.text)

        def execute(active: Array) -> None:
            if active is not self._registers.everyone:
                raise Fault("a barrier that not all threads come to")
            self._counts.barriers += 1
            self._clock.barrier()

        return execute

    def _fence(self, statement: Statement) -> Execute:
        if statement.name != "fence.proxy.async.shared::cta":
            raise UnknownPtx(statement.text)
        return lambda active: self._shared.fence()

    def _copy(self, statement: Statement) -> Execute:
        if statement.name == "cp.async.commit_group":
            return lambda active: self._shared.commit()
        if statement.name == "cp.async.wait_group":
            allowed = statement.operands[0]
            assert isinstance(allowed, Constant)
            return lambda active: self._shared.wait(allowed.value)
        if statement.modifiers[0] != "async" or statement.modifiers[2:] != ("shared", "global"):
            raise UnknownPtx(statement.text)
        target, source, length, *taken = statement.operands
        assert isinstance(length, Constant)
        size, name, what = length.value, statement.name, statement.text
        to, start = self._address(target, 32), self._address(source, 64)
        read = self._registers.reader(taken[0] if taken else length, 32)

        def execute(active: Array) -> None:
            places, addresses, lengths = to(), start(), read()
            if not np.isin(lengths, (0, size)).all():
                raise UnknownPtx(f"part of a copy: {what}")
            values = np.zeros((len(active), size), dtype=np.uint8)  # zeros for a length of 0
            reads = active & (lengths > 0)
            if reads.any():
                where = self._global.places(addresses[reads], size)
                values[reads] = self._global.load(where, size, self._warps[reads], what)
                self._counts.of_global(name, addresses, reads, size)
            self._shared.copy_later(places[active], values[active], self._warps[active], what)
            self._counts.shared(name, places, active, size)

        return execute

    # Matrices

    def _rows(
        self, statement: Statement, operand: Operand, count: int
    ) -> Callable[[], tuple[Array, Array]]:
        """Threads that name rows of `count` matrices of every warp, and all threads' addresses."""
        if f"m8n8.x{count}" not in statement.name:
            raise UnknownPtx(statement.text)
        address = self._address(operand, 32)
        naming = self._threads % 32 < 8 * count
        return lambda: (naming, address())

    def _load_matrices(self, statement: Statement) -> Execute:
        target, source = statement.operands
        transposed = "trans" in statement.modifiers
        writers = [self._registers.writer(x) for x in _parts(target)]
        count, name, what = len(writers), statement.name, statement.text
        rows = self._rows(statement, source, count)

        def execute(active: Array) -> None:
            naming, places = rows()
            data = self._shared.load(places[naming], 16, self._warps[naming], what)
            self._counts.shared(name, places, naming, 16)
            data = data.reshape(-1, 8 * count, 16)
            for write, value in zip(
                writers, matrix.matrices_to_registers(data, transposed), strict=True
            ):
                write(value, active)

        return execute

    def _store_matrices(self, statement: Statement) -> Execute:
        target, source = statement.operands
        transposed = "trans" in statement.modifiers
        readers = [self._registers.reader(x, 32) for x in _parts(source)]
        name, what = statement.name, statement.text
        rows = self._rows(statement, target, len(readers))

        def execute(active: Array) -> None:
            naming, places = rows()
            data = matrix.registers_to_matrices([read() for read in readers], transposed)
            data = data.reshape(-1, 16)
            self._shared.store(places[naming], data, self._warps[naming], what)
            self._counts.shared(name, places, naming, 16)

        return execute

    def _multiply(self, statement: Statement) -> Execute:
        *how, to, kind, other, added = statement.modifiers
        integers = kind == "s8"
        summed, dtype = ("s32", np.int32) if integers else ("f32", np.float32)
        shape = f"m16n8k{8 * matrix.PIECES[kind]}" if kind in matrix.PIECES else ""
        saturates = ["satfinite"] if integers else []
        known = how == ["sync", "aligned", shape, "row", "col", *saturates]
        if not known or (to, other, added) != (summed, kind, summed):
            raise UnknownPtx(statement.text)
        target, *sources = (_parts(x) for x in statement.operands)
        a, b, c = ([self._registers.reader(x, 32) for x in parts] for parts in sources)
        writers = [self._registers.writer(x) for x in target]

        def execute(active: Array) -> None:
            first = matrix.left([read() for read in a], kind)
            second = matrix.right([read() for read in b], kind)
            result = first @ second + matrix.sums([read() for read in c], dtype)
            for write, value in zip(writers, matrix.sum_registers(result, dtype), strict=True):
                write(value, active)

        return execute

    def _multiply_later(self, statement: Statement) -> Execute:
        """`wgmma`: computed at once; until the wait its registers and memory are not free."""
        registers = self._registers
        if statement.modifiers[0] == "fence":
            return lambda active: None  # what a fence orders is checked by the marks
        if statement.modifiers[0] == "commit_group":
            return lambda active: registers.commit()
        if statement.modifiers[0] == "wait_group":
            allowed = statement.operands[0]
            assert isinstance(allowed, Constant)
            return lambda active: self._shared.give_back(registers.wait(allowed.value))

        return self._start_multiply(statement)

    def _start_multiply(self, statement: Statement) -> Execute:
        *_, shape, to, kind, other = statement.modifiers
        target, source, descriptor, accumulate, *ones = statement.operands
        columns = 2 * len(_parts(target))
        expected = f"m64n{columns}k{8 * matrix.PIECES[kind]}"
        # Both signs, and for 16 bits whether k goes across the lines of A, if that is in shared
        # memory, and of B.
        signs, across = ones[:2], [x == Constant(1) for x in ones[2:]]
        a_across = bool(across) and not isinstance(source, Vector) and across.pop(0)
        known = signs == [Constant(1), Constant(1)] and len(across) <= 1
        if (shape, to, other) != (expected, "f32", kind) or not known:
            raise UnknownPtx(statement.text)
        k_along = across != [True]
        registers, what = self._registers, statement.text
        a = self._lent(source, kind, not a_across, what)
        read_descriptor = registers.reader(descriptor, 64)
        is_added, held = registers.reader(accumulate, 1), _parts(target)
        indices = {register(x).index for x in held}
        readers = [registers.reader(x, 32) for x in held]
        writers = [registers.writer(x) for x in held]

        def execute(active: Array) -> None:
            b = self._right(read_descriptor(), columns, kind, k_along, what)
            result = a() @ b
            for index in indices:  # products of the same sums follow one another
                registers.busy.pop(index, None)
            if is_added().all():
                result = result + matrix.sums([read() for read in readers])
            for write, value in zip(writers, matrix.sum_registers(result), strict=True):
                write(value, active)
            registers.busy |= dict.fromkeys(indices, registers.group)

        return execute

    def _lent(self, source: Operand, kind: str, k_along: bool, what: str) -> Callable[[], Array]:
        """A of every warp, (warps, 16, k), which stays as it is until the wait.

        It is in registers, or in shared memory: 16 lines for each of the four warps of a group.
        """
        if not isinstance(source, Vector):
            read_descriptor = self._registers.reader(source, 64)

            def read_lines() -> Array:
                groups = self._lines(read_descriptor(), 64, k_along, kind, what)
                return np.concatenate([x.reshape(4, 16, -1) for x in groups])

            return read_lines
        readers = [self._registers.reader(x, 32) for x in source.parts]
        indices = {register(x).index for x in source.parts}

        def read_all() -> Array:
            self._registers.lent |= dict.fromkeys(indices, self._registers.group)
            return matrix.left([read() for read in readers], kind)

        return read_all

    def _right(self, words: Array, columns: int, kind: str, k_along: bool, what: str) -> Array:
        """B (warps, k, columns) of shared memory, the same for the four warps of a group."""
        groups = self._lines(words, columns, k_along, kind, what)
        return np.stack([x.T for x in groups for _ in range(4)])

    def _lines(
        self, words: Array, count: int, k_along: bool, kind: str, what: str
    ) -> Iterator[Array]:
        """An operand in shared memory of every group of four warps, (count, k) float64."""
        lines, chunks = (count, 2) if k_along else (8 * matrix.PIECES[kind], count // 8)
        for group in words.reshape(-1, 128):
            if (group != group[0]).any():
                raise Fault("threads give wgmma different descriptors")
            places = matrix.Descriptor.of(int(group[0])).places(lines, chunks, k_along)
            data = self._shared.lend(places.reshape(-1), 16, self._registers.group, what)
            elements = matrix.operand_floats(data.reshape(lines, -1).view(np.uint32), kind)
            elements = elements.reshape(lines, -1).astype(np.float64)
            yield elements if k_along else elements.T


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)
