"""The recent tokens of a layer while it decodes through the kernels: a ring on the device.

In the ring a step neither concatenates nor moves tokens, and everything that changes from step to
step is a vector of lengths on the device (`kernels.push`), so that a step can be captured in a
CUDA graph. The host keeps the same lengths by the same arithmetic, without ever asking the device.

A step of n tokens, on the device and on the host:

    PushTokens        the new tokens enter the ring          count += n
    attention         reads what is in the ring and packed   (its states are made here)
    append_segments   codes the ring's oldest tokens         packed += block, count -= block
                      once `block_length` too many are in it

The tokens of a block are read in full precision by the attention of their own step, and packed
from the next step on. So the device, which attends after both kernels, counts them as packed only
with the next push (`flush_*` in `kernels.push`), while the host may do so at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.attention.states import Clock, RingMemory, RingStates, read_ring
from rotorquant_hf.backend import on_device
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.quant.channels import SEGMENT
from rotorquant_hf.store.buffers import with_room
from rotorquant_hf.store.kv_store import RotorQuantKVCache


class Lengths(NamedTuple):
    """What the host counts of a ring.

    Attributes:
        begin: slot of the oldest token. tokens: in the ring.
        position: where in the text the oldest is.
        first_row, end_row: of the store, those in use.
    """

    begin: int
    tokens: int
    position: int
    first_row: int
    end_row: int


class RingBuffer:
    """The recent tokens of one layer, and the lengths of its parts on the device.

    Args:
        store: the layer's packed tokens; at least one.
        sinks: keys and values (batch, heads, n, d), complete.
        recent: keys and values (batch, heads, m, d), the tokens after the packed ones.
        config: the layer's settings.
        position: where in the text the first of `recent` is.
        sliding_window: tokens that a query sees, 0 for all.
        stand_ins: in the places of sinks.
    """

    def __init__(
        self,
        store: RotorQuantKVCache,
        sinks: tuple[Tensor, Tensor],
        recent: tuple[Tensor, Tensor],
        config: RotorQuantConfig,
        position: int,
        sliding_window: int = 0,
        stand_ins: StandIns | None = None,
    ) -> None:
        from rotorquant_hf.kernels.push import STATE

        self.store, self.sinks, self.config = store, sinks, config
        store.reserve(0)  # the same rows for keys and values
        self.sliding_window, self._stand_ins = sliding_window, stand_ins
        # A step adds up to a block before a block leaves, so two blocks of slots are needed.
        slots = config.residual_length + 2 * config.block_length
        self.begin, self.count, self.position = 0, recent[0].shape[2], position
        with torch.inference_mode(False), torch.no_grad():  # also written to outside of it
            self.rings = (with_room(recent[0], slots), with_room(recent[1], slots))
            self.lengths = torch.zeros(STATE, dtype=torch.int32, device=recent[0].device)
            self._feedback = store.keys.feedback(position)
        self._push_tokens: Any = None  # bound to this memory, as the next is
        self._memory: tuple[RingMemory, ...] = ()
        self._segment = position // SEGMENT
        self._told: tuple[int, ...] | None = None  # lengths on the device; None: not known
        self._padding: Tensor | None = None
        self.clock = Clock()
        self.captured = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies: all but what is bound to this ring's memory, and made again where missing."""
        return self.__dict__ | {"_push_tokens": None, "_memory": ()}

    def step(self, keys: Tensor, values: Tensor) -> tuple[RingStates, RingStates]:
        """Take in new tokens (batch, heads, n, d), n <= block_length; what attention reads."""
        n = keys.shape[2]
        leaves = self.config.num_to_quantise(self.count + n) > 0
        if leaves:
            with torch.inference_mode(False):
                self.store.reserve(self.config.block_length)
            self.turn_for(n)
        self._upload()
        before = self.on_host()
        self._told = None  # until all is done
        try:
            self._enter(keys, values)
            self._push(n)
            seen = self._states()
            # A graph replays the launch in every step, so it is captured in any; the device's
            # count is 0 in the steps in which no block leaves.
            if leaves or self.captured:
                self._append()
            self._flush()
        except BaseException:
            self.restore(before)
            raise
        return seen

    def _enter(self, keys: Tensor, values: Tensor) -> None:
        """Put new tokens into the ring on the device."""
        from rotorquant_hf.kernels.push import PushTokens

        if self._push_tokens is None:
            self._push_tokens = PushTokens(
                *self.rings,
                self.lengths,
                residual=self.config.residual_length,
                block=self.config.block_length,
                window=self.sliding_window,
            )
        self._push_tokens(keys, values)

    def _append(self) -> None:
        """Code the block that the last push has found, if there is one."""
        from rotorquant_hf.kernels.append import AppendPart, append_segments
        from rotorquant_hf.kernels.push import FLUSH

        append_segments(
            self.lengths[None, FLUSH],
            self.config.block_length,
            AppendPart(self.rings[0], *self.store.keys.coding(), self._feedback),
            AppendPart(self.rings[1], *self.store.values.coding()),
        )

    @property
    def padding(self) -> Tensor | None:
        """What single queries see where attention gets no mask, (batch, 1, 1, columns) bool.

        None: all. There is a column for every token that the memory has room for, as a graph is
        replayed while they grow; the stand-ins are in the columns of their places.
        """
        return self._padding

    @padding.setter
    def padding(self, padding: Tensor | None) -> None:
        self._padding = padding
        self._memory = tuple(replace(x, padding=padding) for x in self._memory)

    @property
    def columns(self) -> int:
        """How many tokens the memory has room for."""
        rows = self.store.keys.buffers.capacity
        return self.sinks[0].shape[2] + rows + self.rings[0].shape[2]

    def turn_for(self, n: int) -> None:
        """Turn the Hessian to where the block is that leaves in a step of n tokens, if one does.

        To the segment that it begins in, even if it ends in the next.
        A graph reads it from the same memory, so this comes before its replay.
        """
        segment = self.position // SEGMENT
        if segment == self._segment or not self.config.num_to_quantise(self.count + n):
            return
        if self._feedback is not None:
            with torch.inference_mode(False), torch.no_grad():
                turned = self.store.keys.feedback(self.position)
                assert turned is not None
                for held, new in zip(self._feedback, turned, strict=True):
                    held.copy_(new)
        self._segment = segment

    def on_host(self) -> Lengths:
        """The lengths on the host, for `restore`."""
        return Lengths(self.begin, self.count, self.position, *self.store.rows_in_use())

    def restore(self, lengths: Lengths) -> None:
        """Undo steps on the host; the device is told before the next one.

        The tokens themselves need no undoing: a step writes only free slots and free rows.
        """
        self.begin, self.count, self.position = lengths[:3]
        self.store.use_rows(lengths.first_row, lengths.end_row)
        self.clock.tick()
        self._told = None

    def prepare(self, n: int) -> None:
        """Do what a step of n tokens needs on the device if that is to take it alone."""
        self._upload()
        self.turn_for(n)

    def replayed(self, n: int) -> None:
        """Follow a step of n tokens, prepared, that is about to run on the device alone."""
        self._push(n)
        self._flush()

    def _push(self, n: int) -> None:
        # Before the new tokens are counted: the first of them sees the sliding_window - 1 tokens
        # before it.
        self.store.drop_front(self._num_outside_window(), shrink=False)
        self.count += n
        self.clock.tick()

    def _flush(self) -> None:
        """Count the block that leaves the ring among the packed tokens."""
        quantised = self.config.num_to_quantise(self.count)
        self.store.extend(quantised)
        self.begin = (self.begin + quantised) % self.rings[0].shape[2]
        self.count -= quantised
        self.position += quantised
        self._told = self._lengths()

    def _num_outside_window(self) -> int:
        """Tokens that the next step's queries no longer see."""
        if not self.sliding_window:
            return 0
        return max(0, len(self.store) + self.count - self.sliding_window + 1)

    def _lengths(self) -> tuple[int, ...]:
        first, _ = self.store.rows_in_use()
        return self.sinks[0].shape[2], first, len(self.store), self.begin, self.count

    def _upload(self) -> None:
        """Tell the device the lengths if the host changed them other than by steps."""
        lengths = self._lengths()
        if lengths == self._told:
            return
        if self.captured and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the lengths on the device are not up to date; step once before")
        self.lengths.copy_(on_device([*lengths, 0, 0, 0, 0], self.lengths.device))
        self._told = lengths

    def _states(self) -> tuple[RingStates, RingStates]:
        """What attention reads of keys and values until the next step."""
        sides = self.store.sides
        if not self._memory or any(
            memory.rows is not side.buffers.tensors
            for memory, side in zip(self._memory, sides, strict=True)
        ):
            self._memory = self._where_it_is()
        buffers = sides[0].buffers
        packed = len(buffers)
        # A graph is replayed while tokens are packed: its grid is laid out for all the rows.
        laid_out = buffers.capacity if self.captured else packed
        lengths = buffers.start, packed, self.begin, self.count, laid_out, self.clock
        return RingStates(self._memory[0], *lengths), RingStates(self._memory[1], *lengths)

    def _where_it_is(self) -> tuple[RingMemory, ...]:
        """The memory of keys and values, as it is now."""
        from rotorquant_hf.kernels.push import LENGTHS

        lengths, found = self.lengths[LENGTHS], []
        for side, sinks, ring in zip(self.store.sides, self.sinks, self.rings, strict=True):
            quantizer, statistics, rows = side.coding()
            more = lengths, self._stand_ins, self._padding
            found.append(RingMemory(sinks, ring, rows, statistics, quantizer, *more))
        return tuple(found)

    def recent(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the recent tokens, oldest first, copied."""
        keys, values = self.rings
        return read_ring(keys, self.begin, self.count), read_ring(values, self.begin, self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of rings, lengths, and what the kernel rounds by."""
        held = (*self.rings, self.lengths, *(self._feedback or ()))
        return sum(x.nbytes for x in held)
