"""Global and shared memory, and the faults of reading and writing it.

Every byte knows whether it was ever written, and who last wrote and read it: which warp, and after
how many barriers. Accesses of two warps of a program with no barrier between them, one of them a
write that changes the byte, are a race. Of different programs of a launch none may read what
another wrote, nor write another value over it; only atomic operations may meet.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tests.emulator.registers import Array, Fault

_WARPS = 64  # a stamp is 64 times the epoch, plus a warp, or SEVERAL
_SEVERAL = _WARPS - 1
_ROW = 16  # bytes of the widest access; buffers begin at multiples of it


class Clock:
    """Counts barriers and programs: `epoch` is another after each.

    Attributes:
        program: the epoch in which the running program began.
    """

    def __init__(self) -> None:
        self.epoch = self.program = 1

    def barrier(self) -> None:
        """What comes from now on comes after what was before, for all warps."""
        self.epoch += 1

    def begin_program(self) -> None:
        """Another program of the launch."""
        self.epoch += 1
        self.program = self.epoch


class Memory:
    """Bytes that the threads of a program read and write.

    Args:
        name: for faults. data: (bytes,) a multiple of 16. written: (bytes,) bool.
        faults: where faults are counted that a program survives.
    """

    def __init__(
        self, name: str, data: Array, written: Array, clock: Clock, faults: Counter[str]
    ) -> None:
        self.name, self.data, self.written = name, data, written
        self.clock, self.faults = clock, faults
        self._writers = np.zeros(len(data), dtype=np.int32)
        self._readers = np.zeros(len(data), dtype=np.int32)

    def load(self, places: Array, size: int, warps: Array, what: str) -> Array:
        """Read `size` bytes at each place: (places, size).

        Args:
            places: (n,) multiples of `size` within the memory. warps: (n,) who reads.
            what: the instruction.
        """
        rows = places // size
        if not self.written.reshape(-1, size)[rows].all():
            self._fault("uninitialised read", what)
        stamps = (self.clock.epoch * _WARPS + warps.astype(np.int32))[:, None]
        writers = self._writers.reshape(-1, size)[rows]
        if (writers >= self.clock.epoch * _WARPS).any() and (
            (writers // _WARPS == self.clock.epoch) & (writers != stamps)
        ).any():
            self._fault("race: a read after another warp's write", what)
        self._check_programs(writers, what)
        readers = self._readers.reshape(-1, size)
        before = readers[rows]
        several = self.clock.epoch * _WARPS + _SEVERAL
        others = (before // _WARPS == self.clock.epoch) & (before != stamps)
        readers[rows] = np.where(others, several, stamps)
        if (readers[rows] != np.where(others, several, stamps)).any():  # two warps at once
            readers[rows] = several
        return self.data.reshape(-1, size)[rows]

    def store(self, places: Array, values: Array, warps: Array, what: str) -> None:
        """Write values (n, size) at the places (n,)."""
        size = values.shape[1]
        rows, epoch = places // size, self.clock.epoch
        stamps = (epoch * _WARPS + warps.astype(np.int32))[:, None]
        changed = self.data.reshape(-1, size)[rows] != values
        writers = self._writers.reshape(-1, size)[rows]
        if ((writers // _WARPS == epoch) & (writers != stamps) & changed).any():
            self._fault("race: a write after another warp's write", what)
        readers = self._readers.reshape(-1, size)[rows]
        if ((readers // _WARPS == epoch) & (readers != stamps) & changed).any():
            self._fault("race: a write after another warp's read", what)
        self._check_programs(writers, what, changed)
        self.data.reshape(-1, size)[rows] = values
        if not _agree(self.data.reshape(-1, size)[rows], values):
            self._fault("race: threads write different values at once", what)
        self._writers.reshape(-1, size)[rows] = stamps
        self.written.reshape(-1, size)[rows] = True

    def _check_programs(self, writers: Array, what: str, changed: Array | bool = True) -> None:
        """Writers of other programs: those before the epoch in which this one began."""

    def _fault(self, kind: str, what: str) -> None:
        self.faults[f"{kind}, {self.name}: {what}"] += 1


def _agree(left: Array, right: Array) -> bool:
    """Whether bytes (n, size) are the same, but for the rounding of float32.

    Triton has several threads compute the same sum and store it. Where a product is fused with the
    sum, each of them has rounded another product. (Sums near 0 have the rounding of their terms,
    which are about 1 here.)
    """
    different = (left != right).any(axis=1)
    if not different.any():
        return True
    if left.shape[1] % 4:
        return False
    a, b = (x[different].view(np.float32) for x in (left, right))
    return bool((np.abs(a - b) <= 2.0**-20 * np.maximum(np.abs(b), 1)).all())


@dataclass(frozen=True)
class Buffer:
    """Some memory of the device.

    Attributes:
        address: of its first byte. data: (bytes,), shared with the tensor.
        written: (bytes,) bool, False where nothing was ever written; None: all was.
    """

    name: str
    address: int
    data: Array
    written: Array | None = None


class GlobalMemory(Memory):
    """The buffers of a launch, copied into one stretch of memory until `finish`."""

    def __init__(self, buffers: list[Buffer], clock: Clock, faults: Counter[str]) -> None:
        self.buffers = sorted(buffers, key=lambda x: x.address)
        sizes = [len(x.data) for x in self.buffers]
        room = [(size // _ROW + 1) * _ROW for size in sizes]
        self._starts = np.concatenate(([0], np.cumsum(room))).astype(np.int64)
        self._addresses = np.array([x.address for x in self.buffers], dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)
        total = int(self._starts[-1])
        super().__init__(
            "global memory",
            np.zeros(total, np.uint8),
            np.ones(total, dtype=bool),
            clock,
            faults,
        )
        for part, written, buffer in self._parts():
            part[:] = buffer.data
            if buffer.written is not None:
                written[:] = buffer.written

    def _parts(self) -> list[tuple[Array, Array, Buffer]]:
        slices = [
            slice(start, start + size)
            for start, size in zip(self._starts[:-1], self._sizes, strict=True)
        ]
        return [
            (self.data[x], self.written[x], buffer)
            for x, buffer in zip(slices, self.buffers, strict=True)
        ]

    def finish(self) -> None:
        """Give the buffers what was written."""
        for part, written, buffer in self._parts():
            buffer.data[:] = part
            if buffer.written is not None:
                buffer.written[:] = written

    def places(self, addresses: Array, size: int) -> Array:
        """Where addresses (n,) lie; a fault if `size` bytes from there leave a buffer."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"global address that is no multiple of {size}")
        which = np.searchsorted(self._addresses, addresses, side="right") - 1
        offsets = addresses - self._addresses[which]
        outside = (which < 0) | (offsets + size > self._sizes[which])
        if outside.any():
            nearest = self.buffers[max(0, int(which[outside][0]))]
            raise Fault(
                f"global address out of bounds, {int(addresses[outside][0]) - nearest.address} "
                f"in {nearest.name} of {len(nearest.data)} bytes"
            )
        return self._starts[which] + offsets

    def atomic_add(self, place: int, value: int, what: str) -> int:
        """Add to an unsigned word of 32 bits; what was there."""
        if not self.written[place : place + 4].all():
            self._fault("uninitialised read", what)
        word = self.data[place : place + 4].view(np.uint32)
        before = int(word[0])
        word[0] = (before + value) & 0xFFFFFFFF
        return before

    def _check_programs(self, writers: Array, what: str, changed: Array | bool = True) -> None:
        # The stamps of a launch begin at its first epoch: 0 is no stamp.
        if ((writers > 0) & (writers < self.clock.program * _WARPS) & changed).any():
            self._fault("two programs of a launch meet", what)


class SharedMemory(Memory):
    """The shared memory of one program, at first full of anything.

    Data of `cp.async` arrive when the program waits for them. Until then nobody may touch their
    place, as the hardware may write there at any time.
    """

    def __init__(self, size: int, clock: Clock, faults: Counter[str]) -> None:
        size = (max(size, 1) + _ROW - 1) // _ROW * _ROW
        garbage = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        super().__init__("shared memory", garbage, np.zeros(size, dtype=bool), clock, faults)
        self._in_flight = np.zeros(size, dtype=bool)
        self._pending: list[tuple[Array, Array, Array, str]] = []
        self._groups: list[list[tuple[Array, Array, Array, str]]] = []
        # Of `wgmma`: the last group that reads a byte until it is waited for, 0 for none, and bytes
        # that were written since the last fence between the two ways into shared memory.
        self._lent = np.zeros(size, dtype=np.int32)
        self._unfenced = np.zeros(size, dtype=bool)

    def check(self, places: Array, size: int) -> None:
        """A fault unless all places are aligned and within the memory."""
        if (places % size).any():
            raise Fault(f"shared address that is no multiple of {size}")
        if (places < 0).any() or (places + size > len(self.data)).any():
            raise Fault(f"shared address out of bounds of {len(self.data)} bytes")

    def load(self, places: Array, size: int, warps: Array, what: str) -> Array:
        self.check(places, size)
        if self._in_flight.reshape(-1, size)[places // size].any():
            self._fault("read while cp.async is in flight", what)
        return super().load(places, size, warps, what)

    def store(self, places: Array, values: Array, warps: Array, what: str) -> None:
        size = values.shape[1]
        self.check(places, size)
        rows = places // size
        if self._in_flight.reshape(-1, size)[rows].any():
            self._fault("write while cp.async is in flight", what)
        if self._lent.reshape(-1, size)[rows].any():
            self._fault("write while wgmma reads", what)
        super().store(places, values, warps, what)
        self._unfenced.reshape(-1, size)[rows] = True

    def copy_later(self, places: Array, values: Array, warps: Array, what: str) -> None:
        """`cp.async`: values (n, size) that arrive at a later `wait`."""
        size = values.shape[1]
        self.check(places, size)
        rows = places // size
        stamps = (self.clock.epoch * _WARPS + warps.astype(np.int32))[:, None]
        for stamped in (self._readers, self._writers):
            found = stamped.reshape(-1, size)[rows]
            if ((found // _WARPS == self.clock.epoch) & (found != stamps)).any():
                self._fault("race: a copy over what another warp uses", what)
        if self._in_flight.reshape(-1, size)[rows].any():
            self._fault("write while cp.async is in flight", what)
        if self._lent.reshape(-1, size)[rows].any():
            self._fault("write while wgmma reads", what)
        self._in_flight.reshape(-1, size)[rows] = True
        self._pending.append((places, values, warps, what))

    def commit(self) -> None:
        """The copies since the last commit are a group."""
        self._groups.append(self._pending)
        self._pending = []

    def wait(self, allowed: int) -> None:
        """Let all groups arrive but for the last `allowed`."""
        while len(self._groups) > allowed:
            for places, values, warps, what in self._groups.pop(0):
                size = values.shape[1]
                self._in_flight.reshape(-1, size)[places // size] = False
                self.store(places, values, warps, what)

    def fence(self) -> None:
        """What was written is there for `wgmma` too, after the next barrier."""
        self._unfenced[:] = False

    def lend(self, places: Array, size: int, group: int, what: str) -> Array:
        """What the `wgmma`s of a group read, (n, size), in place until `give_back`."""
        if self._unfenced.reshape(-1, size)[places // size].any():
            self._fault("wgmma reads what was written without a fence", what)
        several = np.full(len(places), _SEVERAL, dtype=np.int32)
        values = self.load(places, size, several, what)
        self._lent.reshape(-1, size)[places // size] = group
        return values

    def give_back(self, ended: int) -> None:
        """The `wgmma`s up to this group have read everything."""
        self._lent[self._lent <= ended] = 0

    def finish(self) -> None:
        """The program ends."""
        if self._pending or any(self._groups):
            self._fault("cp.async in flight at the end", "ret")
