"""The recent tokens of a layer while it decodes through the native library: a buffer with room.

A step whose tokens all stay in full precision copies them into free slots, and nothing else: what
attention reads lies where it lay, so that its description for the library is made once in `ROOM`
tokens.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.attention.states import BufferMemory, BufferStates, unit_stride
from rotorquant_hf.backend import uses_native
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.native.library import PushArguments, library
from rotorquant_hf.store.buffers import with_room
from rotorquant_hf.store.kv_store import RotorQuantKVCache

ROOM = 16
"""Tokens that a buffer has room for at first: with more it is made less often, and more is idle."""


class _Binding(NamedTuple):
    """What attention and the library are told of a buffer."""

    memory: tuple[BufferMemory, BufferMemory]
    push: PushArguments


class RecentBuffer:
    """The recent tokens of one layer, and room for the next, at most until a block leaves.

    Args:
        store: the layer's packed tokens; at least one.
        sinks: keys and values (batch, heads, n, d), complete.
        recent: keys and values (batch, heads, m, d), the tokens after the packed ones.
        config: the layer's settings.
        stand_ins: in the places of sinks.

    Attributes:
        sinks, stand_ins: as given.
        count: tokens in the buffer.
    """

    def __init__(
        self,
        store: RotorQuantKVCache,
        sinks: tuple[Tensor, Tensor],
        recent: tuple[Tensor, Tensor],
        config: RotorQuantConfig,
        stand_ins: StandIns | None = None,
    ) -> None:
        self.sinks, self.stand_ins, self.count = sinks, stand_ins, recent[0].shape[2]
        self._store, self._device = store, recent[0].device
        self._rows = _rows_of(store)
        slots = min(self.count + ROOM, config.residual_length + config.block_length - 1)
        with torch.inference_mode(False), torch.no_grad():  # also written to outside of it
            self._buffers = (with_room(recent[0], slots), with_room(recent[1], slots))

    def step(self, keys: Tensor, values: Tensor) -> tuple[BufferStates, BufferStates] | None:
        """Take in new tokens (batch, heads, n, d); what attention reads.

        None if they are not to be copied and no more: tokens of another kind than those held, or
        with NaN or infinite elements; more than there is room for; packed tokens that are not where
        they were; a pass that autograd may record. Nothing is then taken in.
        """
        count = self._count_after(keys, values)
        if not count or not uses_native(self._device):
            return None
        binding = _bindings.get(self)
        if binding is None:
            binding = _bindings[self] = self._bind()
        push, loaded = binding.push, library()
        assert loaded is not None
        keys, values = unit_stride(keys), unit_stride(values)  # held while they are copied
        push.tokens = count - self.count
        for pushed, x, buffer in (
            (push.keys, keys, self._buffers[0]),
            (push.values, values, self._buffers[1]),
        ):
            pushed.from_.point(x)
            pushed.to.data = buffer.data_ptr() + self.count * pushed.d * buffer.itemsize
        if not loaded.push(push):
            return None
        self.count = count
        return BufferStates(binding.memory[0], count), BufferStates(binding.memory[1], count)

    def _count_after(self, keys: Tensor, values: Tensor) -> int:
        """Tokens held after a step, 0 if it cannot be taken."""
        if torch.is_grad_enabled() or keys.dim() != 4:
            return 0
        n = keys.shape[2]
        for x, buffer in ((keys, self._buffers[0]), (values, self._buffers[1])):
            batch, heads, slots, d = buffer.shape
            if x.shape != (batch, heads, n, d) or not 0 < n <= slots - self.count:
                return 0
            if type(x) is not Tensor or x.dtype != buffer.dtype or x.device != self._device:
                return 0
        (k, k_span, v, v_span), held = _rows_of(self._store), self._rows
        if k is not held[0] or v is not held[2] or (k_span, v_span) != (held[1], held[3]):
            return 0
        return self.count + n

    def _bind(self) -> _Binding:
        plans: dict[Hashable, Any] = {}
        keys, values = (
            BufferMemory(part, side.span(), buffer, self.stand_ins, plans)
            for part, side, buffer in zip(self.sinks, self._store.sides, self._buffers, strict=True)
        )
        push = PushArguments()
        push.batch, push.heads = self._buffers[0].shape[:2]
        for pushed, buffer in zip((push.keys, push.values), self._buffers, strict=True):
            pushed.d = buffer.shape[3]
            pushed.to.point(buffer)
        return _Binding((keys, values), push)

    def recent(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the recent tokens, oldest first: views, which nothing changes."""
        keys, values = self._buffers
        return keys[:, :, : self.count], values[:, :, : self.count]

    def none(self) -> tuple[Tensor, Tensor]:
        """Keys and values of no tokens."""
        keys, values = self._buffers
        return keys[:, :, :0], values[:, :, :0]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free slots included."""
        return sum(x.nbytes for x in self._buffers)


_bindings: WeakKeyDictionary[RecentBuffer, _Binding] = WeakKeyDictionary()
"""Not in the buffers: a cache holds none of the tables that all share, and a copy binds anew."""


def _rows_of(store: RotorQuantKVCache) -> tuple[Any, ...]:
    """The tensors of the rows of keys, which of them are in use, and the same of values."""
    k, v = store.keys.buffers, store.values.buffers
    return k.tensors, (k.start, k.end), v.tensors, (v.start, v.end)
