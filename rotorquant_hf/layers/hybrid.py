"""Hybrid layers, of attention and recurrent states in one, as Falcon-H1 and Zamba2 have.

The attention part is compressed as in other layers. The recurrent states, convolution states among
them, are Transformers' own: they do not grow with the text. A model may read and write them before
its attention calls `update`, or after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.rope import Rope


class RotorQuantHybridLayer(LinearAttentionLayer, RotorQuantLayer):  # type: ignore[misc, override]
    """A layer of full attention, which is compressed, and of recurrent states, which are not.

    Args:
        config, calibration, rope: as of `RotorQuantLayer`.
        number_of_states: how many convolution states, and how many others, it may have.
    """

    is_compileable = False

    def __init__(
        self,
        config: RotorQuantConfig,
        calibration: tuple[ChannelStatistics, ChannelStatistics] | None = None,
        rope: Rope | None = None,
        number_of_states: int = 1,
    ) -> None:
        RotorQuantLayer.__init__(self, config, calibration, rope)
        LinearAttentionLayer.__init__(self, number_of_states)

    @property
    def _attention(self) -> RotorQuantLayer:
        """The layer's methods as its attention part alone has them, that of a window or not.

        They are those that come after the ones of the recurrent states in the order of bases:
        (...HybridLayer, LinearAttentionLayer, LinearAttentionCacheLayerMixin, RotorQuant...Layer).
        """
        return cast(RotorQuantLayer, super(LinearAttentionCacheLayerMixin, self))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Take what is to be known of the first keys and values, or of a first state.

        As in Transformers' hybrid layers, keys and values come by position, states by name.
        """
        if args:
            self._attention.lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in `RotorQuantLayer`."""
        # A convolution may leave them channels first, over which torch's attention rounds otherwise
        # than over those that Transformers' cache hands out.
        new = key_states.contiguous(), value_states.contiguous()
        try:
            return self._attention.update(*new, *args, **kwargs)
        except BaseException:
            if not self.is_initialized:  # then states have read nothing but these tokens
                self.reset()
            raise

    def uncompressed(self) -> CacheLayerMixin:
        """As in `RotorQuantLayer`, with the states of this one, which there may be already."""
        return self._with_states(LinearAttentionAndFullAttentionLayer(self.number_of_states))

    def _with_states(self, other: CacheLayerMixin) -> CacheLayerMixin:
        for name in vars(LinearAttentionLayer(self.number_of_states)):
            setattr(other, name, getattr(self, name))
        return other

    def __copy__(self) -> RotorQuantHybridLayer:
        """A fork of the layer, with states of its own: models write into them."""
        fork = cast(RotorQuantHybridLayer, self._attention.__copy__())
        for name, value in vars(self).items():
            if isinstance(value, dict):  # the states, and what is known of each
                own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
                setattr(fork, name, own)
        return fork

    def state_tensors(self) -> dict[str, Tensor]:
        """The recurrent states that there are, (batch, ...), by Transformers' name and index."""
        return {
            f"{name}.{index}": state
            for name in ("conv_states", "recurrent_states")
            for index, state in getattr(self, name).items()
            if state is not None
        }

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._attention._map_rows(fn)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = fn(state)

    reorder_cache = RotorQuantLayer.reorder_cache

    # The states stay where they are: they are small, and models read some of them after `update`,
    # when an offloaded cache has moved the layer away already.
    offload = RotorQuantLayer.offload
    prefetch = RotorQuantLayer.prefetch

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if the attention part refuses; or if the recurrent states before cannot be
                had back: that takes `activate_past_recording()` before the tokens that are to be
                undone, and convolution states only. Neither part is then changed.
        """
        self.check_croppable(tokens_to_remove)
        before = dict(self.conv_states)
        try:
            if any(self.is_conv_states_initialized.values()):
                LinearAttentionLayer.crop(self, tokens_to_remove)
            self._attention.crop(tokens_to_remove)
        except BaseException:
            self.conv_states = before
            raise

    def check_croppable(self, tokens_to_remove: int) -> None:
        """As in `RotorQuantLayer`."""
        RotorQuantLayer.check_croppable(self, tokens_to_remove)
        check_states_croppable(self, tokens_to_remove)
        self._attention.check_croppable(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, also the shapes."""
        self._attention.reset()
        forget_states(self)

    def nbytes(self) -> dict[str, int]:
        """Bytes by part; those of the states are among those of uncompressed layers."""
        parts = self._attention.nbytes()
        # Cropped convolution states are views.
        size = sum(x.untyped_storage().nbytes() for x in self.state_tensors().values())
        return parts | {"exact_layers": size}

    def numbers(self) -> tuple[int, int]:
        """As in `RotorQuantLayer`, the states included, which are not packed."""
        elements, packed = self._attention.numbers()
        return elements + sum(x.numel() for x in self.state_tensors().values()), packed


def forget_states(layer: LinearAttentionLayer) -> None:
    """Forget recurrent states, also their shapes; whether the past is recorded stays."""
    recording = layer.record_past
    LinearAttentionLayer.__init__(layer, layer.number_of_states)
    layer.record_past = recording


def states_have_read(layer: Any) -> bool:
    """Whether a layer, of whatever type, has recurrent states that have read tokens."""
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin)
    return has_states and any(layer.has_previous_state.values())


def check_states_croppable(layer: LinearAttentionCacheLayerMixin, tokens_to_remove: int) -> None:
    """Raise if the states of a layer cannot be what they were some tokens before."""
    if tokens_to_remove and any(layer.is_recurrent_states_initialized.values()):
        raise RuntimeError(
            f"crop({tokens_to_remove}) of a layer with a recurrent state, which does not hold "
            "what it was before; use a new cache, or copy this one before the tokens that may "
            "be undone"
        )
    if not layer.record_past:
        raise RuntimeError(
            f"crop({tokens_to_remove}) of a layer with convolution states, which forget what they "
            "were before; call activate_past_recording() before the tokens that are to be undone"
        )


class RotorQuantHybridSlidingLayer(  # type: ignore[misc, override]
    RotorQuantHybridLayer, RotorQuantSlidingLayer
):
    """The same with sliding-window attention.

    Args:
        config, sliding_window, calibration, rope: as of `RotorQuantSlidingLayer`.
        number_of_states: as of `RotorQuantHybridLayer`.
    """

    def __init__(
        self,
        config: RotorQuantConfig,
        sliding_window: int,
        calibration: tuple[ChannelStatistics, ChannelStatistics] | None = None,
        rope: Rope | None = None,
        number_of_states: int = 1,
    ) -> None:
        RotorQuantSlidingLayer.__init__(self, config, sliding_window, calibration, rope)
        LinearAttentionLayer.__init__(self, number_of_states)

    def uncompressed(self) -> CacheLayerMixin:
        """As in `RotorQuantHybridLayer`."""
        return self._with_states(
            LinearAttentionAndSlidingWindowAttentionLayer(
                self.sliding_window, self.number_of_states
            )
        )

    activate_past_recording = RotorQuantSlidingLayer.activate_past_recording
