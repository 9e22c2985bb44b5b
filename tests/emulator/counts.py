"""What a launch costs, counted: instructions of warps, wavefronts of shared memory, sectors.

Shared memory has 32 banks of 4 bytes. A warp's access is served in wavefronts, each of which takes
one word of every bank; accesses of 8 and 16 bytes go by half and quarter warps. Without conflicts
of banks the wavefronts are the ideal ones. Global memory is accessed in sectors of 32 bytes: those
that go to the second-level cache are counted. Loads but `cp.async.cg` go through the first-level
cache, which is taken to keep what its program has read.
What `wgmma` itself reads of shared memory is not counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.emulator.registers import Array

_SECTOR = 32


@dataclass
class Counts:
    """Sums over the programs of a launch, by the names of instructions.

    Attributes:
        programs: that ran. barriers: that a program waited at, summed over programs.
        instructions: of warps.
        wavefronts, ideal: of shared memory, with and without bank conflicts.
        sectors: asked of the second-level cache. useful: bytes that threads asked for.
    """

    programs: int = 0
    barriers: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    wavefronts: Counter[str] = field(default_factory=Counter)
    ideal: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    useful: Counter[str] = field(default_factory=Counter)
    _kept: set[int] = field(default_factory=set, repr=False)  # sectors in the first-level cache

    def begin_program(self) -> None:
        """A program begins: nothing is in its first-level cache."""
        self._kept.clear()

    def shared(self, name: str, places: Array, active: Array, size: int) -> None:
        """An access of `size` bytes by every active thread, at places (threads,)."""
        # Loops and programs repeat their accesses.
        found, ideal = _wavefronts(places.tobytes(), active.tobytes(), size)
        self.wavefronts[name] += found
        self.ideal[name] += ideal

    def of_global(self, name: str, addresses: Array, active: Array, size: int) -> None:
        """An access of `size` bytes by every active thread, at addresses (threads,)."""
        sectors = addresses[active].astype(np.int64) // _SECTOR
        if name.startswith("st") or ".cg." in name:
            warps = np.arange(len(addresses)) // 32
            self.sectors[name] += len(np.unique(warps[active] << np.int64(48) | sectors))
        else:
            new = set(sectors.tolist()) - self._kept
            self.sectors[name] += len(new)
            self._kept |= new
        self.useful[name] += size * int(active.sum())


@functools.lru_cache(maxsize=1 << 16)
def _wavefronts(all_places: bytes, all_active: bytes, size: int) -> tuple[int, int]:
    """Wavefronts of an access at int64 places where bools are true, and without conflicts."""
    places = np.frombuffer(all_places, dtype=np.int64)
    active = np.frombuffer(all_active, dtype=bool)
    lanes = 32 * 4 // max(size, 4)  # that are served together
    groups = np.arange(len(places)) // lanes
    words = places[active, None] // 4 + np.arange(max(size // 4, 1))
    keys = np.unique(groups[active, None] << 20 | words)
    conflicts = np.bincount((keys >> 20) * 32 + keys % 32, minlength=32 * (int(groups[-1]) + 1))
    return int(conflicts.reshape(-1, 32).max(axis=1).sum()), len(np.unique(groups[active]))
