"""A model's decode step, captured once in a CUDA graph and replayed for every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.capturable import check_cache, check_model, is_padded
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.maskless import lengthened, without_mask
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
        attention_mask: (batch, tokens so far), 0 at the padding of rows that are shorter; None if
            there is none. Later tokens are seen by all.

    Raises:
        ValueError: if the model is not on a CUDA device, or on several, has chunked or other
            attention, or a RoPE that changes with the length of the text ("dynamic",
            "longrope"); if the cache is empty, offloaded or looks for NaN (`check_finite`); if
            a layer of it is not compressed (such layers concatenate, which no graph can
            replay), has recurrent states beside its attention, is on another device, is not
            decoded by the kernels, or has a sliding window that may hold no quantised token, or
            over padded rows; if the model has sliding windows and the cache was made without its
            config; if `attention_mask` is not (batch, tokens so far); or if `room` is less than 1.
    """

    def __init__(
        self,
        model: Any,
        cache: RotorQuantCache,
        room: int = 1024,
        attention_mask: Tensor | None = None,
    ) -> None:
        if room < 1:
            raise ValueError(f"room is {room}; choose at least 1")
        if not is_padded(attention_mask):
            attention_mask = None
        check_model(model)
        check_cache(model, cache, padded=attention_mask is not None)
        if not cache.get_seq_length():
            raise ValueError("the cache is empty; feed the prompt through the model first")
        self.model, self.cache, self.room = model, cache, room
        self._argument = cache_argument(model, cache)
        self._layers = cast(list[RotorQuantLayer], list(cache.layers))
        held = self._layers[0].batch_size, cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != held:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; pass {held}, the mask of "
                "the text that the cache holds"
            )
        self._mask: Tensor | None = None
        if attention_mask is not None:
            self._mask = attention_mask.to(self._layers[0].device, torch.bool)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: list[tuple[Any, ...]] = []
        self._paddings: list[Tensor] = []
        self._warm = 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Feed one token per row.

        Args:
            input_ids: (batch, 1).
            position_ids: (batch, 1), by default the number of tokens so far of every row, without
                its padding.

        Returns:
            Logits, (batch, 1, vocabulary).

        Raises:
            ValueError: if the arguments are not (batch, 1) of the cache's batch.
        """
        shape = (self._layers[0].batch_size, 1)
        for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)):
            if ids is not None and ids.shape != shape:
                raise ValueError(f"{name} has shape {tuple(ids.shape)}; pass {shape}")
        if self._mask is not None:  # the cache may have been cropped
            self._mask = self._mask[:, : self.cache.get_seq_length()]
        if position_ids is None:
            position_ids = self._positions(input_ids)
        if not self._fits():
            self._prepare()
        with torch.no_grad():
            if self._warm < _WARM_UP:
                return self._warm_up(input_ids, position_ids)
            for layer in self._layers:  # all, before any counts the token: one may fail
                layer.prepare_step(1)
            with self._forgetting_a_failed_step():
                if self._graph is None:
                    # This runs the step on the host, which counts the token, but not on the device.
                    self._capture(input_ids, position_ids)
                else:
                    self._input_ids.copy_(input_ids)
                    self._position_ids.copy_(position_ids)
                    for layer in self._layers:
                        layer.follow_replay(1)
                assert self._graph is not None
                self._graph.replay()
            return self._logits.clone()

    def _warm_up(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """A step as it is: once the layers are prepared, with the kernels that are captured."""
        if not self._is_prepared():
            return self._step(input_ids, position_ids, self._mask_of_a_step())
        with without_mask(self._layers, self._mask):
            logits = self._step(input_ids, position_ids, None)
        self._warm += 1
        return logits

    def _step(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **self._argument,
        ).logits

    def _positions(self, input_ids: Tensor) -> Tensor:
        """Those of the next token, (batch, 1)."""
        tokens = torch.full_like(input_ids, self.cache.get_seq_length())
        if self._mask is None:
            return tokens
        return tokens - (~self._mask).sum(dim=1, keepdim=True)

    def _mask_of_a_step(self) -> Tensor | None:
        """The mask of the cache's tokens and one more; None if there is no padding."""
        if self._mask is None:
            return None
        return lengthened(self._mask, self.cache.get_seq_length() + 1)

    def _capture(self, input_ids: Tensor, position_ids: Tensor) -> None:
        with torch.inference_mode(False):  # also written to outside of it
            self._input_ids, self._position_ids = input_ids.clone(), position_ids.clone()
        graph = torch.cuda.CUDAGraph()
        with (
            without_mask(self._layers, self._mask) as self._paddings,
            _capturing(graph, input_ids.device),
        ):
            self._logits = self._step(self._input_ids, self._position_ids, None)
        self._graph = graph
        # Kept, so that no other tensor can come to lie where the graph writes.
        self._memory = [_memory(x) for x in self._layers]

    @contextmanager
    def _forgetting_a_failed_step(self) -> Iterator[None]:
        """Let no layer count the token of a step that the device may not have taken."""
        before = [x.ring.on_host() for x in self._layers if x.ring is not None]
        length = self.cache.get_seq_length()
        try:
            yield
        except BaseException:
            for layer, lengths in zip(self._layers, before, strict=True):
                if layer.get_seq_length() > length:
                    layer.forget_step(1, lengths)
            raise

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
        self._graph, self._memory, self._paddings, self._warm = None, [], [], 0
        for layer in self._layers:
            if layer.ring is not None:
                layer.store.pin(False)
                layer.store.reserve(self.room + self.cache.settings.block_length)
                layer.store.pin(True)
                layer.ring.captured = True

    def close(self) -> None:
        """Forget the graph; the cache gives memory back again as it shrinks."""
        self._graph, self._memory, self._paddings = None, [], []
        for layer in self._layers:
            if layer.is_initialized:
                layer.store.pin(False)
            if layer.ring is not None:
                layer.ring.captured = False

    def __enter__(self) -> DecodeGraph:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Capture what is done within in a graph on a device."""
    former = stream = None
    if device.type == "cuda":
        # If the end of a capture fails, `torch.cuda.graph` leaves its stream current; this outer
        # context sets the former one again.
        former = torch.cuda.current_stream(device)
        # By default it takes a stream of the device that was current when it was first used.
        stream = torch.cuda.Stream(device)
    cached = torch.is_autocast_cache_enabled()
    # Autocast frees the weights that it has cast when it ends; the graph would go on to read them.
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.cuda.stream(former),
            # Other threads may take memory in the meantime.
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _memory(layer: RotorQuantLayer) -> tuple[Any, ...]:
    """What a captured step of a layer refers to."""
    rows = [x for side in layer.store.sides for x in side.buffers.tensors.values()]
    return layer.ring, layer.sinks, *rows
