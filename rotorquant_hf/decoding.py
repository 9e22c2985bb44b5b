"""`decode_with_graph`: `model.generate` with the steps of a `DecodeGraph`."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.capturable import check_cache, check_model, is_padded
from rotorquant_hf.graph import DecodeGraph
from rotorquant_hf.passing import CACHE_NAME

_MAX_ROOM = 1024  # tokens that memory is taken for at once

# What `generate` hands on and a captured step takes, or does not need. The embeddings of a prompt
# are read by the prefill, which is not captured.
_TAKEN = (
    CACHE_NAME,
    "use_cache",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "logits_to_keep",
)


def decode_with_graph(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode on a GPU through a `DecodeGraph`. For `generate`, which calls it:

        cache = RotorQuantCache(config=model.config)
        model.generate(**inputs, past_key_values=cache, custom_generate=decode_with_graph)

    Sampling, logits processors, stopping criteria, streamers, scores and a cache that is used for
    several rounds work as without, and the tokens are the same: the loop is that of Transformers,
    and only the model's step is another. The graph is captured anew in every call. Stop strings
    are given as `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, as `generate` keeps
    the tokenizer from a `custom_generate`.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
            streamer, model_kwargs: as `generate` passes them.

    Returns:
        What `generate` returns: token ids (batch, tokens), or a `GenerateDecoderOnlyOutput`.

    Raises:
        ValueError: for a model or cache that `DecodeGraph` refuses; for another cache than a
            `RotorQuantCache`, or none; for beams, assisted decoding and other modes than greedy
            and sampling; for padded rows where layers have sliding windows; and for what the model
            gets besides tokens, or gives besides logits. The cache is then as it was.
    """
    called = _arguments_of_generate()
    streamer = called.get("streamer") if streamer is None else streamer
    _check_mode(generation_config, called.get("assistant_model"))
    _check_inputs(model, generation_config, synced_gpus, model_kwargs)
    cache = model_kwargs[CACHE_NAME]
    check_model(model)
    check_cache(model, cache, is_padded(model_kwargs.get("attention_mask")))
    stepping = _Stepping(model, cache, generation_config.max_length)
    try:
        # Not the bound method: the loop is to ask `stepping` for its steps.
        return model._sample.__func__(
            stepping,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    finally:
        stepping.close()


class _Stepping:
    """A model whose calls are steps of a `DecodeGraph`; for all else it is the model.

    `_sample` is run with this as its `self`. It prefills by the model's own method, which calls the
    model, and every other call is one token for each row.
    """

    def __init__(self, model: Any, cache: RotorQuantCache, max_length: int) -> None:
        self._model, self._cache, self._max_length = model, cache, max_length
        self._was_empty = cache.get_seq_length() == 0
        self._graph: DecodeGraph | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        if self._graph is None:
            self._graph = self._make(attention_mask)
        logits = self._graph(input_ids, position_ids)
        kept: Any = {CACHE_NAME: self._cache}
        return CausalLMOutputWithPast(logits=logits, **kept)

    def _make(self, mask: Tensor | None) -> DecodeGraph:
        left = self._max_length - self._cache.get_seq_length()
        past = None if mask is None else mask[:, :-1]  # it is of the token to come, too
        try:
            return DecodeGraph(self._model, self._cache, max(1, min(left, _MAX_ROOM)), past)
        except ValueError:
            if self._was_empty:  # what its layers are like is known since the prefill only
                self._cache.reset()
            raise

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()


def _arguments_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` that has called, by name.

    It keeps the streamer and the assistant from a `custom_generate` (Transformers 5.17 to 5.24).
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _check_mode(generation_config: GenerationConfig, assistant: Any) -> None:
    mode = generation_config.get_generation_mode(assistant)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"the generation mode is {mode.value!r}, and a graph steps token by token: choose "
            "greedy decoding or sampling (no num_beams, assistant_model, prompt_lookup_num_tokens "
            "and the like), or leave out custom_generate"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(
                f"{name} is on, and a captured step gives logits alone; leave out {name} or "
                "custom_generate"
            )


def _check_inputs(
    model: Any, generation_config: GenerationConfig, synced_gpus: bool, inputs: dict[str, Any]
) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose cross-attention cannot be "
            "captured; leave out custom_generate"
        )
    if synced_gpus:
        raise ValueError(
            "synced_gpus is on: the model is on several devices, and a CUDA graph is of one; "
            "leave out custom_generate"
        )
    cache = inputs.get(CACHE_NAME)
    if not generation_config.use_cache or not isinstance(cache, RotorQuantCache):
        raise ValueError(
            f"{CACHE_NAME} is of type {type(cache).__name__}, use_cache is "
            f"{generation_config.use_cache}; pass {CACHE_NAME}="
            "RotorQuantCache(config=model.config), with use_cache=True"
        )
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, and a captured step takes (batch, "
            "tokens); leave out custom_generate"
        )
    for name, value in inputs.items():
        if name not in _TAKEN and value is not None and value is not False:
            raise ValueError(
                f"the model gets {name}, which a captured step does not; leave out {name} or "
                "custom_generate"
            )
