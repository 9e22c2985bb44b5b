"""A layer of sliding-window (or chunked) attention, which holds only what its window sees."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer, copies_from, join, last
from rotorquant_hf.layers.ring import Lengths
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.rope import Rope


class RotorQuantSlidingLayer(RotorQuantLayer):
    """A layer of sliding-window (or chunked) attention: only the last tokens are kept.

    `update` returns the last `sliding_window` - 1 tokens and the new ones, as the mask expects.

    Args:
        config: the settings. Sinks do not apply: the first tokens leave the window like all.
        sliding_window: tokens that a query sees, itself included.
        calibration, rope: as of `RotorQuantLayer`.
    """

    is_sliding = True

    def __init__(
        self,
        config: RotorQuantConfig,
        sliding_window: int,
        calibration: tuple[ChannelStatistics, ChannelStatistics] | None = None,
        rope: Rope | None = None,
    ) -> None:
        super().__init__(config, calibration, rope)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def uncompressed(self) -> CacheLayerMixin:
        """As in `RotorQuantLayer`."""
        layer = DynamicSlidingWindowLayer(self.sliding_window)
        if self.record_past:
            layer.activate_past_recording()
        return layer

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop` (assisted decoding)."""
        if self.is_initialized:
            self.settle()
        self.record_past = True

    def _seen_by_a_query(self) -> int:
        return self.sliding_window

    def _num_outside_window(self) -> int:
        return max(0, self._held() - self.sliding_window + 1)

    def follow_replay(self, n: int) -> None:
        """As in `RotorQuantLayer`."""
        super().follow_replay(n)
        self.cumulative_length += n

    def forget_step(self, n: int, before: Lengths) -> None:
        """As in `RotorQuantLayer`."""
        super().forget_step(n, before)
        self.cumulative_length -= n

    def _advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.record_past and self._decodes(key_states, value_states):
            visible = self._step(key_states, value_states)
            self.cumulative_length += key_states.shape[2]
            return visible
        # More than the window is held only while past tokens are recorded.
        outside, past = self._num_outside_window(), self.recent
        seen = past[0].shape[2] - max(0, outside - len(self.store))
        visible = self._states(
            self.sinks,
            (join(last(past[0], seen), key_states), join(last(past[1], seen), value_states)),
            skip=outside,
        )
        n = key_states.shape[2]
        recent = join(past[0], key_states), join(past[1], value_states)
        self.cumulative_length += n
        try:
            return self._take_in(recent, past, n, visible)
        except BaseException:
            self.cumulative_length -= n
            raise

    def drop_waiting(self) -> None:
        """As in `RotorQuantLayer`."""
        waiting = self.recent_length
        super().drop_waiting()
        self.cumulative_length -= waiting - self.recent_length

    def _store_recent(self, keys: Tensor, values: Tensor) -> None:
        past = 0
        if not self.record_past and keys.shape[2] >= self.sliding_window:
            # Tokens that no later query will see are not quantised at all.
            keys, values = (last(x, self.sliding_window - 1) for x in (keys, values))
            past = len(self.store)
        packed = self.config.num_to_quantise(keys.shape[2], self._wanted())
        recent = copies_from(packed, keys, values)
        self._pack(keys, values, packed, self.cumulative_length - keys.shape[2])
        self.store.drop_front(past)
        self.recent = recent
        if not self.record_past:
            self._trim()

    def _wanted(self) -> int:
        # A window of fewer tokens never has more.
        return min(super()._wanted(), self.sliding_window - 1)

    @property
    def _has_sinks(self) -> bool:
        return False

    def _sinks_to_fill(self) -> int:
        return 0

    def _held(self) -> int:
        return len(self.store) + self.recent_length

    def _trim(self) -> None:
        """Forget the tokens that no later query sees."""
        excess = self._num_outside_window()
        packed = min(excess, len(self.store))
        self.store.drop_front(packed)
        if excess > packed:
            keys, values = (last(x, x.shape[2] - excess + packed) for x in self.recent)
            self.recent = (keys.clone(), values.clone())

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
        self.check_croppable(tokens_to_remove)
        if not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self.cumulative_length)
        super().crop(-removed)
        self.cumulative_length -= removed
        self._trim()

    def check_croppable(self, tokens_to_remove: int) -> None:
        """As in `RotorQuantLayer`."""
        super().check_croppable(tokens_to_remove)
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

    def reset(self) -> None:
        """Forget everything, also the shapes."""
        super().reset()
        self.cumulative_length = 0
