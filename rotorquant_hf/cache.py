"""RotorQuantCache: the compressed cache that `model.generate` takes."""

from __future__ import annotations

import operator
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from rotorquant_hf import serialization
from rotorquant_hf.attention.tensor import CompressedTensor, OnQuery
from rotorquant_hf.backend import is_capturing
from rotorquant_hf.calibration import Calibration, shape_of
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import (
    RotorQuantHybridLayer,
    RotorQuantHybridSlidingLayer,
    check_states_croppable,
    forget_states,
    states_have_read,
)
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.memory import MemoryReport, measure
from rotorquant_hf.model_rope import ropes_of
from rotorquant_hf.passing import CACHE_NAME
from rotorquant_hf.placement import Part
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.rotations import MAX_DIM, MIN_DIM, can_be_rotated

_SLIDING = ("sliding_attention", "chunked_attention")
_HYBRID = ("hybrid", "hybrid_sliding")
_OTHER_SEQUENCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""What the modules of Transformers call the sequence that cross-attention reads."""

_MAX_FRAMES = 8  # from `update` to the attention that calls it, torch's wrappers between them


class RotorQuantCache(Cache):
    """A KV cache in 2 to 8 bits per element.

        model.generate(**inputs, past_key_values=RotorQuantCache())
        RotorQuantCache("k3v3")                      # a preset: 3-bit keys, 3-bit values
        RotorQuantCache(key_bits=3, residual_length=64, config=model.config)

    The first tokens (sinks) and the most recent ones stay in full precision; every other token is
    quantised once, when it is no longer recent and `statistics_length` tokens have been read.
    Layers whose scores `key_bits` would spoil take 8-bit keys by themselves (`wide_layers`), where
    their queries are seen and `key_bits` is no tuple.
    Attention is compressed, full and sliding, also in hybrid layers, which have recurrent states
    beside it; these stay as they are. Layers of other kinds (linear attention, convolutions,
    indexed sparse attention) keep Transformers' own cache, uncompressed, and so do layers whose
    heads have fewer than 8 elements or more than 576.

    Args:
        settings: a preset name (see `PRESETS`), a `RotorQuantConfig`, or None for the defaults.
        config: the model's config. Pass it wherever you have it: it tells how RoPE turns the keys,
            without which quality falls as the text goes on. Needed to store sliding-window and
            other layers than full attention as such, and for negative `exact_layers`.
        calibration: from `calibrate`, or the path of its file: channel statistics and query
            directions from the start, instead of those of the text. Needs `config`.
        offloading: keep the layers on the CPU between their uses (CUDA only).
        offload_only_non_sliding: leave sliding layers on the GPU when offloading.
        **options: fields of `RotorQuantConfig` that replace those of `settings`;
            `print(RotorQuantConfig.describe())` shows all with defaults and meaning:

            - size: `key_bits`, `value_bits`
            - full precision: `residual_length` (recent tokens), `block_length`,
              `num_sink_tokens`, `statistics_length`, `exact_layers`
            - quantiser: `key_quantizer`, `key_scale`, `value_scale`, `rotation`,
              `rotor_layers`, `qjl_dim`, `qjl_projection`, `query_aware`, `seed`
            - channel statistics: `equalize_keys`, `equalize_values`, `center_keys`,
              `rope_layout`
            - safety: `check_finite`

    Raises:
        TypeError, ValueError: naming the value that is not possible and the possible ones; for
            `offloading` without a CUDA device.

    Source: RotorQuant; the protocol is that of `transformers.Cache`.
    """

    def __init__(
        self,
        settings: RotorQuantConfig | str | None = None,
        *,
        config: PreTrainedConfig | None = None,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        **options: Any,
    ) -> None:
        self.settings = RotorQuantConfig.from_options(settings, **options)
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"config is of type {type(config).__name__}; pass the model's config, model.config "
                "(settings and preset names go first, without a keyword)"
            )
        if offloading and not torch.cuda.is_available():
            raise ValueError(
                "offloading=True keeps layers on the CPU while a CUDA device computes, and torch "
                "sees none here: leave it out (on the CPU there is nothing to offload)"
            )
        self._model, self._part = _known_of(config)
        self._last_update = _Update(-1, 0)
        layers, make_layer = None, None
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        if config is None:
            if calibration is not None:
                raise ValueError(
                    "a calibration needs config=model.config, to see that it is of this model"
                )
            negative = [i for i in self.settings.exact_layers if i < 0]
            if negative:
                raise ValueError(
                    f"exact_layers has {negative[0]}, which counts from the last layer; pass "
                    "config=model.config so that the number of layers is known"
                )
            # Bound to the list, not to the cache: a cycle would keep the memory of a forgotten
            # cache until the garbage collector runs.
            growing = _GrowingLayers(self.settings)
            make_layer = growing.make
        else:
            if calibration is not None:
                calibration.check(config, self.settings)
                calibration = calibration.of_part(self._part or Part())
            layers = _layers_of_model(self.settings, config, calibration)
        super().__init__(
            layers,
            make_layer,  # type: ignore[arg-type]  # called without arguments, as a class would be
            offloading,
            offload_only_non_sliding,
        )
        if config is None:
            self.layers = growing

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to a layer and return what its attention reads.

        Args:
            key_states: (batch, kv heads, n, key dim), after RoPE.
            value_states: (batch, kv heads, n, value dim).
            layer_idx: the layer.

        Returns:
            Keys and values of all tokens; see `RotorQuantLayer.update`.

        Raises:
            TypeError, ValueError: as there. The n tokens are then taken out again of the layers
                before this one, so that the forward pass can be repeated. The same if they are
                quantised, and refused, only when attention shows its queries.
        """
        # Lengths are Python's: a graph of them would be made anew each step. The wrapper that keeps
        # a compiler out takes long, so it is only there where one might look in.
        compiling = torch.compiler.is_dynamo_compiling()
        update = self._update_uncompiled if compiling else self._update
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._check_arguments(key_states, value_states, layer_idx)
        last = self._last_update
        if layer_idx == last.layer and _is_called_by_cross_attention():
            with self._taking_back(layer_idx + 1, last.tokens):
                raise ValueError(
                    "this cache was handed to an encoder-decoder model, whose self- and "
                    f"cross-attention would write into the same layers; pass {CACHE_NAME}="
                    "EncoderDecoderCache(RotorQuantCache(config=model.config), "
                    "DynamicCache(config=model.config))"
                )
        if layer_idx <= last.layer < len(self.layers) - 1:
            self._refuse_after_a_broken_pass(last)
        self._last_update = _Update(layer_idx, key_states.shape[-2])
        if layer_idx != last.layer:
            self._settle(last)
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is None or not layer.is_initialized:
            self._leave_uncompressed(layer_idx, key_states, value_states)
        elif self.offloading or layer.device != key_states.device:
            # Loaded to another device, or offloaded, and a pass that failed did not bring it back.
            layer.device = key_states.device
            layer.prefetch()
        if self.offloading:
            # With Transformers 5.17 a prefetch could overtake the copy of its layer to the CPU, or
            # take memory that attention has still to read.
            self.prefetch_stream.wait_stream(torch.cuda.default_stream(key_states.device))
        # Transformers' layers count tokens before they look at them.
        held = None if layer is None or isinstance(layer, RotorQuantLayer) else _attributes(layer)
        try:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException as error:
            if held is not None:
                vars(layer).update(held)
            self._take_back(layer_idx, key_states.shape[-2], error)
            raise
        if isinstance(keys, CompressedTensor) and keys.on_query is not None:
            keys.on_query = partial(self._show, keys.on_query, layer_idx, key_states.shape[-2])
        return keys, values

    _update_uncompiled = torch.compiler.disable(_update)

    def _check_arguments(self, key_states: Any, value_states: Any, layer_idx: Any) -> None:
        for name, x in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{name} is of type {type(x).__name__}; pass a torch.Tensor (batch, kv heads, "
                    "tokens, head dim)"
                )
            if x.dim() != 4:
                raise ValueError(
                    f"{name} have shape {tuple(x.shape)}; pass (batch, kv heads, tokens, head dim)"
                )
        if not isinstance(layer_idx, int) or isinstance(layer_idx, bool):
            raise TypeError(f"layer_idx is {layer_idx!r}; pass the layer's number, from 0 on")
        count = None if self.layer_class_to_replicate is not None else len(self.layers)
        if layer_idx < 0:
            raise ValueError(f"layer_idx is {layer_idx}; pass the layer's number, from 0 on")
        if count is not None and layer_idx >= count:
            raise ValueError(
                f"layer_idx is {layer_idx}, but the config that this cache was made with has "
                f"{count} layers, from 0 to {count - 1}; pass the config of the model that uses it"
            )

    def _leave_uncompressed(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> None:
        """Put Transformers' layer in the place of a new one, if its heads cannot be coded."""
        head_dims = {key_states.shape[3], value_states.shape[3]}
        if all(map(can_be_rotated, head_dims)):
            return
        if isinstance(self.layers, _GrowingLayers):
            self.layers.extend(self.layers.make() for _ in range(len(self.layers), layer_idx + 1))
        layer = self.layers[layer_idx]
        if isinstance(layer, RotorQuantLayer):
            warnings.warn(
                f"this model has heads of {' and '.join(map(str, sorted(head_dims)))} elements; "
                f"only heads of {MIN_DIM} to {MAX_DIM} can be quantised, so these layers stay "
                "uncompressed",
                stacklevel=3,
            )
            self.layers[layer_idx] = layer.uncompressed()

    def _show(
        self,
        see: OnQuery,
        layer_idx: int,
        tokens: int,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """Show a layer queries (batch, query heads, n, key dim) of a pass over so many tokens.

        "sdpa" may hand a single token's as (batch, kv heads, group, key dim).
        """
        if tokens == 1 < query.shape[2]:
            query = query.flatten(1, 2).unsqueeze(2)
            mask = mask if mask is None or mask.dim() < 4 else mask[:, :1, :1]
        with self._taking_back(layer_idx, tokens):
            see(query, mask, scale)

    @contextmanager
    def _taking_back(self, layer_idx: int, tokens: int) -> Iterator[None]:
        """`_take_back` if what is done within fails."""
        try:
            yield
        except BaseException as error:
            self._take_back(layer_idx, tokens, error)
            raise

    def _take_back(self, layer_idx: int, tokens: int, error: BaseException) -> None:
        """Take the newest tokens out of the layers before this one, which did not store them.

        It refuses them, or there is no memory left: a smaller batch, or the same again when memory
        has been freed, then goes on from where the cache was. What those layers have quantised in
        the pass stays quantised, and its queries stay counted.
        """
        ours = [x for x in self.layers if isinstance(x, RotorQuantLayer) and x.is_initialized]
        if any(is_capturing(layer.device) for layer in ours):
            return  # nothing has run on the device; `DecodeGraph` counts the step back
        if not self._undo(layer_idx, tokens):
            error.add_note("Parts of the cache hold the new tokens already: use cache.reset().")

    def _settle(self, last: _Update) -> None:
        """Store what the layer that was last updated still has waiting for its queries.

        No attention has shown them, and now another layer is about to get tokens.
        """
        layer = self.layers[last.layer] if 0 <= last.layer < len(self.layers) else None
        if not isinstance(layer, RotorQuantLayer) or not layer.waits:
            return
        layer.count_queries()
        if layer.moment is None and layer.calibration is None:
            warnings.warn(
                "query_aware: this attention does not show its queries to the cache, so keys are "
                "rounded to the nearest; call model.set_attn_implementation('rotorquant')",
                stacklevel=2,
            )
        with self._taking_back(last.layer, last.tokens):
            try:
                layer.settle()
            except BaseException:
                layer.drop_waiting()
                raise

    def _refuse_after_a_broken_pass(self, last: _Update) -> None:
        """Raise if the pass before this one broke off half-way: its layers are out of step.

        An interrupt from the keyboard does that, or an attention that refuses its arguments. The
        positions and the mask of the pass that begins count the tokens of the broken one, so that
        it cannot go on; the broken one is taken back.
        """
        layers = self.layers[last.layer + 1 :]
        later = [x for x in layers if isinstance(x, RotorQuantLayer) and x.is_initialized]
        length = self.get_seq_length(last.layer) - last.tokens
        if not later or any(x.get_seq_length() != length for x in later):
            return
        if _calling_module() is None:  # layer by layer, as a script may fill them
            return
        taken_back = self._undo(last.layer + 1, last.tokens)
        remedy = "they are taken out again: repeat this pass" if taken_back else "use cache.reset()"
        raise RuntimeError(
            f"the pass before this one broke off after layer {last.layer}, so that only some "
            f"layers hold its {last.tokens} tokens; {remedy}"
        )

    def _undo(self, failed: int, tokens: int) -> bool:
        """Take the newest tokens out of the layers before `failed`; False if that is impossible."""
        before: list[Any] = [x for x in self.layers[:failed] if isinstance(x, CacheLayerMixin)]
        later: list[Any] = [x for x in self.layers[failed:] if isinstance(x, CacheLayerMixin)]
        if later:
            held = later[0].get_seq_length()
        else:  # the pass has come through all attention
            held = before[0].get_seq_length() - tokens if before else 0
        in_step = all(layer.get_seq_length() == held + tokens for layer in before)
        if in_step and not held:  # the first pass of a text
            for layer in self.layers[: failed + 1]:
                _forget(layer)
            return True
        if any(map(states_have_read, self.layers[: failed + 1])):  # perhaps in this very pass
            return False
        if not before or not in_step:
            return True  # not a pass through the model: nothing to take back
        try:
            for layer in before:
                layer.crop(-tokens)
        except RuntimeError:  # a sliding window has moved on
            return False
        return True

    def reset(self) -> None:
        """Forget everything, also the shapes: the cache is as new."""
        self._last_update = _Update(-1, 0)
        for layer in self.layers:
            _forget(layer)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens, in all layers, or in none if one refuses.

        Raises:
            TypeError: if `tokens_to_remove` is no integer.
            ValueError: if it is positive.
            RuntimeError: if a layer cannot be had back as it was: one with a recurrent state, or
                a sliding window or convolution that did not record its past
                (`activate_past_recording()`).
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # a tensor, in Transformers 5.17
        except TypeError as error:
            raise TypeError(
                f"tokens_to_remove is {tokens_to_remove!r}; pass an integer, 0 or negative"
            ) from error
        ours = [layer for layer in self.layers if isinstance(layer, RotorQuantLayer)]
        others: list[Any] = [x for x in self.layers if not isinstance(x, RotorQuantLayer)]
        for layer in ours:
            layer.check_croppable(tokens_to_remove)
        for other in others:
            if isinstance(other, LinearAttentionCacheLayerMixin):
                check_states_croppable(other, tokens_to_remove)
        # Layers of Transformers replace what they hold, so that it can be put back.
        before = [_attributes(other) for other in others]
        try:
            for other in others:
                other.crop(tokens_to_remove)
        except BaseException:
            for other, held in zip(others, before, strict=True):
                vars(other).update(held)
            raise
        for layer in ours:
            layer.crop(tokens_to_remove)

    def tokens_until_packing(self) -> int:
        """How many more tokens until a layer quantises some; see `RotorQuantLayer`.

        `sys.maxsize` if no layer is compressed.
        """
        layers = [layer for layer in self.layers if isinstance(layer, RotorQuantLayer)]
        if not self.layers:
            layers = [RotorQuantLayer(self.settings)]
        return min((layer.tokens_until_packing() for layer in layers), default=sys.maxsize)

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer has recurrent states and no attention."""
        return [
            isinstance(x, LinearAttentionCacheLayerMixin) and not isinstance(x, CacheLayerMixin)
            for x in self.layers
        ]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Keys and values of every layer, and None where a `DynamicCache` gives its window."""
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), None

    @property
    def wide_layers(self) -> tuple[int, ...]:
        """The layers whose keys have taken 8 bits, as fewer would spoil their scores."""
        ours = [(i, x) for i, x in enumerate(self.layers) if isinstance(x, RotorQuantLayer)]
        return tuple(i for i, layer in ours if layer.has_wide_keys)

    def memory(self) -> MemoryReport:
        """The bytes that this cache takes, by part, measured on its tensors."""
        return measure(self.layers, self._tokens())

    def _tokens(self) -> int:
        """Tokens of the text so far; 0 where no layer is attention."""
        attention = [layer for layer in self.layers if hasattr(layer, "get_seq_length")]
        return max((int(layer.get_seq_length()) for layer in attention), default=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file (atomically: an old file stays if this fails).

        With tensor parallelism every process has its own part to save, to a path of its own.

        Raises:
            ValueError: if the cache is empty.
        """
        serialization.save(path, self.settings, self.layers, self._model, self._part)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> RotorQuantCache:
        """Read a cache that `save` wrote; generation goes on as if it had never stopped.

        Args:
            path: the file.
            config: the model's config, if the cache was made with one. A cache of full attention
                that has quantised tokens does without.
            device: the device of the model. Where its layers are on several, attention's part of
                each goes to its own with the first tokens that it gets.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is damaged, was not written by `save`, or is of another model,
                version or part of the heads; if it needs a config and got none; or if the device
                cannot be used here.
        """
        model, part = _known_of(config)
        settings, layers = serialization.read(path, device, model, part)
        cache = cls(settings, config=config)
        if config is None:
            foreign = [entry.type for entry in layers if entry.needs_config]
            if foreign:
                raise ValueError(
                    f"{path} has layers of type {foreign[0]}; pass config=model.config"
                )
            growing = cast(_GrowingLayers, cache.layers)
            for _ in layers:
                growing.append(growing.make())
        serialization.restore(path, cache.layers, layers)
        return cache

    def __repr__(self) -> str:
        bits = "/".join(
            "by layer" if name in self.settings.by_layer else str(getattr(self.settings, name))
            for name in ("key_bits", "value_bits")
        )
        layers = ", ".join(map(str, self.wide_layers))
        wide = f" (8-bit keys in layers {layers})" if layers else ""
        return (
            f"RotorQuantCache(key/value bits {bits}{wide}, layers={len(self.layers)}, "
            f"tokens={self._tokens()})"
        )


class _Update(NamedTuple):
    """A layer, -1 before the first, and how many tokens it got."""

    layer: int
    tokens: int


def _known_of(
    config: PreTrainedConfig | None,
) -> tuple[dict[str, Any] | None, Part | None]:
    """What a file says of a model, and of the part of its heads that is here."""
    return (None, None) if config is None else (shape_of(config), Part.of_model(config))


def _attributes(layer: Any) -> dict[str, Any]:
    """What a layer of Transformers holds now, tensors shared."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(layer).items()}


def _forget(layer: Any) -> None:
    """Reset a layer, of what type it may be, so that it takes a batch of another size too."""
    layer.reset()
    if isinstance(layer, LinearAttentionLayer) and not isinstance(layer, RotorQuantLayer):
        forget_states(layer)
    if isinstance(layer, DynamicLayer):  # Transformers 5.17 would keep its tokens, as zeros
        layer.keys = layer.values = None
        layer.is_initialized = False


def _is_called_by_cross_attention() -> bool:
    """Whether `update` is called by a module's attention over another sequence than its own.

    Nothing but the caller tells: the states look alike, and Transformers does not name them.
    """
    frame = _calling_module()
    if frame is None:
        return False
    return any(frame.f_locals.get(name) is not None for name in _OTHER_SEQUENCES)


def _calling_module() -> FrameType | None:
    """The frame of the module that calls `update`; None if a script does."""
    frame: FrameType | None = sys._getframe(3)
    for _ in range(_MAX_FRAMES):
        if frame is None or isinstance(frame.f_locals.get("self"), torch.nn.Module):
            return frame
        frame = frame.f_back
    return None


class _GrowingLayers(list[Any]):
    """Layers of full attention, made when they are first used."""

    def __init__(self, settings: RotorQuantConfig) -> None:
        super().__init__()
        self.settings = settings

    def make(self) -> Any:
        """The next layer."""
        uncompressed = len(self) in self.settings.exact_layers
        settings = self.settings.of_layer(len(self))
        return _make_layer(settings, "full_attention", {}, uncompressed)

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise IndexError(
                f"the cache has no layer {index} yet; if the model has layers other than full "
                "attention, make the cache with RotorQuantCache(config=model.config)"
            ) from None


def _layers_of_model(
    settings: RotorQuantConfig, config: PreTrainedConfig, calibration: Calibration | None
) -> list[Any]:
    """One cache layer per layer of the model, by its type."""
    known = {} if calibration is None else calibration.layers
    types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if isinstance(kwargs, dict):  # transformers < 5.18 has one for all layers
        kwargs = [kwargs] * len(types)
    for index in settings.exact_layers:
        if not -len(types) <= index < len(types):
            raise ValueError(f"exact_layers has {index}, but the model has {len(types)} layers")
    for name, bits in settings.by_layer.items():
        if len(bits) != len(types):
            raise ValueError(
                f"{name} has {len(bits)} numbers, but the model has {len(types)} layers"
            )
    uncompressed = {index % len(types) for index in settings.exact_layers}
    ropes = ropes_of(config, types, settings.rope_layout)
    if calibration is not None:
        calibration.check_ropes(ropes)
    layers = [
        _make_layer(
            settings.of_layer(index),
            kind,
            options,
            index in uncompressed,
            known.get(index),
            rope,
        )
        for index, (kind, options, rope) in enumerate(zip(types, kwargs, ropes, strict=True))
    ]
    others = sorted({kind for index, kind in enumerate(types) if index not in uncompressed})
    if others and not any(isinstance(x, RotorQuantLayer) for x in layers):
        warnings.warn(
            f"no layer of this model ({config.model_type}) is compressed: its layers are of type "
            f"{', '.join(others)}, for which the cache has Transformers' own; full and sliding "
            "attention is compressed",
            stacklevel=3,
        )
    return layers


def _make_layer(
    settings: RotorQuantConfig,
    kind: str,
    options: dict[str, Any],
    uncompressed: bool,
    calibration: tuple[ChannelStatistics, ChannelStatistics] | None = None,
    rope: Rope | None = None,
) -> Any:
    """A compressed layer, or Transformers' own if it is not to be compressed or cannot be."""
    if uncompressed or kind not in ("full_attention", *_SLIDING, *_HYBRID):
        return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
    if kind == "hybrid":
        return RotorQuantHybridLayer(settings, calibration, rope, options["number_of_states"])
    if kind == "hybrid_sliding":
        return RotorQuantHybridSlidingLayer(
            settings, options["sliding_window"], calibration, rope, options["number_of_states"]
        )
    if kind in _SLIDING:
        return RotorQuantSlidingLayer(settings, options["sliding_window"], calibration, rope)
    return RotorQuantLayer(settings, calibration, rope)
