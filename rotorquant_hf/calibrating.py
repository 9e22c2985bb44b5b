"""`calibrate`: run a model over some text, and keep what its cache would learn of it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.calibration import Calibration, settings_of, shape_of
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.passing import cache_argument
from rotorquant_hf.placement import Part, input_device
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.wide import JUDGED_BITS
from rotorquant_hf.store.kv_store import RotorQuantKVCache

MIN_TOKENS = 256


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, ids: Tensor, settings: RotorQuantConfig | str | None = None
) -> Calibration:
    """Take the channel statistics and query directions of a model from some text.

    Args:
        model: with `attn_implementation` "sdpa" or "rotorquant", which show their queries.
        ids: (windows, tokens) token ids: windows of text that are read on their own, some thousand
            tokens in all, of the length that the cache will be used at if that is possible.
        settings: of the caches that will use it, as `RotorQuantCache` takes them. Bits and window
            do not matter.

    Returns:
        The calibration, for `RotorQuantCache(..., calibration=...)`.

    Raises:
        TypeError, ValueError: for what is no causal language model or no token ids, for fewer than
            MIN_TOKENS tokens, attention that hides its queries, or a model of which this process
            holds a part of the heads.
    """
    check_model(model)
    parts = Part.of_model(model.config).count
    if parts > 1:
        raise ValueError(
            f"the model is divided among {parts} processes (tp_plan), which see a part of its "
            "heads each; calibrate it in one process, without tp_plan (device_map='auto' spreads "
            "it): caches of a divided model take their heads from the calibration of the whole"
        )
    settings = RotorQuantConfig.from_options(settings)
    check_windows(ids, model)
    # The first tokens of every window are sinks, and no part of the statistics.
    sinks = settings.num_sink_tokens
    counted, least = len(ids) * max(0, ids.shape[1] - sinks), max(1, MIN_TOKENS - sinks)
    if counted < least:
        raise ValueError(
            f"ids have {ids.numel()} tokens, of which {counted} are not among the first {sinks} of "
            f"a window; statistics take {least} of these at least, and some thousand are better"
        )
    # Nothing is quantised: the layers keep all keys and values, and the moment of the queries.
    exact = dataclasses.replace(settings, residual_length=ids.shape[1], exact_layers=())
    seen: dict[int, list[RotorQuantLayer]] = {}
    for row in ids:
        cache = RotorQuantCache(exact, config=model.config)
        fill(model, row[None].to(input_device(model)), cache)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, RotorQuantLayer) and layer.is_initialized:
                seen.setdefault(index, []).append(layer)
    layers = {
        index: _statistics(passes, settings.of_layer(index)) for index, passes in seen.items()
    }
    return Calibration(shape_of(model.config), settings_of(settings), ids.numel(), layers)


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError unless a model writes text from left to right by itself."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is of type {type(model).__name__}; pass the model itself, loaded")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model; statistics are taken from models "
            "such as AutoModelForCausalLM loads"
        )


def check_windows(ids: Any, model: PreTrainedModel) -> None:
    """Raise TypeError or ValueError unless these are token ids (windows, tokens) of a model."""
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"ids are of type {type(ids).__name__}; pass a tensor (windows, tokens), such as "
            "tokenizer(text, return_tensors='pt').input_ids"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids have dtype {ids.dtype}; pass token ids, torch.int64")
    if ids.dim() != 2 or not ids.numel():
        hint = "; of a single window pass ids[None]" if ids.dim() == 1 else ""
        raise ValueError(f"ids have shape {tuple(ids.shape)}; pass (windows, tokens){hint}")
    known = model.config.get_text_config(decoder=True).vocab_size
    low, high = (int(x) for x in ids.aminmax())
    if not 0 <= low <= high < known:
        raise ValueError(
            f"ids go from {low} to {high}, and the model knows 0 to {known - 1}; pass those of its "
            "own tokenizer"
        )


def fill(model: PreTrainedModel, ids: Tensor, cache: RotorQuantCache, **inputs: Any) -> None:
    """Read token ids (rows, tokens) into a cache, without the logits that nobody looks at.

    Args:
        **inputs: what else the model gets.
    """
    takes = inspect.signature(model.forward).parameters
    last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    model(ids, **cache_argument(model, cache), **last_logits, **inputs)


def _statistics(
    passes: list[RotorQuantLayer], settings: RotorQuantConfig
) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Those of the keys and values of a layer, whatever pass they come from."""
    keys, values = (torch.cat([x.recent[i] for x in passes], dim=2) for i in range(2))
    # The recent tokens are those after the sinks, of a sliding layer its last ones.
    ends = [(layer.get_seq_length(), layer.recent_length) for layer in passes]
    positions = [torch.arange(end - n, end, device=keys.device) for end, n in ends]
    d_key, d_value, rope = keys.shape[3], values.shape[3], passes[0].rope
    # Fewer than 8 bits, the same in every layer: only such stores find out if keys need more.
    settings = dataclasses.replace(settings, key_bits=JUDGED_BITS)
    store = RotorQuantKVCache(d_key, d_value, device=keys.device, config=settings, rope=rope)
    queries = _moment(passes) if settings.query_aware else None
    store.keys.take_statistics(keys, torch.cat(positions), queries)
    store.values.take_statistics(values)
    taken: list[Any] = [side.statistics for side in store.sides]
    return taken[0].map(Tensor.cpu), taken[1].map(Tensor.cpu)


def _moment(passes: list[RotorQuantLayer]) -> QueryMoment:
    found: QueryMoment | None = None
    for layer in passes:
        layer.count_queries()
        if layer.moment is None:
            raise ValueError(
                "this attention does not show its queries; call "
                "model.set_attn_implementation('rotorquant'), or calibrate with query_aware=False"
            )
        found = layer.moment if found is None else found.merged(layer.moment)
    assert found is not None
    return found
