"""The bytes of any cache, counted on its real tensors, and the peak of the memory in use."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..caches.base import Elements
from ..caches.registry import kind_of
from ..caches.tensors import by_storage, tensors_in


@dataclass(frozen=True)
class Footprint:
    """What a cache takes. Elements are those of keys and values.

    Attributes:
        parts: the bytes by part; the kind of the cache names them. Each storage counts once.
        elements: that the cache stands for, and those of them that are stored quantised.
        full_bits: of an element in full precision.
        long_bits_per_number: bits that an element of a long text's next tokens takes: codes and
            scales, and full precision in layers that are never quantised. Tables, statistics and
            the recent window do not grow with the text. None if nothing is quantised.
    """

    parts: dict[str, int]
    elements: Elements
    full_bits: int
    long_bits_per_number: float | None

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def bits_per_number(self) -> float:
        """All bits over all elements (named as in recorded rows, like the next)."""
        return 8 * self.total_bytes / max(self.elements.held, 1)

    @property
    def packed_bits_per_number(self) -> float | None:
        """The same without the full-precision tokens.

        Scales, statistics, tables and spare capacity are counted, spread over the tokens there
        are. None if nothing is quantised.
        """
        held, quantised = self.elements
        if not quantised:
            return None
        return (8 * self.total_bytes - (held - quantised) * self.full_bits) / quantised


def footprint(cache: Cache, dtype: torch.dtype) -> Footprint:
    """Count a cache of a model of some dtype."""
    parts = {name: size for name, size in kind_of(cache).parts(cache).items() if size}
    full_bits = 8 * dtype.itemsize
    return Footprint(parts, elements_of(cache), full_bits, _long_bits(cache, full_bits))


def _long_bits(cache: Cache, full_bits: int) -> float | None:
    """As `Footprint.long_bits_per_number`: of the layers that grow, or of all if none does."""
    kind = kind_of(cache)
    counts = {id(layer): kind.elements(layer) for layer in cache.layers}
    if not any(count.quantised for count in counts.values()):
        return None
    growing = [
        layer
        for layer in cache.layers
        if (counts[id(layer)].quantised or isinstance(layer, DynamicLayer))
        and not getattr(layer, "is_sliding", False)
    ]
    bits = elements = 0.0
    for layer in growing or cache.layers:
        held, quantised = counts[id(layer)]
        tensors = tensors_in(kind.quantised_states(layer), modules=False)
        coded = 8 * sum(x.numel() * x.element_size() for x in tensors)
        bits += held * (coded / quantised if quantised else full_bits)
        elements += held
    return bits / elements if elements else None


def elements_of(cache: Cache) -> Elements:
    """How many elements a cache stands for."""
    kind = kind_of(cache)
    counts = [kind.elements(layer) for layer in cache.layers]
    return Elements(sum(x.held for x in counts), sum(x.quantised for x in counts))


def quantised_tokens(cache: Cache) -> tuple[int, int]:
    """The first token that is stored quantised, and the one after the last.

    In all compressed layers of full attention; where there are none, in all that slide.
    """
    kind = kind_of(cache)
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for layer in cache.layers:
        if kind.elements(layer).quantised:
            spans[bool(getattr(layer, "is_sliding", False))].append(kind.span(layer))
    chosen = spans[False] or spans[True] or [(0, 0)]
    return max(first for first, _ in chosen), min(last for _, last in chosen)


def reachable_bytes(cache: Cache) -> int:
    """Bytes of all storages that can be reached from a cache, whatever it says of itself."""
    return sum(x.untyped_storage().nbytes() for x in by_storage(tensors_in(cache)))


def _synchronize(devices: Collection[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], devices: Collection[torch.device]) -> int:
    """How far the memory in use rises above where it stands, while `work` runs.

    On GPUs by CUDA's allocator, summed over them. On a CPU by the sum of all that PyTorch's
    allocator hands out less what it takes back, which the profiler records.
    """
    gpus = [device for device in devices if device.type == "cuda"]  # others hold what is offloaded
    if gpus:
        _synchronize(gpus)
        before = {device: torch.cuda.memory_allocated(device) for device in gpus}
        for device in gpus:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        _synchronize(gpus)
        return sum(torch.cuda.max_memory_allocated(device) - before[device] for device in gpus)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        work()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest
