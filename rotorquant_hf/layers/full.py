"""One attention layer of the cache, in Transformers' protocol.

A layer holds its tokens, oldest first, in three parts:

    [ sinks, full precision ] [ packed, quantised once ] [ recent tokens, full precision ]

(The sinks of a row with left padding are its own first tokens: `attention.stand_ins`.)

New tokens join the recent ones. When there are `block_length` more of these than
`residual_length`, the oldest are quantised into the packed store.

During `update`, attention reads past tokens as stored and new tokens unquantised. So prefill
attention is exact, and with one new token at a time every query reads at least the last
`residual_length` tokens in full precision.

The first block quantised fixes the channel statistics. With `query_aware` these take in the queries
seen so far, and the pass that brings the block does not quantise it by itself: the layer waits for
the queries that attention is about to read it with (`see_queries`), and quantises then. Where
attention does not show them, whatever next touches the layer makes it quantise without. Afterwards
no queries are looked at any more, and nothing waits. With a calibration the statistics are there
from the start; the first block still waits, for the mask that shows which sinks are padding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.attention.states import CachedStates, PlainStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.backend import brought, recordable, uses_native
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.recent import ROOM, RecentBuffer
from rotorquant_hf.layers.ring import Lengths, RingBuffer
from rotorquant_hf.native.library import FLOATS
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.checks import check_finite
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.store.kv_store import RotorQuantKVCache
from rotorquant_hf.store.statistics import query_moment

# Copies of ropes on other devices. A rope is that of many layers, and goes to a device once.
_copies: WeakKeyDictionary[Rope, dict[torch.device, Rope]] = WeakKeyDictionary()

_QUERIES_HELD = 64
"""Queries of single tokens are held until there are so many, and counted together."""

_NOT_ASSIGNED = (
    "the {0} of a compressed layer are stored quantised, and cannot be assigned; change them by "
    "update, crop, reorder_cache or batch_select_indices, or list the layer in exact_layers"
)


class RotorQuantLayer(CacheLayerMixin):
    """A layer of full attention.

    Args:
        config: the settings.
        calibration: channel statistics of keys and values for a batch of one row; None to take them
            from the first block.
        rope: how RoPE turns the keys, (1, 1, 1, r); None if that is not known.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        config: RotorQuantConfig,
        calibration: tuple[ChannelStatistics, ChannelStatistics] | None = None,
        rope: Rope | None = None,
    ) -> None:
        # CacheLayerMixin.__init__ is not called: it would assign `keys` and `values`, which
        # here are read from the parts.
        self.config, self.calibration, self.rope = config, calibration, rope
        self.is_initialized = False
        self.ring: RingBuffer | None = None
        self.buffer: RecentBuffer | None = None
        self.moment: QueryMoment | None = None
        self.stand_ins: StandIns | None = None
        self._queries: list[_Queries] = []  # of single tokens, not yet in the moment
        # The recent tokens before a pass whose tokens wait for their queries.
        self._recent_before: tuple[Tensor, Tensor] | None = None
        self._gradient_cut = False  # some packed tokens were recorded by autograd
        self._copied: torch.cuda.Event | None = None  # comes when the last move has ended

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch, heads and head dims from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        d_key, d_value = key_states.shape[-1], value_states.shape[-1]
        if self.rope is not None and self.rope.channels > d_key:
            self.rope = None  # of other heads than these
        if self.rope is not None:
            self.rope = _on_device(self.rope, self.device)
        self.store = RotorQuantKVCache(
            d_key, d_value, device=self.device, config=self.config, rope=self.rope
        )
        if self.calibration is not None:
            self._store.calibrate(
                *map(self._of_the_batch, self.calibration, (key_states, value_states))
            )
        none = tuple(x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.sinks = self.recent = (none[0], none[1])
        self.is_initialized = True

    def __copy__(self) -> RotorQuantLayer:
        """A fork of the layer: it goes its own way, as one of a DynamicCache does."""
        self.settle()
        fork = object.__new__(type(self))
        fork.__dict__.update(self.__dict__)
        if self.is_initialized:
            # Ring and buffer are written in place, the store when its rows are not shared any more.
            fork._recent, fork.ring, fork.buffer = self.recent, None, None
            fork._store, fork._queries = copy.copy(self.store), list(self._queries)
        return fork

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        self._wait_for_copy()
        return self.__dict__

    def uncompressed(self) -> CacheLayerMixin:
        """Transformers' layer of the same kind, to take the place of this one, which is new."""
        return DynamicLayer()

    def _of_the_batch(self, statistics: ChannelStatistics, states: Tensor) -> ChannelStatistics:
        batch, heads, _, d = states.shape
        try:
            statistics.check(1, heads, d)
        except ValueError as error:
            raise ValueError(f"the calibration is damaged, or of another model: {error}") from error
        return statistics.map(lambda x: x.to(self.device).repeat(batch, *(1,) * (x.dim() - 1)))

    @property
    def store(self) -> RotorQuantKVCache:
        """The packed tokens."""
        self.settle()
        return self._store

    @store.setter
    def store(self, store: RotorQuantKVCache) -> None:
        self._store = store

    @property
    def has_wide_keys(self) -> bool:
        """Whether the keys have taken 8 bits, as fewer would spoil the scores (`quant.wide`)."""
        return self.is_initialized and self._store.keys.is_wide

    @property
    def sinks(self) -> tuple[Tensor, Tensor]:
        """The first keys and values, (batch, heads, n, d), in full precision."""
        self.settle()
        return self._sinks

    @sinks.setter
    def sinks(self, sinks: tuple[Tensor, Tensor]) -> None:
        self._sinks = sinks

    @property
    def recent(self) -> tuple[Tensor, Tensor]:
        """The recent keys and values, (batch, heads, m, d), in full precision, oldest first.

        They are plain tensors, or lie in the ring while the layer decodes through the kernels, or
        in the buffer while it decodes through the native library. Whatever sets them ends that:
        ring or buffer is left, and made again by the next decoding step.
        """
        self.settle()
        return self._recent if self._decoding is None else self._decoding.recent()

    @recent.setter
    def recent(self, recent: tuple[Tensor, Tensor]) -> None:
        if self.ring is not None:
            self.ring.clock.tick()  # attention must not read this ring any more
        self._recent, self.ring, self.buffer = recent, None, None

    @property
    def recent_length(self) -> int:
        """Recent tokens held in full precision, those that wait for their queries included."""
        return self._recent[0].shape[2] if self._decoding is None else self._decoding.count

    @property
    def _decoding(self) -> RingBuffer | RecentBuffer | None:
        """What holds the recent tokens while the layer decodes."""
        return self.ring or self.buffer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return what their attention reads.

        Args:
            key_states: (batch, heads, n, key dim), after RoPE.
            value_states: (batch, heads, n, value dim).

        Returns:
            Keys and values of all tokens, (batch, heads, total, dim): `CompressedTensor`s once
            tokens are quantised, plain tensors before.

        Raises:
            TypeError, ValueError: for a wrong dtype or shape, or (on the CPU) NaN or infinite
                entries. The layer is then as it was.
        """
        if self.buffer is not None:
            seen = self._buffered(self.buffer, key_states, value_states)
            if seen is not None:
                return seen
        self._check(key_states, value_states)
        if not torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Leaves, which would ask for a gradient in a later pass.
            key_states, value_states = key_states.detach(), value_states.detach()
        fresh = not self.is_initialized
        self.settle()
        try:
            if fresh:
                self.lazy_initialization(key_states, value_states)
            return self._advance(*self._of_one_dtype(key_states, value_states))
        except BaseException:
            if fresh:
                self.reset()
            raise

    def _of_one_dtype(self, *new: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtype of the layer: the wider of both, as `torch.cat` has it.

        A prompt may be read under autocast, and generation go on without.
        """
        held = self._sinks[0].dtype, self._sinks[1].dtype
        if (new[0].dtype, new[1].dtype) == held:
            return new[0], new[1]
        wider = [torch.promote_types(x.dtype, y) for x, y in zip(new, held, strict=True)]
        if tuple(wider) != held:
            self.sinks, self.recent = (
                (keys.to(wider[0]), values.to(wider[1]))
                for keys, values in (self.sinks, self.recent)
            )
            self.dtype = wider[0]
        keys, values = (x.to(dtype) for x, dtype in zip(new, wider, strict=True))
        return keys, values

    def _advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return what their attention reads; an error stores none."""
        if self._decodes(key_states, value_states):
            return self._step(key_states, value_states)
        seen = self._into_buffer(key_states, value_states)
        if seen is not None:
            return seen
        past = self.recent
        recent = (join(past[0], key_states), join(past[1], value_states))
        visible = self._states(self.sinks, recent)
        packing = self.config.num_to_quantise(recent[0].shape[2]) > 0
        if len(self._store) and past[0].shape[2] and not packing:
            # As in most decode steps: the tensors were made here, and no token leaves them.
            self.recent = recent
            return visible
        return self._take_in(recent, past, key_states.shape[2], visible)

    def _into_buffer(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take a step through a new buffer, if the native library decodes; None if not."""
        if not uses_native(self.device) or torch.is_grad_enabled() or not len(self._store):
            return None
        n = keys.shape[2]
        if not {keys.dtype, values.dtype} <= FLOATS or not 0 < n <= ROOM:
            return None
        if self.config.num_to_quantise(self.recent_length + n):
            return None
        buffer = RecentBuffer(self._store, self._sinks, self.recent, self.config, self.stand_ins)
        seen = self._buffered(buffer, keys, values)
        if seen is not None:
            # The buffer holds the tokens from here on; a second copy would count twice.
            self.recent = buffer.none()
            self.buffer = buffer
        return seen

    def _buffered(
        self, buffer: RecentBuffer, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What attention reads after a step through a buffer; None if that does not take it."""
        seen = buffer.step(keys, values) if buffer.sinks is self._sinks else None
        return None if seen is None else (CompressedTensor(seen[0]), CompressedTensor(seen[1]))

    def _take_in(
        self,
        recent: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor],
        n: int,
        visible: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Store `recent`, the full-precision tokens `past` and n new ones; what attention reads.

        Those of the first block only when attention has shown its queries, which the statistics
        take in (unless they are a calibration's), and the mask, which shows what sinks are padding.
        """
        known = self._store.has_statistics and (len(self._store) or not self._has_sinks)
        if not self.config.query_aware or known:
            self._store_recent(*recent)
            return visible
        if self.config.num_to_quantise(recent[0].shape[2], self._wanted()):
            self.recent, self._recent_before = recent, past
        else:
            self._store_recent(*recent)
        keys, values = (
            x if isinstance(x, CompressedTensor) else CompressedTensor(PlainStates(x))
            for x in visible
        )
        keys.on_query = self.see_queries
        return keys, values

    def see_queries(
        self, query: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> None:
        """Take notice of queries (batch, query heads, n, key dim) that read the keys.

        Args:
            mask: theirs, broadcastable to (batch, query heads, n, tokens), which shows padding.
            scale: factor of their inner products with keys; None for key dim^-1/2.
        """
        if not self.is_initialized or (self._store.has_statistics and not self.waits):
            return
        before = self.moment, list(self._queries)
        try:
            if not self._store.has_statistics:
                self._hold_queries(query, scale)
            if self.waits:
                held = self._sinks, self._recent
                self.settle()
                if mask is not None and self._sinks[0].shape[2]:
                    self._place_stand_ins(mask, *map(join, *held))
        except BaseException:
            self.moment, self._queries = before
            self.drop_waiting()
            raise

    def _hold_queries(self, query: Tensor, scale: float | None) -> None:
        if self._queries and self._queries[-1].query.shape[:2] != query.shape[:2]:
            self.count_queries()  # of another layer that shares the keys
        position = self.get_seq_length() - query.shape[2]
        scale = None if scale is None else float(scale)
        self._queries.append(_Queries(position, query.detach(), scale))
        if query.shape[2] > 1 or len(self._queries) == _QUERIES_HELD:
            self.count_queries()

    def _place_stand_ins(self, mask: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put first tokens of padded rows in the places of sinks, of all keys and values so far."""
        batch, _, sinks, _ = self._sinks[0].shape
        stand_ins = StandIns.of(mask, batch, sinks)
        if keys.device.type == "cpu" and not stand_ins.needed():  # elsewhere the host would wait
            return
        self.stand_ins = stand_ins
        self.sinks = stand_ins.placed(keys), stand_ins.placed(values)

    def count_queries(self) -> None:
        """Take the queries seen since the last time into their second moment."""
        queries, self._queries = self._queries, []
        if not queries:
            return
        with torch.inference_mode(False), torch.no_grad():
            query, positions = _in_one(queries)
            seen = query_moment(query, self._sinks[0].shape[1], self.rope, positions)
            seen = dataclasses.replace(seen, scale=queries[-1].scale)
            self.moment = seen if self.moment is None else self.moment.merged(seen)

    def settle(self) -> None:
        """Store the tokens that wait for their queries, with those seen so far.

        Raises:
            ValueError: as `update`. The tokens then wait as before.
        """
        self._wait_for_copy()
        if not self.waits:
            return
        before, self._recent_before = self._recent_before, None
        try:
            self._store_recent(*self._recent)
        except BaseException:
            self._recent_before = before
            raise

    def drop_waiting(self) -> None:
        """Forget the pass whose tokens wait for their queries, if there is one."""
        if self._recent_before is not None:
            self.recent, self._recent_before = self._recent_before, None

    @property
    def waits(self) -> bool:
        """Whether tokens wait for their queries."""
        return self._recent_before is not None

    def _decodes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the kernels alone can take in the new tokens; sets up the ring if so."""
        if not self._fits_a_step(keys, values):
            return False
        if self.ring is None:
            ring = RingBuffer(
                self.store,
                self.sinks,
                self.recent,
                self.config,
                position=self.get_seq_length() - self.recent_length,
                sliding_window=self._seen_by_a_query(),
                stand_ins=self.stand_ins,
            )
            # The ring holds the tokens from here on; a second copy would count twice.
            self.recent = (keys[:, :, :0], values[:, :, :0])
            self.ring = ring
        return True

    def _fits_a_step(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the kernels take a step: few tokens, no gradient, packed tokens that stay."""
        store = self.store
        if not 0 < keys.shape[2] <= self.config.block_length:
            return False
        if self._num_outside_window() >= len(store):
            return False
        if not store.kernels_take(keys.dtype):
            return False
        recorded = any(x.requires_grad for x in (keys, values, *self._recent))
        return not (torch.is_grad_enabled() and (recorded or self._gradient_cut))

    def _seen_by_a_query(self) -> int:
        """Tokens that a query sees, 0 for all."""
        return 0

    def _num_outside_window(self) -> int:
        """Tokens held that no later query sees, for they have left the sliding window."""
        return 0

    def follow_replay(self, n: int) -> None:
        """Count a step of n tokens, prepared, that the device is about to take alone."""
        assert self.ring is not None
        self.ring.replayed(n)

    def prepare_step(self, n: int) -> None:
        """Do what a step of n tokens needs that a CUDA graph of it must not do."""
        assert self.ring is not None
        self.ring.prepare(n)

    def forget_step(self, n: int, before: Lengths) -> None:
        """Undo on the host a step of n tokens that the device never took."""
        assert self.ring is not None
        self.ring.restore(before)

    def _step(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.ring is not None
        seen = self.ring.step(keys, values)
        return CompressedTensor(seen[0]), CompressedTensor(seen[1])

    def _store_recent(self, keys: Tensor, values: Tensor) -> None:
        """Divide full-precision tokens among the sinks, the store and the recent tokens."""
        # 0 once tokens are packed: sinks are filled first.
        filled = min(self._sinks_to_fill(), keys.shape[2])
        packed = self.config.num_to_quantise(keys.shape[2] - filled, self._wanted())
        # All is made before anything is stored: for want of memory nothing is then half done.
        sinks = self._sinks
        if filled:
            sinks = (
                torch.cat((sinks[0], keys[:, :, :filled]), dim=2),
                torch.cat((sinks[1], values[:, :, :filled]), dim=2),
            )
        recent = copies_from(filled + packed, keys, values)
        position = self._sinks[0].shape[2] + len(self._store) + filled
        self._pack(keys[:, :, filled:], values[:, :, filled:], packed, position)
        self.sinks, self.recent = sinks, recent

    def _pack(self, keys: Tensor, values: Tensor, count: int, position: int) -> None:
        """Quantise the first `count` of these tokens into the store.

        The first of them is at `position` in the text.
        """
        if not count:
            return
        self.count_queries()
        self.store.append_unchecked(
            keys[:, :, :count],
            values[:, :, :count],
            position,
            (keys, values) if self.config.statistics_length else None,
            self.moment,
        )
        self.moment = None
        held = self._gradient_cut and len(self._store) > count
        self._gradient_cut = held or keys.requires_grad or values.requires_grad

    def _wanted(self) -> int:
        """Full-precision tokens that there must be before any is quantised."""
        if not self.is_initialized:
            return 0 if self.calibration is not None else self.config.statistics_length
        return 0 if self.store.has_statistics else self.config.statistics_length

    def _states(
        self, sinks: tuple[Tensor, Tensor], recent: tuple[Tensor, Tensor], skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention receives them, without the first `skip` packed tokens."""
        if len(self.store) <= skip:
            return join(sinks[0], recent[0]), join(sinks[1], recent[1])
        if self._gradient_cut and torch.is_grad_enabled():
            sinks, recent = _refusing_gradients(sinks), _refusing_gradients(recent)
        keys, values = (side.span(skip) for side in self.store.sides)
        return (
            CompressedTensor(CachedStates(sinks[0], keys, recent[0], self.stand_ins)),
            CompressedTensor(CachedStates(sinks[1], values, recent[1], self.stand_ins)),
        )

    @property
    def keys(self) -> Tensor | None:
        """All keys, as attention would receive them; None before the first update."""
        return self._states(self.sinks, self.recent)[0] if self.is_initialized else None

    @keys.setter
    def keys(self, _: Any) -> None:
        raise AttributeError(_NOT_ASSIGNED.format("keys"))

    @property
    def values(self) -> Tensor | None:
        """All values, as attention would receive them; None before the first update."""
        return self._states(self.sinks, self.recent)[1] if self.is_initialized else None

    @values.setter
    def values(self, _: Any) -> None:
        raise AttributeError(_NOT_ASSIGNED.format("values"))

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first update")
        return self.sinks[0].shape[0]

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if not self._is_like_held(keys, values):
            self._check_all(keys, values)
        check_finite("keys", keys, on_gpu=self.config.check_finite)
        check_finite("values", values, on_gpu=self.config.check_finite)

    def _is_like_held(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new states are what a step brings: those held, but for the number of tokens."""
        if not self.is_initialized or keys.dim() != 4 or values.dim() != 4:
            return False
        held = self._sinks
        return all(
            x.dtype == y.dtype
            and x.device == y.device
            and x.shape[:2] == y.shape[:2]
            and x.shape[3] == y.shape[3]
            and x.shape[2] == keys.shape[2]
            for x, y in ((keys, held[0]), (values, held[1]))
        )

    def _check_all(self, keys: Tensor, values: Tensor) -> None:
        for name, x in (("keys", keys), ("values", values)):
            if not x.is_floating_point():
                raise TypeError(f"{name} have dtype {x.dtype}; pass float16, bfloat16 or float32")
            if x.dim() != 4:
                raise ValueError(
                    f"{name} have shape {tuple(x.shape)}; pass (batch, heads, tokens, head dim)"
                )
        if keys.shape[:3] != values.shape[:3] or keys.device != values.device:
            raise ValueError(
                f"keys {tuple(keys.shape)} on {keys.device} and values {tuple(values.shape)} on "
                f"{values.device} must agree in all but the last axis"
            )
        if self.is_initialized:
            for name, x, held in (
                ("keys", keys, self._sinks[0]),
                ("values", values, self._sinks[1]),
            ):
                self._check_fits(name, x, held)

    def _check_fits(self, name: str, x: Tensor, held: Tensor) -> None:
        for what, new, old in (
            ("batch size", x.shape[0], held.shape[0]),
            ("number of heads", x.shape[1], held.shape[1]),
            ("head dim", x.shape[3], held.shape[3]),
            ("device", x.device, held.device),
        ):
            if new != old:
                raise ValueError(
                    f"{name} have {what} {new}, but this cache holds {name} of {what} {old} from "
                    f"{self.get_seq_length()} earlier tokens; use a new cache, or cache.reset()"
                )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens will see.

        Raises:
            ValueError: if there are no new tokens.
        """
        self._require_tokens(query_length)
        return self.get_seq_length() + query_length, 0

    def _require_tokens(self, query_length: int) -> None:
        held = self.get_seq_length()
        if query_length == 0 and not held:
            raise ValueError("no new tokens: the prompt is empty; pass one token at least")
        if query_length == 0:
            raise ValueError(
                f"no new tokens: the cache already holds {held}; pass the whole text, longer than "
                "that, or start anew with cache.reset()"
            )

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        if not self.is_initialized:
            return 0
        return self._sinks[0].shape[2] + len(self._store) + self.recent_length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def tokens_until_packing(self) -> int:
        """How many more tokens it takes until the oldest recent tokens are quantised.

        Until then a pass over several tokens reads the same as passes over one token each.
        """
        self.settle()
        recent = self.recent_length if self.is_initialized else 0
        due = max(self.config.residual_length + self.config.block_length, self._wanted())
        return self._sinks_to_fill() + due - recent

    @property
    def _has_sinks(self) -> bool:
        return self.config.num_sink_tokens > 0

    def _sinks_to_fill(self) -> int:
        held = self.sinks[0].shape[2] if self.is_initialized else 0
        return self.config.num_sink_tokens - held

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens.

        Quantised tokens stay quantised: after a crop that reaches into them, fewer tokens than
        `residual_length` are in full precision until new ones arrive.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
        """
        self.check_croppable(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = min(-tokens_to_remove, self.get_seq_length())
        tokens = self.get_seq_length() - left
        left -= self._crop_full_precision("recent", left)
        packed = min(left, len(self.store))
        self.store.crop(packed)
        self._crop_full_precision("sinks", left - packed)
        if self.stand_ins is not None:
            whole = tokens >= self.config.num_sink_tokens
            self.stand_ins = self.stand_ins.within(tokens) if whole else None
        self._queries = [x for x in self._queries if x.position < tokens]
        if not tokens:
            self.moment = None

    def check_croppable(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; pass a negative number: "
                f"crop({-tokens_to_remove}) removes the last {tokens_to_remove} tokens"
            )

    def _crop_full_precision(self, part: str, count: int) -> int:
        keys, values = getattr(self, part)
        count = min(count, keys.shape[2])
        left = keys.shape[2] - count
        setattr(self, part, (keys[:, :, :left].clone(), values[:, :, :left].clone()))
        return count

    def reset(self) -> None:
        """Forget everything, also the shapes."""
        for name in ("_store", "_sinks", "_recent", "dtype", "device"):
            self.__dict__.pop(name, None)
        self.ring = self.buffer = self.moment = self._recent_before = self.stand_ins = None
        self._gradient_cut, self._copied = False, None
        self._queries = []
        self.is_initialized = False

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every tensor of the layer."""
        if not self.is_initialized:
            return
        self.store.map(fn)
        self._queries = [x._replace(query=fn(x.query)) for x in self._queries]
        if self.moment is not None:
            self.moment = self.moment.map(fn)
        if self.stand_ins is not None:
            self.stand_ins = self.stand_ins.map(fn)
        self.sinks = (fn(self.sinks[0]), fn(self.sinks[1]))
        keys, values = self.recent
        self.recent = (fn(keys), fn(values))

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, which takes batch rows, to everything that has them."""
        self._map(fn)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch rows in the order `beam_idx` (rows,): all its tensors."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor | slice) -> None:
        """Keep the batch rows `indices` (integers, a boolean mask, or a slice)."""
        if isinstance(indices, slice):
            self._map_rows(lambda x: x[indices].clone())
        else:
            self._map_rows(lambda x: x[torch.as_tensor(indices, device=x.device)])

    def offload(self) -> None:
        """Move the layer's data to the CPU. Attention may still read what it was given before."""
        if self.ring is not None:
            # Its clock does not tick: nothing is written into this memory any more.
            self._recent, self.ring = self.recent, None
        self._move(torch.device("cpu"))
        if self.is_initialized and self.device.type == "cuda":
            self._copied = torch.cuda.current_stream(self.device).record_event()

    def _wait_for_copy(self) -> None:
        """Wait for the last move: the host for one to the CPU, the current stream for one back."""
        copied, self._copied = self._copied, None
        if copied is None:
            return
        if self._sinks[0].device.type == "cpu":
            copied.synchronize()
        else:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def prefetch(self) -> None:
        """Move the layer's data back to the device of the model's layer."""
        if self.is_initialized:
            away = self._sinks[0].device != self.device
            self._move(self.device)
            if self.rope is not None and self.rope.frequencies.device != self.device:
                self.rope = self.store.rope = _on_device(self.rope, self.device)
            if away and self.device.type == "cuda":  # on a stream of its own
                self._copied = torch.cuda.current_stream(self.device).record_event()

    def _move(self, device: torch.device) -> None:
        if self.is_initialized and self.sinks[0].device != device:
            self._map(lambda x: x.to(device, non_blocking=True))
            self.store.device = device

    def nbytes(self) -> dict[str, int]:
        """Bytes by part."""
        if not self.is_initialized:
            return {}
        self.settle()
        self.count_queries()
        recent = sum(x.nbytes for x in self._recent)
        if self._decoding is not None:
            recent += self._decoding.nbytes
        sinks = sum(x.nbytes for x in self.sinks)
        parts = {"sinks": sinks, "window": recent} | self.store.nbytes()
        if self.moment is not None:
            parts["statistics"] += self.moment.nbytes
        if self.stand_ins is not None:
            parts["sinks"] += self.stand_ins.tokens.nbytes
        if self.rope is not None and self.get_seq_length():
            parts["statistics"] += self.rope.frequencies.nbytes
        if self.calibration is not None:
            parts["statistics"] += sum(x.nbytes for x in self.calibration)
        return parts

    def numbers(self) -> tuple[int, int]:
        """How many elements the layer stands for: in all, and in the packed part."""
        if not self.is_initialized:
            return 0, 0
        keys, values = self.sinks
        per_token = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
        packed = len(self.store)
        return (keys.shape[2] + packed + self.recent_length) * per_token, packed * per_token


class _Queries(NamedTuple):
    """Queries that attention has shown.

    Attributes:
        position: where in the text the first is.
        query: (batch, query heads, n, d).
        scale: factor of their inner products with keys; None for d^-1/2.
    """

    position: int
    query: Tensor
    scale: float | None


def _in_one(queries: list[_Queries]) -> tuple[Tensor, range | Tensor]:
    """All the queries (batch, query heads, n, d), and their positions."""
    runs = [range(x.position, x.position + x.query.shape[2]) for x in queries]
    if all(a.stop == b.start for a, b in pairwise(runs)):
        positions: range | Tensor = range(runs[0].start, runs[-1].stop)
    else:
        device = queries[0].query.device
        positions = torch.cat([torch.arange(x.start, x.stop, device=device) for x in runs])
    every = [x.query for x in queries]
    return every[0] if len(every) == 1 else torch.cat(every, dim=2), positions


def _on_device(rope: Rope, device: torch.device) -> Rope:
    """The same rope on a device, the same object for all layers."""
    if rope.frequencies.device == device:
        return rope
    copies = _copies.setdefault(rope, {})
    if device not in copies:
        with torch.inference_mode(False):  # for layers outside of it too
            copies[device] = rope.map(partial(brought, device=device))
    return copies[device]


def _refusing_gradients(states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values through which no gradient goes: it would lack that of packed tokens."""
    keys, values = (
        x.view_as(x) if x.requires_grad else recordable(x).detach().requires_grad_() for x in states
    )
    for x in (keys, values):
        x.register_hook(_refuse_gradient)
    return keys, values


def _refuse_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "no gradient goes through tokens that this cache has quantised in an earlier pass; run "
        "that pass under torch.no_grad() if it needs none, or train with a DynamicCache"
    )


def copies_from(start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens from `start` on; slices would keep the states of the whole prompt alive."""
    return keys[:, :, start:].clone(), values[:, :, start:].clone()


def join(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate along the tokens, without a copy where `old` is empty."""
    return torch.cat((old, new), dim=2) if old.shape[2] else new


def last(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens."""
    return x[:, :, x.shape[2] - count :]
