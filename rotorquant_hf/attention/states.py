"""What one attention call reads: cached keys, or values, as plain data.

Attention in torch and attention in Triton read the same states through the same interface,
`KVStates`; neither knows who holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.backend import is_capturing, on_device
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.quant.quantizer import Quantizer


class DeviceView(NamedTuple):
    """The tensors that the kernels read, to which `KVStates.lengths` refers.

    Attributes:
        rows: packed tokens, tensors (batch, heads, capacity, ...) by name as in `PackedSpan.rows`.
        recent: (batch, heads, slots, d), a ring; neighbouring channels lie side by side.
    """

    rows: dict[str, Tensor]
    recent: Tensor


class KVStates(Protocol):
    """All keys (or values) that one attention call may read, oldest token first."""

    @property
    def sinks(self) -> Tensor:
        """(batch, heads, n, d), the first tokens, in full precision; n may be 0."""

    @property
    def packed(self) -> PackedSpan:
        """The quantised tokens that follow."""

    @property
    def recent(self) -> Tensor:
        """(batch, heads, m, d), the latest tokens, in full precision; dtype of `sinks`."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""

    @property
    def stand_ins(self) -> StandIns | None:
        """Which tokens are in the places of the sinks, if not the first of all rows."""

    @property
    def max_packed(self) -> int:
        """Packed tokens that a kernel launch has to be laid out for."""

    @property
    def plans(self) -> dict[Hashable, Any]:
        """What attention has prepared for states in this memory."""

    def device_view(self) -> DeviceView:
        """Where the kernels find the packed and the recent tokens."""

    def lengths(self) -> Tensor:
        """Where in the device view the tokens lie, (5,) int32 on the device.

        The number of sinks, the first packed row, the number of packed tokens, the first slot of
        the recent tokens and their number.
        """

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the full-precision tokens."""


@dataclass(frozen=True)
class CachedStates:
    """`KVStates` of tensors that nothing changes later."""

    sinks: Tensor
    packed: PackedSpan
    recent: Tensor
    stand_ins: StandIns | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, m, d = self.recent.shape
        return batch, heads, self.sinks.shape[2] + self.packed.shape[2] + m, d

    @property
    def max_packed(self) -> int:
        """As in `KVStates`: all there are."""
        return self.packed.shape[2]

    @property
    def plans(self) -> dict[Hashable, Any]:
        """As in `KVStates`: nothing, for such states are read once."""
        return {}

    def device_view(self) -> DeviceView:
        """As in `KVStates`: the tensors themselves."""
        return DeviceView(self.packed.rows, unit_stride(self.recent))

    def lengths(self) -> Tensor:
        """As in `KVStates`; both views start at their first token."""
        counts = [self.sinks.shape[2], 0, self.packed.shape[2], 0, self.recent.shape[2]]
        return on_device(counts, self.recent.device)

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the recent tokens."""
        out = self.recent.new_empty(self.shape)
        first, last = self.sinks.shape[2], self.shape[2] - self.recent.shape[2]
        out[:, :, :first] = self.sinks
        self.packed.materialize(out[:, :, first:last])
        out[:, :, last:] = self.recent
        if self.stand_ins is not None:
            self.stand_ins.put_back(out, self.sinks)
        return out


@dataclass(frozen=True)
class BufferMemory:
    """Where one side of a layer has its tokens while a buffer takes in new ones.

    Attributes:
        sinks, packed, stand_ins: as in `KVStates`.
        buffer: (batch, heads, slots, d), the recent tokens from the first slot on.
        plans: as in `KVStates`; the other side of the layer has the same.
    """

    sinks: Tensor
    packed: PackedSpan
    buffer: Tensor
    stand_ins: StandIns | None
    plans: dict[Hashable, Any]


class BufferStates:
    """`KVStates` whose recent tokens are the first `count` of a buffer.

    Later tokens take their places behind these, so that nothing changes them. A decode step makes
    two in every layer, so it computes nothing that nobody asks for.
    """

    def __init__(self, memory: BufferMemory, count: int) -> None:
        self.sinks, self.packed, self.plans = memory.sinks, memory.packed, memory.plans
        self.stand_ins, self.count, self._buffer = memory.stand_ins, count, memory.buffer
        batch, heads, sinks, d = self.sinks.shape
        self.shape = (batch, heads, sinks + self.packed.shape[2] + count, d)

    @property
    def recent(self) -> Tensor:
        """As in `KVStates`."""
        return self._buffer[:, :, : self.count]

    @property
    def max_packed(self) -> int:
        """As in `KVStates`: all there are."""
        return self.packed.shape[2]

    def same_step(self, other: BufferStates) -> bool:
        """Whether the other states are of the same step of the same layer."""
        return self.plans is other.plans and self.count == other.count

    def device_view(self) -> DeviceView:
        """As in `KVStates`."""
        return self._as_tensors().device_view()

    def lengths(self) -> Tensor:
        """As in `KVStates`."""
        return self._as_tensors().lengths()

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the recent tokens."""
        return self._as_tensors().materialize()

    def _as_tensors(self) -> CachedStates:
        return CachedStates(self.sinks, self.packed, self.recent, self.stand_ins)


@dataclass(frozen=True)
class PlainStates:
    """Tokens of which none is packed yet; attention reads them as the plain tensor they are."""

    tokens: Tensor

    @property
    def sinks(self) -> Tensor:
        """(batch, heads, tokens, d), all of them."""
        return self.tokens

    @property
    def recent(self) -> Tensor:
        """(batch, heads, 0, d)."""
        return self.tokens[:, :, :0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, tokens, d = self.tokens.shape
        return batch, heads, tokens, d

    def materialize(self) -> Tensor:
        """The tensor itself."""
        return self.tokens


@dataclass
class Clock:
    """How often a ring has moved on; states remember when they were made."""

    ticks: int = 0

    def tick(self) -> None:
        """Make all states made so far stale."""
        self.ticks += 1


@dataclass(frozen=True)
class RingMemory:
    """Where one side of a ring has its tokens, as long as they stay there.

    Attributes:
        sinks, stand_ins: as in `KVStates`. ring: (batch, heads, slots, d), contiguous.
        rows: the store's whole tensors, to which the lengths on the device refer.
        statistics, quantizer: of the packed tokens.
        device_lengths: (5,) int32, what `KVStates.lengths` returns: the kernels of a step write it.
        padding: see `RingBuffer.padding`. plans: as in `KVStates`.
    """

    sinks: Tensor
    ring: Tensor
    rows: dict[str, Tensor]
    statistics: ChannelStatistics
    quantizer: Quantizer
    device_lengths: Tensor
    stand_ins: StandIns | None = None
    padding: Tensor | None = None
    plans: dict[Hashable, Any] = field(default_factory=dict)


class RingStates:
    """`KVStates` whose recent tokens are in a ring, valid until the ring moves on.

    A decode step makes two in every layer, so it computes nothing that nobody asks for.

    Args:
        memory: where the tokens are.
        row, packed: the first packed row and the number of packed tokens.
        begin, count: first slot and number of the recent tokens.
        max_packed: packed tokens that a launch has to be laid out for; more than there are
            where a CUDA graph is to replay it while they grow.
        clock: the ring's.
    """

    def __init__(
        self,
        memory: RingMemory,
        row: int,
        packed: int,
        begin: int,
        count: int,
        max_packed: int,
        clock: Clock,
    ) -> None:
        self.sinks, self.plans, self.max_packed = memory.sinks, memory.plans, max_packed
        self.stand_ins = memory.stand_ins
        self._memory, self._row, self._packed = memory, row, packed
        self._begin, self._count = begin, count
        self._clock, self._made_at = clock, clock.ticks
        batch, heads, sinks, d = memory.sinks.shape
        self.shape = (batch, heads, sinks + packed + count, d)

    @property
    def packed(self) -> PackedSpan:
        """As in `KVStates`."""
        some = slice(self._row, self._row + self._packed)
        rows = {name: x[:, :, some] for name, x in self._memory.rows.items()}
        return PackedSpan(rows, self._memory.statistics, self._memory.quantizer)

    @property
    def padding(self) -> Tensor | None:
        """The mask (batch, 1, 1, tokens) of attention that gets none; see `RingBuffer.padding`."""
        padding = self._memory.padding
        return None if padding is None else padding[..., : self.shape[2]]

    def same_step(self, other: RingStates) -> bool:
        """Whether the other states are of the same step of the same ring."""
        return self._clock is other._clock and self._made_at == other._made_at

    @property
    def recent(self) -> Tensor:
        """The recent tokens, (batch, heads, count, d), copied."""
        self._require_current()
        return read_ring(self._memory.ring, self._begin, self._count)

    def device_view(self) -> DeviceView:
        """As in `KVStates`: the memory that the ring and the store write in."""
        self._require_current()
        return DeviceView(self._memory.rows, self._memory.ring)

    def lengths(self) -> Tensor:
        """As in `KVStates`: those that the device itself keeps up to date."""
        return self._memory.device_lengths

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the recent tokens.

        Raises:
            ValueError: while a CUDA graph is being captured, which would freeze its length.
        """
        if is_capturing(self._memory.ring.device):
            raise ValueError(
                "this attention dequantises keys and values, whose number a CUDA graph would "
                "freeze; decode without a graph"
            )
        states = CachedStates(self.sinks, self.packed, self.recent, self.stand_ins)
        return states.materialize()

    def _require_current(self) -> None:
        """Refuse to read what a later step has overwritten.

        Raises:
            RuntimeError: if the cache was updated since.
        """
        if self._clock.ticks != self._made_at:
            raise RuntimeError(
                "these keys or values are of an earlier update of the cache, whose window has "
                "moved on since; clone() them before the next update, or read layer.keys anew"
            )


def are_of_one_step(keys: KVStates, values: KVStates) -> bool:
    """Whether keys and values are certainly of the same decode step of the same layer."""
    if isinstance(keys, BufferStates):
        return isinstance(values, BufferStates) and keys.same_step(values)
    if isinstance(keys, RingStates):
        return isinstance(values, RingStates) and keys.same_step(values)
    return False


def read_ring(ring: Tensor, begin: int, count: int) -> Tensor:
    """`count` tokens of a ring (batch, heads, slots, d) from slot `begin` on, copied in order."""
    end = min(begin + count, ring.shape[2])
    return torch.cat((ring[:, :, begin:end], ring[:, :, : count - (end - begin)]), dim=2)


def unit_stride(x: Tensor) -> Tensor:
    """x with neighbouring channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
