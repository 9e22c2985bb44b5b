"""What attention reads, as plain data: lengths, device views, rings that wrap around."""

from __future__ import annotations

import pytest
import torch

from rotorquant_hf import RotorQuantKVCache
from rotorquant_hf.attention.states import (
    CachedStates,
    Clock,
    KVStates,
    RingMemory,
    RingStates,
    read_ring,
)

SLOTS = 6


@pytest.fixture
def cached() -> CachedStates:
    """2 sinks, 9 packed and 4 recent tokens; of the recent ones the channels are not neighbours."""
    store = RotorQuantKVCache(16, 16)
    store.append(*torch.randn(2, 1, 2, 9, 16))
    recent = torch.randn(1, 2, 16, 4).transpose(2, 3)
    return CachedStates(torch.randn(1, 2, 2, 16), store.keys.span(), recent)


def in_ring(states: CachedStates, begin: int, clock: Clock) -> RingStates:
    """The same tokens, the recent ones in a ring from slot `begin` on."""
    count = states.recent.shape[2]
    ring = torch.full((1, 2, SLOTS, 16), torch.nan)
    ring[:, :, [(begin + i) % SLOTS for i in range(count)]] = states.recent
    lengths = torch.tensor([2, 0, 9, begin, count], dtype=torch.int32)
    packed = states.packed
    memory = RingMemory(
        states.sinks, ring, packed.rows, packed.statistics, packed.quantizer, lengths
    )
    return RingStates(memory, 0, 9, begin, count, 9, clock)


@pytest.mark.parametrize("begin", [0, 1, 4, 5])
def test_both_kinds_stand_for_the_same_tokens(cached, begin) -> None:
    ring = in_ring(cached, begin, Clock())
    kinds: tuple[KVStates, KVStates] = cached, ring
    assert {states.shape for states in kinds} == {(1, 2, 15, 16)}
    assert {states.max_packed for states in kinds} == {9}
    assert torch.equal(ring.recent, cached.recent)
    assert torch.equal(ring.materialize(), cached.materialize())
    for states in kinds:
        view, (sinks, row, packed, slot, count) = states.device_view(), states.lengths().tolist()
        assert states.lengths().dtype == torch.int32
        assert view.recent.stride(-1) == 1
        assert torch.equal(read_ring(view.recent, slot, count), cached.recent)
        assert (sinks, row, packed) == (2, 0, 9)
        assert view.rows.keys() == cached.packed.rows.keys()


def test_a_ring_that_moved_on_is_not_read(cached) -> None:
    clock = Clock(ticks=7)
    ring, beside, other = (in_ring(cached, 4, x) for x in (clock, clock, Clock(ticks=7)))
    clock.tick()
    later = in_ring(cached, 4, clock)
    assert ring.same_step(beside)
    assert not ring.same_step(later)
    assert not ring.same_step(other)
    for read in (lambda: ring.recent, ring.device_view, ring.materialize):
        with pytest.raises(RuntimeError, match="earlier update"):
            read()
    assert ring.shape == (1, 2, 15, 16)
    assert torch.equal(later.recent, cached.recent)
