"""The bytes of any cache, counted on its real tensors, and the peak of the memory in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, cache_utils
from transformers.cache_utils import QuantizedLayer

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.layers.full import RotorQuantLayer

# In later versions of Transformers fp8 shares this base with the others.
_BaseQuantizedLayer = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)


@dataclass(frozen=True)
class Footprint:
    """What a cache takes.

    Attributes:
        total_bytes: all storages that can be reached from the cache, each counted once.
        parts: the bytes by part; a RotorQuantCache names its own.
        numbers: key and value numbers that it stands for.
        packed_numbers: those of them that are stored quantised.
        exact_bits: of a number that is not.
    """

    total_bytes: int
    parts: dict[str, int]
    numbers: int
    packed_numbers: int
    exact_bits: int

    @property
    def bits_per_number(self) -> float:
        """All bytes over all numbers."""
        return 8 * self.total_bytes / max(self.numbers, 1)

    @property
    def packed_bits_per_number(self) -> float | None:
        """The same without the exact tokens: what long texts come near to. None if none is packed.

        Scales, statistics, tables and spare capacity are counted.
        """
        if not self.packed_numbers:
            return None
        exact = (self.numbers - self.packed_numbers) * self.exact_bits
        return (8 * self.total_bytes - exact) / self.packed_numbers


def footprint(cache: Cache, dtype: torch.dtype) -> Footprint:
    """Count a cache of a model of some dtype."""
    total, packed = packed_numbers(cache)
    if isinstance(cache, RotorQuantCache):
        report = cache.memory()
        parts = {name: size for name, size in report.parts.items() if size}
        return Footprint(report.total_bytes, parts, total, packed, 8 * dtype.itemsize)
    sizes = {"codes": 0, "scales": 0, "exact": 0}
    coded = {id(x) for layer in cache.layers for x in tensors_in(_quantised(layer))}
    for tensor in _storages(tensors_in(cache.layers)).values():
        part = "exact" if id(tensor) not in coded else "codes" if is_code(tensor) else "scales"
        sizes[part] += tensor.untyped_storage().nbytes()
    parts = {name: size for name, size in sizes.items() if size}
    return Footprint(sum(sizes.values()), parts, total, packed, 8 * dtype.itemsize)


def _numbers(layer: Any) -> tuple[int, int]:
    """How many numbers a layer stands for: in all, and quantised."""
    if isinstance(layer, RotorQuantLayer):
        return layer.numbers()
    if isinstance(layer, _BaseQuantizedLayer):
        packed = sum(map(_logical, _quantised(layer)))
        if not isinstance(layer, QuantizedLayer):  # fp8 has no exact window
            return packed, packed
        return packed + sum(x.numel() for x in (layer.keys, layer.values) if x is not None), packed
    floats = [x for x in tensors_in(layer) if x.is_floating_point()]
    return sum(x.numel() for x in floats), 0


def _logical(states: Any) -> int:
    """Numbers that the quantised states of a `QuantizedCache` layer stand for."""
    if states is None:
        return 0
    if isinstance(states, tuple):
        tensor, meta = states
        return math.prod(meta["shape"]) if isinstance(meta, dict) else tensor.numel()
    return states.numel()


def _quantised(layer: Any) -> tuple[Any, Any]:
    """The quantised keys and values of a layer of `QuantizedCache`; of others nothing."""
    if not isinstance(layer, _BaseQuantizedLayer):
        return None, None
    return getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)


def is_code(tensor: Tensor) -> bool:
    """Whether a tensor of a quantised state holds codes: integers (HQQ's of 3 bits are 32 bits
    wide), or floating-point numbers of 8 bits; not scales.
    """
    return tensor.dtype != torch.bool and (
        not tensor.is_floating_point() or tensor.dtype.itemsize == 1
    )


def codes_of(layer: Any) -> dict[str, list[Tensor]]:
    """The tensors that hold a layer's codes, in use: of its keys, and of its values.

    Of a layer of an unknown kind all tensors of one byte an entry, tables apart.
    """
    if isinstance(layer, RotorQuantLayer):
        if not layer.is_initialized or not len(layer.store):
            return {}
        spans = {"keys": layer.store.keys.span(), "values": layer.store.values.span()}
        found = {part: list(span.rows.values()) for part, span in spans.items()}
    elif isinstance(layer, _BaseQuantizedLayer):
        parts = zip(("keys", "values"), _quantised(layer), strict=True)
        found = {part: list(tensors_in(states)) for part, states in parts}
    else:
        tensors = tensors_in(layer, modules=False)
        found = {"states": [x for x in tensors if x.dtype.itemsize == 1]}
    codes = {part: [x for x in xs if is_code(x) and x.numel()] for part, xs in found.items()}
    return {part: xs for part, xs in codes.items() if xs}


def packed_numbers(cache: Cache) -> tuple[int, int]:
    """How many numbers a cache holds: in all, and quantised."""
    counts = [_numbers(layer) for layer in cache.layers]
    return sum(n for n, _ in counts), sum(p for _, p in counts)


def packed_tokens(cache: Cache) -> tuple[int, int]:
    """The first token that is stored quantised, and the one after the last.

    In all compressed layers of full attention; where there are none, in all that slide.
    """
    spans: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for layer in cache.layers:
        numbers, packed = _numbers(layer)
        if packed:
            spans[bool(layer.is_sliding)].append(_span(layer, numbers, packed))
    chosen = spans[False] or spans[True] or [(0, 0)]
    return max(first for first, _ in chosen), min(last for _, last in chosen)


def _span(layer: Any, numbers: int, packed: int) -> tuple[int, int]:
    if isinstance(layer, RotorQuantLayer):
        last = layer.get_seq_length() - layer.recent_length
        return last - len(layer.store), last
    return 0, layer.get_seq_length() * packed // numbers


_LEAVES = (str, bytes, int, float, complex, type, torch.dtype, torch.device, torch.Generator)


def tensors_in(root: Any, modules: bool = True) -> Iterator[Tensor]:
    """Every plain tensor that can be reached from an object through its attributes.

    Wrapper tensors, such as quanto's, are opened. Functions and classes are not entered.

    Args:
        root: the object.
        modules: enter `nn.Module`s too: the tables of quantisers, which caches share.
    """
    seen: set[int] = set()
    found: list[Any] = [root]
    while found:
        x = found.pop()
        if x is None or isinstance(x, _LEAVES) or (callable(x) and not hasattr(x, "parameters")):
            continue
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.nn.Module) and not modules:
            continue
        if isinstance(x, Tensor):
            if is_traceable_wrapper_subclass(x):
                names, _ = x.__tensor_flatten__()
                found += [getattr(x, name) for name in names]
            else:
                yield x
        elif isinstance(x, dict):
            found += x.values()
        elif isinstance(x, list | tuple | set | frozenset):
            found += x
        elif hasattr(x, "__dict__"):
            found += vars(x).values()
            if isinstance(x, torch.nn.Module):
                found += [*x.buffers(), *x.parameters()]
        for name in getattr(type(x), "__slots__", ()):
            found.append(getattr(x, name, None))


def _storages(tensors: Iterator[Tensor]) -> dict[tuple[str, int], Tensor]:
    """One tensor for every storage."""
    return {(str(x.device), x.untyped_storage().data_ptr()): x for x in tensors if x.numel()}


def reachable_bytes(cache: Cache) -> int:
    """Bytes of all storages that can be reached from a cache, whatever it says of itself."""
    return sum(x.untyped_storage().nbytes() for x in _storages(tensors_in(cache)).values())


def _synchronize(devices: Collection[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], devices: Collection[torch.device]) -> int:
    """How far the memory in use rises above where it stands, while `work` runs.

    On GPUs by CUDA's allocator, summed over them. On a CPU by the sum of all that PyTorch's
    allocator hands out less what it takes back, which the profiler records.
    """
    if any(device.type == "cuda" for device in devices):
        _synchronize(devices)
        before = {device: torch.cuda.memory_allocated(device) for device in devices}
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        _synchronize(devices)
        return sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        work()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest
