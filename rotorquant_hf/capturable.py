"""What a CUDA graph of a decode step can hold: the models and caches that `DecodeGraph` takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from rotorquant_hf.attention.registered import NAME
from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.model_rope import changing_rope


def check_model(model: Any) -> None:
    """Refuse a model of which no step can be captured.

    Raises:
        ValueError: if it is not on a CUDA device, on several, or offloaded; if its attention is
            neither "sdpa" nor "rotorquant", or chunked; or if its RoPE changes with the length of
            the text.
    """
    if model.device.type == "meta":
        raise ValueError(
            "the model's weights are offloaded, and brought at every step, which no graph can "
            "replay: load the model with device_map={'': 0}, or decode without a graph"
        )
    if model.device.type != "cuda":
        raise ValueError(f"the model is on {model.device}; CUDA graphs need a CUDA device")
    devices = _devices(model)
    if len(devices) > 1:
        raise ValueError(
            f"the model is on {', '.join(sorted(devices))}; a CUDA graph is of one device: load "
            "the model with device_map={'': 0}, or decode without a graph"
        )
    parts = getattr(model, "_tp_size", None) or 1
    if parts > 1:
        raise ValueError(
            f"the model is divided among {parts} devices (tp_plan); a CUDA graph is of one: load "
            "the model with device_map={'': 0}, or decode without a graph"
        )
    config = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "the model has chunked attention, whose mask changes from chunk to chunk and would be "
            "frozen; decode without a graph"
        )
    attention = config._attn_implementation
    if attention not in ("sdpa", NAME):
        raise ValueError(
            f"the model's attention is {attention!r}, which reads keys in a way that no graph can "
            f"replay while they grow; call model.set_attn_implementation({NAME!r})"
        )
    rope = changing_rope(model.config)
    if rope is not None:
        raise ValueError(
            f"the model's RoPE is of type {rope!r}, whose frequencies change with the length of "
            "the text, which a captured step does not follow; decode without a graph"
        )


def _devices(model: Any) -> set[str]:
    """Where the parts of a model are: by its `hf_device_map`, and its parameters."""
    placed = getattr(model, "hf_device_map", None) or {}
    devices = {f"cuda:{x}" if isinstance(x, int) else str(x) for x in placed.values()}
    if len(devices) > 1:
        return devices
    return {str(x.device) for x in model.parameters()}


def is_padded(mask: Tensor | None) -> bool:
    """Whether an attention mask hides any token; waits for the device."""
    return mask is not None and not bool(mask.all())


def check_cache(model: Any, cache: RotorQuantCache, padded: bool) -> None:
    """Refuse a cache of which no step can be captured. One that is empty tells less.

    Args:
        padded: whether rows of its text have padding.

    Raises:
        ValueError: if it looks for NaN (`check_finite`) or is offloaded; if it was made without
            the config of a model with sliding windows; or if a layer is not compressed, has
            recurrent states, has a sliding window that may hold no quantised token or over padded
            rows, is on another device than the model, or is not decoded by the kernels.
    """
    settings = cache.settings
    if settings.check_finite:
        raise ValueError(
            "check_finite is on, which waits for the device at every step; leave it off"
        )
    if cache.offloading:
        raise ValueError(
            "the cache is offloaded: its layers move at every step, which no graph can replay; "
            "make it with offloading=False"
        )
    if not cache.layers and settings.exact_layers:
        raise ValueError(
            f"exact_layers is {settings.exact_layers}, and layers that are not compressed cannot "
            "be captured; leave it empty, or decode without a graph"
        )
    layers: list[Any] = cache.layers
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    known = any(getattr(x, "is_sliding", False) for x in layers)  # Mamba's have no such attribute
    if any("sliding" in x for x in kinds) and not known:
        raise ValueError(
            "the model has sliding windows, and the cache no sliding layers, so that a graph would "
            "see tokens that have left the window; make it with "
            "RotorQuantCache(config=model.config)"
        )
    device = next(model.parameters()).device
    for index, layer in enumerate(layers):
        _check_kind(index, layer, settings.residual_length + 2 * settings.block_length, padded)
        if not layer.is_initialized:
            continue
        if layer.device != device:
            raise ValueError(
                f"layer {index} of the cache is on {layer.device}, the model on {device}; a CUDA "
                "graph is of one device"
            )
        if not layer.store.kernels_take(layer.dtype):
            raise ValueError(
                f"layer {index} does not decode through the Triton kernels, which need Triton "
                "and take the quantisers 'mse' and 'prod', head dims that are multiples of 8 "
                "(in float32 to 512), and 16- or 32-bit floats"
            )


def _check_kind(index: int, layer: Any, max_recent: int, padded: bool) -> None:
    if not isinstance(layer, RotorQuantLayer):
        raise ValueError(
            f"layer {index} of the cache is a {type(layer).__name__}, which cannot be "
            "captured; if it is one of exact_layers, leave it out of them; else decode without a "
            "graph"
        )
    if isinstance(layer, RotorQuantHybridLayer):
        raise ValueError(
            f"layer {index} of the cache has recurrent states beside its attention, which cannot "
            "be captured; decode without a graph"
        )
    if isinstance(layer, RotorQuantSlidingLayer) and padded:
        raise ValueError(
            f"attention_mask has zeros, and layer {index} has a sliding window, which moves over "
            "the padding: decode rows of one length, or decode without a graph"
        )
    if isinstance(layer, RotorQuantSlidingLayer) and layer.sliding_window <= max_recent:
        raise ValueError(
            f"layer {index} has a sliding window of {layer.sliding_window} tokens, of "
            f"which up to {max_recent} stay in full precision; choose a smaller "
            "residual_length or block_length, or decode without a graph"
        )
