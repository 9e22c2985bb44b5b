"""A model's decode step, captured once in a CUDA graph and replayed for every token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rotorquant_hf.attention.registered import single_tokens_without_masks
from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.capturable import check_cache, check_model
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.passing import cache_argument

# Steps run as they are before the capture, so that every kernel is compiled and every library
# has its workspace.
_WARM_UP = 2


class DecodeGraph:
    """Decodes one token at a time without the cost of launching a model's kernels one by one.

        cache = RotorQuantCache(config=model.config)
        with torch.no_grad():
            logits = model(prompt, past_key_values=cache).logits
        with DecodeGraph(model, cache) as graph:
            for _ in range(100):
                logits = graph(logits[:, -1:].argmax(-1))

    The cache is the same before, between and after: it can be used otherwise at any time, and
    the step is captured anew where that moved its memory. Steps run as usual until every layer
    holds quantised tokens, and for two steps more.

    Args:
        model: a causal language model on a CUDA device, with sdpa or rotorquant attention.
        cache: what the text so far was fed through; compressed layers only.
        room: tokens that memory is taken for at each capture.

    Raises:
        ValueError: if the model is not on a CUDA device, or on several, has chunked or other
            attention, or a RoPE that changes with the length of the text ("dynamic",
            "longrope"); if the cache is empty, offloaded or looks for NaN (`check_finite`); if
            a layer of it is not compressed (such layers concatenate, which no graph can
            replay), has recurrent states beside its attention, is on another device, is not
            decoded by the kernels, or has a sliding window that may hold no quantised token; or if
            `room` is less than 1.
    """

    def __init__(self, model: Any, cache: RotorQuantCache, room: int = 1024) -> None:
        if room < 1:
            raise ValueError(f"room is {room}; choose at least 1")
        check_model(model)
        check_cache(model, cache)
        if not cache.get_seq_length():
            raise ValueError("the cache is empty; feed the prompt through the model first")
        self.model, self.cache, self.room = model, cache, room
        self._argument = cache_argument(model, cache)
        self._layers = cast(list[RotorQuantLayer], list(cache.layers))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: list[tuple[Any, ...]] = []
        self._warm = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Feed one token per row.

        Args:
            input_ids: (batch, 1).
            position_ids: (batch, 1), by default the number of tokens so far for every row.

        Returns:
            Logits, (batch, 1, vocabulary).

        Raises:
            ValueError: if the arguments are not (batch, 1) of the cache's batch.
        """
        shape = (self._layers[0].batch_size, 1)
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.cache.get_seq_length())
        for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)):
            if ids.shape != shape:
                raise ValueError(f"{name} has shape {tuple(ids.shape)}; pass {shape}")
        if not self._fits():
            self._prepare()
        with torch.no_grad():
            if self._warm < _WARM_UP:
                self._warm += self._is_prepared()
                return self._step(input_ids, position_ids)
            if self._graph is None:
                # This runs the step on the host, which counts the token, but not on the device.
                self._capture(input_ids, position_ids)
                self._input_ids.copy_(input_ids)
                self._position_ids.copy_(position_ids)
            else:
                self._input_ids.copy_(input_ids)
                self._position_ids.copy_(position_ids)
                for layer in self._layers:
                    layer.follow_replay(1)
            assert self._graph is not None
            self._graph.replay()
            return self._logits.clone()

    def _step(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, **self._argument).logits

    def _capture(self, input_ids: Tensor, position_ids: Tensor) -> None:
        with torch.inference_mode(False):  # also written to outside of it
            self._input_ids, self._position_ids = input_ids.clone(), position_ids.clone()
        graph = torch.cuda.CUDAGraph()
        before = [x.ring.on_host() for x in self._layers if x.ring is not None]
        length = self.cache.get_seq_length()
        for layer in self._layers:
            layer.prepare_step(1)
        device = input_ids.device
        # A stream of its own: that of `torch.cuda.graph` is on the device that was current first.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            with (
                single_tokens_without_masks(),
                torch.cuda.device_of(input_ids),
                torch.cuda.graph(graph, stream=stream),
            ):
                self._logits = self._step(self._input_ids, self._position_ids)
        except BaseException:
            for layer, lengths in zip(self._layers, before, strict=True):
                if layer.get_seq_length() > length:
                    layer.forget_step(1, lengths)
            raise
        self._graph = graph
        # Kept, so that no other tensor can come to lie where the graph writes.
        self._memory = [_memory(x) for x in self._layers]

    def _is_prepared(self) -> bool:
        return all(x.ring is not None and x.ring.captured for x in self._layers)

    def _fits(self) -> bool:
        """Whether the next block fits, and the layers still hold the memory that was captured."""
        block = self.cache.settings.block_length
        if not self._is_prepared() or any(x.store.room < block for x in self._layers):
            return False
        return self._graph is None or all(
            a is b
            for layer, captured in zip(self._layers, self._memory, strict=True)
            for a, b in zip(_memory(layer), captured, strict=True)
        )

    def _prepare(self) -> None:
        """Take memory and fix it, in the layers that can decode on the device alone."""
        self._graph, self._memory, self._warm = None, [], 0
        for layer in self._layers:
            if layer.ring is not None:
                layer.store.pin(False)
                layer.store.reserve(self.room + self.cache.settings.block_length)
                layer.store.pin(True)
                layer.ring.captured = True

    def close(self) -> None:
        """Forget the graph; the cache gives memory back again as it shrinks."""
        self._graph, self._memory = None, []
        for layer in self._layers:
            if layer.is_initialized:
                layer.store.pin(False)
            if layer.ring is not None:
                layer.ring.captured = False

    def __enter__(self) -> DecodeGraph:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _memory(layer: RotorQuantLayer) -> tuple[Any, ...]:
    """What a captured step of a layer refers to."""
    rows = [x for side in layer.store.sides for x in side.buffers.tensors.values()]
    return layer.ring, layer.sinks, *rows
