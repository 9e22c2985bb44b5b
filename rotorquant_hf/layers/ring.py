"""The exact window of a layer while it decodes through the kernels: a ring on the device.

In the ring a step neither concatenates nor moves tokens, and everything that changes from step to
step is a vector of lengths on the device (`kernels.push`), so that a step can be captured in a
CUDA graph. The host keeps the same lengths by the same arithmetic, without ever asking the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.attention.tensor import CachedStates
from rotorquant_hf.backend import on_device
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.store.kv_store import RotorQuantKVCache


class DecodingState:
    """The window of one layer as a ring, and the lengths of its parts on the device.

    Args:
        store: the layer's packed tokens; at least one.
        sinks: keys and values (batch, heads, n, d), complete.
        window: keys and values (batch, heads, m, d), the exact tokens after the packed ones.
        config: the layer's settings.
        sliding_window: tokens that a query sees, 0 for all.
    """

    def __init__(
        self,
        store: RotorQuantKVCache,
        sinks: tuple[Tensor, Tensor],
        window: tuple[Tensor, Tensor],
        config: RotorQuantConfig,
        sliding_window: int = 0,
    ) -> None:
        from rotorquant_hf.kernels.push import STATE

        self.store, self.sinks, self.config = store, sinks, config
        store.reserve(0)  # the same rows for keys and values
        self.sliding_window = sliding_window
        slots = config.residual_length + 2 * config.block_length
        self.begin, self.count = 0, window[0].shape[2]
        with torch.inference_mode(False), torch.no_grad():  # also written to outside of it
            self.ring = (_ring(window[0], slots), _ring(window[1], slots))
            self.lengths = torch.zeros(STATE, dtype=torch.int32, device=window[0].device)
        self._on_device: tuple[int, ...] | None = None
        self.steps = 0
        self.captured = False

    def step(self, keys: Tensor, values: Tensor) -> tuple[LiveStates, LiveStates]:
        """Take in new tokens (batch, heads, n, d), n <= block_length; what attention reads."""
        from rotorquant_hf.kernels.append import AppendPart, append_block
        from rotorquant_hf.kernels.push import FLUSH, push_tokens

        config, store, n = self.config, self.store, keys.shape[2]
        if self.config.leaving(self.count + n):
            with torch.inference_mode(False):
                store.reserve(config.block_length)
        self._upload()
        before = self.snapshot()
        self._on_device = None  # until all is done
        try:
            push_tokens(
                keys,
                values,
                *self.ring,
                self.lengths,
                residual=config.residual_length,
                block=config.block_length,
                window=self.sliding_window,
            )
            self._push(n)
            seen = self._states(0), self._states(1)
            if self.config.leaving(self.count) or self.captured:
                append_block(
                    self.lengths[FLUSH],
                    config.block_length,
                    AppendPart(self.ring[0], *store.key_coding()),
                    AppendPart(self.ring[1], *store.value_coding()),
                )
            self._flush()
        except BaseException:
            self.restore(before)
            raise
        return seen

    def snapshot(self) -> tuple[int, ...]:
        """The lengths on the host, for `restore`."""
        return self.begin, self.count, *self.store.rows_in_use()

    def restore(self, snapshot: tuple[int, ...]) -> None:
        """Undo steps on the host; the device is told before the next one."""
        self.begin, self.count, start, end = snapshot
        self.store.use_rows(start, end)
        self.steps += 1
        self._on_device = None

    def replayed(self, n: int) -> None:
        """Follow a step of n tokens that ran on the device alone."""
        self._push(n)
        self._flush()

    def _push(self, n: int) -> None:
        self.store.drop_front(self._hidden(), shrink=False)
        self.count += n
        self.steps += 1

    def _flush(self) -> None:
        """Count the block that leaves the ring among the packed tokens."""
        leaving = self.config.leaving(self.count)
        self.store.extend(leaving)
        self.begin = (self.begin + leaving) % self.ring[0].shape[2]
        self.count -= leaving
        self._on_device = self._lengths()

    def _hidden(self) -> int:
        """Tokens that the next step's queries no longer see."""
        if not self.sliding_window:
            return 0
        return max(0, len(self.store) + self.count - self.sliding_window + 1)

    def _lengths(self) -> tuple[int, ...]:
        first, _ = self.store.rows_in_use()
        return self.sinks[0].shape[2], first, len(self.store), self.begin, self.count

    def _upload(self) -> None:
        """Tell the device the lengths, where the host changed them otherwise than by steps."""
        lengths = self._lengths()
        if lengths == self._on_device:
            return
        if self.captured and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the lengths on the device are not up to date; step once before")
        self.lengths.copy_(on_device([*lengths, 0, 0, 0, 0], self.lengths.device))

    def _states(self, part: int) -> LiveStates:
        span = self.store.value_span() if part else self.store.key_span()
        base = dict(self.store.value_rows() if part else self.store.key_rows())
        most = base["scale"].shape[2] if self.captured else span.shape[2]
        return LiveStates(
            self.sinks[part], span, self, part, self.begin, self.count, self.steps, base, most
        )

    def window(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the window, oldest first, copied."""
        return self.ordered(0, self.begin, self.count), self.ordered(1, self.begin, self.count)

    def ordered(self, part: int, begin: int, count: int) -> Tensor:
        """`count` tokens of the ring from slot `begin` on, copied."""
        ring = self.ring[part]
        end = min(begin + count, ring.shape[2])
        return torch.cat((ring[:, :, begin:end], ring[:, :, : count - (end - begin)]), dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes of ring and lengths."""
        return self.ring[0].nbytes + self.ring[1].nbytes + self.lengths.nbytes


@dataclass(frozen=True)
class LiveStates:
    """`States` whose tail is the ring, as it is until the layer's next step.

    Attributes:
        sinks, packed: as there.
        ring: the layer's state. part: 0 for keys, 1 for values.
        begin, count: where the tail lies in the ring.
        steps: of the ring, when this was made.
        base: the store's whole tensors, to which the lengths on the device refer.
        most: packed tokens for which the launch is to be laid out.
    """

    sinks: Tensor
    packed: PackedSpan
    ring: DecodingState
    part: int
    begin: int
    count: int
    steps: int
    base: dict[str, Tensor]
    most: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, packed, d = self.packed.shape
        return batch, heads, self.sinks.shape[2] + packed + self.count, d

    @property
    def tail(self) -> Tensor:
        """The recent tokens, (batch, heads, count, d), copied."""
        self.require_current()
        return self.ring.ordered(self.part, self.begin, self.count)

    def require_current(self) -> None:
        """Refuse to read what a later step has overwritten.

        Raises:
            RuntimeError: if the cache was updated since.
        """
        if self.ring.steps != self.steps:
            raise RuntimeError(
                "these keys or values are of an earlier update of the cache, whose window has "
                "moved on since; clone() them before the next update, or read layer.keys anew"
            )

    def materialize(self) -> Tensor:
        """The dequantised tensor, in the dtype of the tail."""
        return CachedStates(self.sinks, self.packed, self.tail).materialize()


def _ring(window: Tensor, slots: int) -> Tensor:
    ring = window.new_empty(*window.shape[:2], slots, window.shape[3])
    ring[:, :, : window.shape[2]] = window
    return ring
