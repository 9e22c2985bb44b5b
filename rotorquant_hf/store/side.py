"""PackedSide: the packed keys, or the packed values, of one attention layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rotorquant_hf.backend import uses_native
from rotorquant_hf.quant.channels import SEGMENT, ChannelStatistics, Measured
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec
from rotorquant_hf.quant.registry import shared_quantizer
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.rounding import Feedback
from rotorquant_hf.quant.tiles import segments
from rotorquant_hf.quant.wide import WIDE_BITS
from rotorquant_hf.store.buffers import TokenBuffers
from rotorquant_hf.store.native_append import encode_native, native_takes
from rotorquant_hf.store.statistics import block_statistics, read_by

_FEEDBACK_ROWS = 1 << 20  # of all segments made together: 128 MiB


class PackedSide:
    """One side of a `RotorQuantKVCache`: quantiser, channel statistics and rows.

    Args:
        spec: the quantiser.
        d: head dim.
        device: where the rows lie. It changes when a layer is offloaded.
        equalize, center, rope_layout, rope: of the channel statistics; see
            `ChannelStatistics.of_block`, where `equalize` is `power`.
        widens: whether vectors take WIDE_BITS if by their statistics they need them.

    Attributes:
        buffers: the rows (batch, heads, tokens, ...), as `Quantizer.encode` names them.
        statistics: of the first block, None before it.
        calibrated: whether they come from elsewhere, and stay.

    Raises:
        ValueError: naming the value that is not possible.
    """

    def __init__(
        self,
        spec: QuantizerSpec,
        d: int,
        device: torch.device,
        *,
        equalize: float,
        center: bool | str = False,
        rope_layout: str = "none",
        rope: Rope | None = None,
        widens: bool = False,
    ) -> None:
        self.d, self.device = d, device
        self._spec, self._wide_spec = spec, replace(spec, bits=WIDE_BITS)
        self._widens = widens and spec.bits < WIDE_BITS
        self._equalize, self._center = equalize, center
        self._rope_layout, self.rope = rope_layout, rope
        self.buffers = TokenBuffers()
        self.statistics: ChannelStatistics | None = None
        self.calibrated = False
        _ = self.quantizer  # refuse impossible settings now

    def __copy__(self) -> PackedSide:
        """One that goes its own way; rows are shared until either appends."""
        fork = object.__new__(type(self))
        fork.__dict__.update(self.__dict__, buffers=copy.copy(self.buffers))
        return fork

    @property
    def quantizer(self) -> Quantizer:
        """What codes the vectors, on the device where the rows lie now."""
        return self.quantizer_for(self.statistics)

    def quantizer_for(self, statistics: ChannelStatistics | None) -> Quantizer:
        """What codes vectors of such statistics.

        Shared by all stores of the same settings, so never kept here: a copy of the side would
        copy it, and an offloaded side would keep the tables of the other device.
        """
        spec = self._wide_spec if self._takes_wide_codes(statistics) else self._spec
        return shared_quantizer(spec, self.d, self.device)

    @property
    def is_wide(self) -> bool:
        """Whether the vectors take WIDE_BITS instead of the bits of the quantiser."""
        return self._takes_wide_codes(self.statistics)

    def _takes_wide_codes(self, statistics: ChannelStatistics | None) -> bool:
        return self._widens and statistics is not None and statistics.needs_wide

    def __len__(self) -> int:
        """Tokens stored."""
        return len(self.buffers)

    def take_statistics(
        self,
        block: Tensor | Measured,
        positions: range | Tensor | None = None,
        queries: QueryMoment | None = None,
    ) -> None:
        """Fix the channel statistics, unless they are.

        Args:
            block: the vectors that they are taken from, (batch, heads, tokens, d), or what is
                measured of them.
            positions: where in the text these are, as in `ChannelStatistics.of_block`; needed if
                RoPE turns them.
            queries: of the queries that read such vectors.
        """
        if self.statistics is not None:
            return
        statistics = block_statistics(
            block, self._equalize, self._center, self._rope_layout, self.rope, positions
        )
        if queries is not None:
            statistics = read_by(statistics, queries, self.rope, self._widens)
        self.statistics = statistics

    def append(self, x: Tensor, position: int, expected: int = 0) -> None:
        """Quantise vectors and append their rows; the statistics must be taken.

        The native library codes what it takes, on a CPU, and torch the rest.

        Args:
            x: (batch, heads, tokens, d), of one segment of the text.
            position: where in the text it begins.
            expected: as in `TokenBuffers.append`.
        """
        quantizer, statistics, _ = self.coding()
        if uses_native(self.device) and native_takes(x.dtype, quantizer):
            count = x.shape[2]
            self.buffers.reserve(self._rows_like(*x.shape[:2]), count, expected)
            rows = self.buffers.rows(len(self), len(self) + count)
            if encode_native(x, quantizer, statistics, position, rows):
                self.buffers.extend(count)
                return
            # A vector does not fit its scale: torch names it.
        rows = quantizer.encode(statistics.normalize(x), statistics.hessian_at(position))
        self.buffers.append(rows, expected)

    def feedback(self, position: int) -> Feedback | None:
        """What the append kernel reads of the Hessian at a position, as of one segment.

        None without a Hessian.
        """
        return next(iter(self.feedbacks(position, 1)))[1]

    def feedbacks(
        self, position: int, tokens: int
    ) -> Iterator[tuple[list[slice], Feedback | None]]:
        """The segments of the tokens that begin at a position, with what the append kernel reads.

        As many segments at a time as one launch makes ready.
        """
        statistics = self._taken_statistics()
        parts = list(self.segments(position, tokens))
        if statistics.hessian is None:
            yield parts, None
            return
        from rotorquant_hf.store.kernel_statistics import kernel_feedback

        rotation = self.quantizer.stage_one.rotation
        together = max(1, _FEEDBACK_ROWS // (statistics.scale[..., 0].numel() * self.d))
        for first in range(0, len(parts), together):
            some = parts[first : first + together]
            start = position + some[0].start
            yield some, kernel_feedback(statistics, rotation, start, len(some))

    def segments(self, position: int, tokens: int) -> Iterator[slice]:
        """The parts of the tokens that begin at a position that have one Hessian each."""
        turns = self._taken_statistics().turns
        return segments(position, tokens, SEGMENT if turns else max(1, position + tokens))

    def coding(self) -> tuple[Quantizer, ChannelStatistics, dict[str, Tensor]]:
        """What coding takes: quantiser, statistics, and the tensors for the rows."""
        return self.quantizer, self._taken_statistics(), self.buffers.tensors

    def grown(self, count: int, batch: int, heads: int) -> dict[str, Tensor]:
        """Copies of the tensors with room for `count` more rows; see `TokenBuffers.adopt`."""
        return self.buffers.grown(self._rows_like(batch, heads), count)

    def _rows_like(self, batch: int, heads: int) -> dict[str, Tensor]:
        return self.buffers.tensors or self.empty_rows(batch, heads)

    def empty_rows(self, batch: int, heads: int) -> dict[str, Tensor]:
        """Rows of no tokens, (batch, heads, 0, ...), of the shapes and dtypes of `encode`."""
        kinds = self.quantizer.row_kinds(self.device)
        return {
            name: torch.empty(batch, heads, 0, *kind.shape, dtype=kind.dtype, device=self.device)
            for name, kind in kinds.items()
        }

    def span(self, start: int = 0, end: int | None = None) -> PackedSpan:
        """The packed tokens [start, end), sharing this side's memory.

        Raises:
            ValueError: if there has been no token yet.
        """
        statistics = self._taken_statistics()
        rows = self.buffers.rows(start, len(self) if end is None else end)
        return PackedSpan(rows, statistics, self.quantizer)

    def reconstructed(self) -> Tensor:
        """The reconstructed vectors, (batch, heads, len(self), d) float32.

        Raises:
            ValueError: if there has been no token yet.
        """
        span = self.span()
        out = torch.empty(span.shape, dtype=torch.float32, device=self.device)
        span.materialize(out)
        return out

    def _taken_statistics(self) -> ChannelStatistics:
        if self.statistics is None:
            raise ValueError("the store is empty; append keys and values first")
        return self.statistics

    def clear(self) -> None:
        """Forget everything, statistics that were taken from its tokens included."""
        self.buffers.clear()
        if not self.calibrated:
            self.statistics = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every tensor along the batch axis (selection, repetition)."""
        self.buffers.map(fn)
        if self.statistics is not None:
            self.statistics = self.statistics.map(fn)

    def state(self) -> dict[str, Tensor]:
        """The rows in use and the statistics by name, for saving; empty before there are any."""
        if self.statistics is None:
            return {}
        return {**self.buffers.rows(0, len(self)), **self.statistics.tensors()}

    def load_state(self, state: dict[str, Tensor], needs_wide: bool = False) -> None:
        """The inverse of `state` (not an empty one), into an empty side."""
        self.statistics = ChannelStatistics.of_tensors(state, self._rope_layout, needs_wide)
        taken = self.statistics.tensors()
        rows = {name: tensor for name, tensor in state.items() if name not in taken}
        if rows:
            self.buffers.append(rows)
