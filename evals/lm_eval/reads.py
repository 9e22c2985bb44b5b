"""How much of what the requests read was read compressed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import Cache, LogitsProcessor

from rotorquant_hf import RotorQuantConfig

from ..caches.registry import CacheSpec
from ..probes.chunked import next_pass
from ..probes.footprint import elements_of


class Pass(NamedTuple):
    """One forward pass over the tokens start..end-1 of a batch; counts are those of one row.

    Attributes:
        start, end: tokens.
        packed: key and value elements that it read quantised: those quantised before it.
        held: all elements that it read, its own included.
    """

    start: int
    end: int
    packed: int
    held: int


@dataclass
class Reads:
    """Key and value elements read by the tokens whose logits count, without padding.

    Attributes:
        packed: read quantised.
        held: read in all.
    """

    packed: int = 0
    held: int = 0

    @property
    def share(self) -> float | None:
        """Share of what was read that was read quantised; None if nothing was read."""
        return self.packed / self.held if self.held else None

    def add(self, packed: int, held: int) -> None:
        """Count some elements."""
        self.packed += packed
        self.held += held

    def score(self, passes: list[Pass], first: int, last: int) -> None:
        """Count what the tokens first..last-1 of one row read."""
        for step in passes:
            tokens = min(last, step.end) - max(first, step.start)
            if tokens > 0:
                self.add(tokens * step.packed, tokens * step.held)


class DecodingReads(LogitsProcessor):
    """Counts what every step of `generate` reads; leaves the scores unchanged.

    The first step is the prompt's own pass, which reads in full precision.
    """

    def __init__(self, cache: Cache, reads: Reads) -> None:
        self.cache, self.reads, self.before = cache, reads, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Count one step of all rows and return `scores` unchanged."""
        held, packed = elements_of(self.cache)
        self.reads.add(self.before, held)
        self.before = packed
        return scores


def tokens_before_codes(cache: Cache, chunk: int) -> int:
    """Tokens that an empty cache takes before a later token reads anything quantised.

    A cache that does not tell when it quantises is taken to do so with its first pass.
    """
    first = next_pass(cache, sys.maxsize, sys.maxsize)
    return first if first < sys.maxsize else chunk


def too_short(requests: str, longest: Mapping[str, int], needed: int, spec: CacheSpec) -> str:
    """The warning, before any work, for requests too short to read anything quantised.

    Args:
        requests: their kind, as lm-eval names it.
        longest: tokens of the longest request of each task, generated ones included.
        needed: tokens after which this cache is read quantised.
        spec: the cache.
    """
    tasks = ", ".join(f"{task}: {tokens} tokens" for task, tokens in longest.items())
    options, parts, remedy = spec.options, "", _REMEDY
    if isinstance(options, RotorQuantConfig):
        window, block = options.residual_length, options.block_length
        statistics = options.statistics_length
        kept = f"residual_length {window} + block_length {block}"
        if statistics > window + block:
            kept = f"statistics_length {statistics}"
        parts = f" (num_sink_tokens {options.num_sink_tokens} + {kept})"
        room = (
            min(longest.values()) - options.num_sink_tokens - block
        )  # for a window to read behind
        shorter = min(window, room // 2)
        also = f",statistics_length={shorter + block}" if statistics > shorter + block else ""
        remedy = _remedy(f"{shorter}{also}") if room > 1 else f"{_LONGER}."
    return (
        f"these {requests} requests are too short to read anything compressed (the longest of "
        f"{tasks}): {spec.label} keeps the first {needed} tokens{parts} in full precision, so the "
        f"scores will say nothing about it. {remedy}"
    )


def _remedy(window: str) -> str:
    return f"{_LONGER}, or keep fewer tokens in full precision (such as residual_length={window})"


_LONGER = "Make prompts longer with num_fewshot"
_REMEDY = _remedy("32, and statistics_length=64 if the cache takes it")


def nothing_compressed(requests: str, tasks: str, cache: str) -> str:
    """The warning for requests that read no compressed key or value."""
    why = (
        "texts this short stay in the cache's full-precision window (generate reads a prompt in "
        "full precision: only decoding reads codes)"
        if requests == "generate_until"
        else "prompts this short stay in the cache's full-precision window"
    )
    return (
        f"nothing was read compressed: {requests} requests ({tasks}) scored without one quantised "
        f"key or value, so these figures say nothing about {cache}; {why}. {_REMEDY}"
    )
