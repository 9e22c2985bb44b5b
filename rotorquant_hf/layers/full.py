"""One attention layer of the cache, in Transformers' protocol.

A layer holds its tokens, oldest first, in three parts:

    [ sinks, exact ] [ packed, quantised once ] [ recent window, exact ]

New tokens enter the window; when it holds `block_length` tokens more than `residual_length`, its
oldest leave for the packed store. What attention sees in an update is what was stored before
it, and the new tokens exactly: a prompt's own attention is exact, and with one new token at a
time every query reads exactly the last `residual_length` tokens or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rotorquant_hf.attention.tensor import CachedStates, CompressedTensor
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.ring import DecodingState
from rotorquant_hf.quant.checks import check_finite
from rotorquant_hf.store.kv_store import RotorQuantKVCache


class RotorQuantLayer(CacheLayerMixin):
    """A layer of full attention.

    Args:
        config: the settings.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: RotorQuantConfig) -> None:
        # CacheLayerMixin.__init__ is not called: it would assign `keys` and `values`, which
        # here are read from the parts.
        self.config = config
        self.is_initialized = False
        self.decoding: DecodingState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch, heads and head dims from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = RotorQuantKVCache(
            key_states.shape[-1], value_states.shape[-1], device=self.device, config=self.config
        )
        self.sinks = (key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self.window = (key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self.is_initialized = True

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """The recent keys and values, (batch, heads, m, d), exact, oldest first."""
        return self._window if self.decoding is None else self.decoding.window()

    @window.setter
    def window(self, window: tuple[Tensor, Tensor]) -> None:
        if self.decoding is not None:
            self.decoding.steps += 1  # what attention was handed out of the ring is over
        self._window, self.decoding = window, None

    @property
    def window_length(self) -> int:
        """Tokens in the window."""
        return self._window[0].shape[2] if self.decoding is None else self.decoding.count

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
        self._check(key_states, value_states)
        fresh = not self.is_initialized
        try:
            if fresh:
                self.lazy_initialization(key_states, value_states)
            return self._advance(key_states, value_states)
        except BaseException:
            if fresh:
                self.reset()
            raise

    def _advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads; then the new tokens go to their places, or an error to none."""
        if self._decodes(key_states, value_states):
            return self._step(key_states, value_states)
        window = self.window
        tail = (_join(window[0], key_states), _join(window[1], value_states))
        visible = self._states(self.sinks, tail)
        self._store_tail(*tail)
        return visible

    def _decodes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether new tokens can be taken in by the kernels alone; sets `decoding` up for it."""
        if not self._fits_a_step(keys, values):
            return False
        if self.decoding is None:
            self.decoding = DecodingState(
                self.store, self.sinks, self._window, self.config, self._decoding_window()
            )
            self._window = (keys[:, :, :0], values[:, :, :0])
        return True

    def _fits_a_step(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the kernels can do it: few tokens, no gradient, packed tokens that stay."""
        store = self.store
        if not 0 < keys.shape[2] <= self.config.block_length or self._hidden() >= len(store):
            return False
        if not store.runs_on_kernels or keys.dtype == torch.float64:
            return False
        recorded = (keys, values, *self._window)
        return not (torch.is_grad_enabled() and any(x.requires_grad for x in recorded))

    def _decoding_window(self) -> int:
        """Tokens that a query sees, 0 for all."""
        return 0

    def _hidden(self) -> int:
        """Tokens held that no later query sees."""
        return 0

    def follow_replay(self, n: int) -> None:
        """Count a step of n tokens that a CUDA graph took on the device alone."""
        assert self.decoding is not None
        self.decoding.replayed(n)

    def forget_step(self, n: int, before: tuple[int, ...]) -> None:
        """Undo on the host a step of n tokens that the device never took."""
        assert self.decoding is not None
        self.decoding.restore(before)

    def _step(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.decoding is not None
        seen = self.decoding.step(keys, values)
        return CompressedTensor(seen[0]), CompressedTensor(seen[1])

    def _store_tail(self, keys: Tensor, values: Tensor) -> None:
        """Divide the exact tokens among sinks, store and window."""
        # 0 once tokens are packed: sinks are filled first
        filled = min(self._sinks_to_fill(), keys.shape[2])
        leaving = self.config.leaving(keys.shape[2] - filled)
        kept = filled + leaving
        self.store.append(keys[:, :, filled:kept], values[:, :, filled:kept])
        if filled:
            self.sinks = (
                torch.cat((self.sinks[0], keys[:, :, :filled]), dim=2),
                torch.cat((self.sinks[1], values[:, :, :filled]), dim=2),
            )
        # Copies: a slice would keep the whole prompt's states alive.
        self.window = (keys[:, :, kept:].clone(), values[:, :, kept:].clone())

    def _states(
        self, sinks: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor], skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention receives them, without the first `skip` packed tokens."""
        if len(self.store) <= skip:
            return _join(sinks[0], tail[0]), _join(sinks[1], tail[1])
        return (
            CompressedTensor(CachedStates(sinks[0], self.store.key_span(skip), tail[0])),
            CompressedTensor(CachedStates(sinks[1], self.store.value_span(skip), tail[1])),
        )

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys, as attention would receive them; None before the first update."""
        return self._states(self.sinks, self.window)[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values, as attention would receive them; None before the first update."""
        return self._states(self.sinks, self.window)[1] if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first update")
        return self.sinks[0].shape[0]

    def _check(self, keys: Tensor, values: Tensor) -> None:
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
                ("keys", keys, self.sinks[0]),
                ("values", values, self.sinks[1]),
            ):
                self._check_fits(name, x, held)
        check_finite("keys", keys, on_gpu=self.config.check_finite)
        check_finite("values", values, on_gpu=self.config.check_finite)

    def _check_fits(self, name: str, x: Tensor, held: Tensor) -> None:
        for what, new, old in (
            ("batch size", x.shape[0], held.shape[0]),
            ("number of heads", x.shape[1], held.shape[1]),
            ("head dim", x.shape[3], held.shape[3]),
            ("dtype", x.dtype, held.dtype),
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
        if query_length == 0:
            raise ValueError(
                f"no new tokens: the cache already holds {self.get_seq_length()}; pass the whole "
                "text, longer than that, or start anew with cache.reset()"
            )

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        if not self.is_initialized:
            return 0
        return self.sinks[0].shape[2] + len(self.store) + self.window_length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def tokens_until_packing(self) -> int:
        """How many more tokens fill the window so that its oldest are quantised.

        Until then a pass over several tokens reads just what passes over one at a time read.
        """
        window = self.window_length if self.is_initialized else 0
        return (
            self._sinks_to_fill() + self.config.residual_length + self.config.block_length - window
        )

    def _sinks_to_fill(self) -> int:
        held = self.sinks[0].shape[2] if self.is_initialized else 0
        return self.config.num_sink_tokens - held

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens.

        Tokens that were quantised stay so: after a crop that reaches into them the exact window
        is shorter until new tokens fill it.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
        """
        _check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = min(-tokens_to_remove, self.get_seq_length())
        left -= self._crop_exact("window", left)
        packed = min(left, len(self.store))
        self.store.crop(packed)
        self._crop_exact("sinks", left - packed)

    def _crop_exact(self, part: str, count: int) -> int:
        keys, values = getattr(self, part)
        count = min(count, keys.shape[2])
        left = keys.shape[2] - count
        setattr(self, part, (keys[:, :, :left].clone(), values[:, :, :left].clone()))
        return count

    def reset(self) -> None:
        """Forget everything, also the shapes."""
        for name in ("store", "sinks", "_window", "dtype", "device"):
            self.__dict__.pop(name, None)
        self.decoding = None
        self.is_initialized = False

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every tensor of the layer."""
        if not self.is_initialized:
            return
        self.store.map(fn)
        self.sinks = (fn(self.sinks[0]), fn(self.sinks[1]))
        keys, values = self.window
        self.window = (fn(keys), fn(values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch rows in the order `beam_idx` (rows,): codes, statistics and windows."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` (integers or a boolean mask)."""
        self._map(lambda x: x[torch.as_tensor(indices, device=x.device)])

    def offload(self) -> None:
        """Move the layer's data to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the layer's data back to the device of the model's layer."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.is_initialized and self.sinks[0].device != device:
            self._map(lambda x: x.to(device, non_blocking=True))
            self.store.device = device

    def nbytes(self) -> dict[str, int]:
        """Bytes by part."""
        if not self.is_initialized:
            return {}
        window = sum(x.nbytes for x in self._window)
        if self.decoding is not None:
            window += self.decoding.nbytes
        sinks = sum(x.nbytes for x in self.sinks)
        return {"sinks": sinks, "window": window} | self.store.nbytes()

    def numbers(self) -> tuple[int, int]:
        """How many numbers the layer stands for: in all, and in the packed part."""
        if not self.is_initialized:
            return 0, 0
        keys, values = self.sinks
        per_token = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
        packed = len(self.store)
        return (keys.shape[2] + packed + self.window_length) * per_token, packed * per_token


class RotorQuantSlidingLayer(RotorQuantLayer):
    """A layer of sliding-window (or chunked) attention: only the last tokens are kept.

    `update` returns the last `sliding_window` - 1 tokens and the new ones, as the mask expects.

    Args:
        config: the settings. Sinks do not apply: the first tokens leave the window like all.
        sliding_window: tokens that a query sees, itself included.
    """

    is_sliding = True

    def __init__(self, config: RotorQuantConfig, sliding_window: int) -> None:
        super().__init__(config)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop` (assisted decoding)."""
        self.record_past = True

    def _decoding_window(self) -> int:
        return self.sliding_window

    def _hidden(self) -> int:
        return max(0, self._held() - self.sliding_window + 1)

    def follow_replay(self, n: int) -> None:
        """As in `RotorQuantLayer`."""
        super().follow_replay(n)
        self.cumulative_length += n

    def forget_step(self, n: int, before: tuple[int, ...]) -> None:
        """As in `RotorQuantLayer`."""
        super().forget_step(n, before)
        self.cumulative_length -= n

    def _advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.record_past and self._decodes(key_states, value_states):
            visible = self._step(key_states, value_states)
            self.cumulative_length += key_states.shape[2]
            return visible
        # More than the window is held only while past tokens are recorded.
        hidden, window = self._hidden(), self.window
        seen = window[0].shape[2] - max(0, hidden - len(self.store))
        visible = self._states(
            self.sinks,
            (
                _join(_last(window[0], seen), key_states),
                _join(_last(window[1], seen), value_states),
            ),
            skip=hidden,
        )
        self._store_tail(_join(window[0], key_states), _join(window[1], value_states))
        self.cumulative_length += key_states.shape[2]
        if not self.record_past:
            self._trim()
        return visible

    def _store_tail(self, keys: Tensor, values: Tensor) -> None:
        past = 0
        if not self.record_past and keys.shape[2] >= self.sliding_window:
            # What no later query will see is not coded at all.
            keys, values = (_last(x, self.sliding_window - 1) for x in (keys, values))
            past = len(self.store)
        leaving = self.config.leaving(keys.shape[2])
        self.store.append(keys[:, :, :leaving], values[:, :, :leaving])
        self.store.drop_front(past)
        self.window = (keys[:, :, leaving:].clone(), values[:, :, leaving:].clone())

    def _sinks_to_fill(self) -> int:
        return 0

    def _held(self) -> int:
        return len(self.store) + self.window_length

    def _trim(self) -> None:
        """Forget the tokens that no later query sees."""
        excess = self._hidden()
        packed = min(excess, len(self.store))
        self.store.drop_front(packed)
        if excess > packed:
            keys, values = (_last(x, x.shape[2] - excess + packed) for x in self.window)
            self.window = (keys.clone(), values.clone())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As in `RotorQuantLayer`; the offset is the number of tokens forgotten."""
        self._require_tokens(query_length)
        seen = min(self.cumulative_length, self.sliding_window - 1)
        return seen + query_length, self.cumulative_length - seen

    def get_seq_length(self) -> int:
        """Tokens seen so far, forgotten ones included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The sliding window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens, then those beyond the window.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if tokens that would be in the window again have already been
                forgotten, so that the state before cannot be had back.
        """
        _check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"crop({tokens_to_remove}) after {self.cumulative_length} tokens, but the sliding "
                f"window of {self.sliding_window} has already moved; call "
                "activate_past_recording() before the tokens that are to be undone"
            )
        removed = min(-tokens_to_remove, self.cumulative_length)
        left = self.cumulative_length - removed
        if self._held() - removed < min(left, self.sliding_window - 1):
            raise RuntimeError(
                f"crop({tokens_to_remove}) goes back further than the recorded past: "
                f"{self._held()} of {self.cumulative_length} tokens are held, and a sliding window "
                f"of {self.sliding_window} must be full afterwards; use a new cache"
            )
        super().crop(-removed)
        self.cumulative_length -= removed
        self._trim()

    def reset(self) -> None:
        """Forget everything, also the shapes."""
        super().reset()
        self.cumulative_length = 0


def _join(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate along the tokens, without a copy where `old` is empty."""
    return torch.cat((old, new), dim=2) if old.shape[2] else new


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens."""
    return x[:, :, x.shape[2] - count :]


def _check_crop(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            f"tokens_to_remove is {tokens_to_remove}; pass minus the number of tokens to remove"
        )
