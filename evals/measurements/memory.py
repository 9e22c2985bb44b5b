"""Memory of a cache: its bytes by part, and the peaks of a prefill and of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..caches.registry import CacheSpec
from ..failures import FailedError, Failure, failure_of, raise_if_fatal
from ..options import option
from ..probes.chunked import fill
from ..probes.footprint import footprint, peak_bytes, reachable_bytes
from ..probes.half_size import half_decoded_footprint, layer_shapes
from ..probes.integrity import NOTHING_COMPRESSED
from ..progress import steps
from ..subjects.models import LoadedModel
from .base import Measurement, one_by_one


@dataclass(frozen=True)
class MemoryOptions:
    """How `memory` is measured."""

    context: tuple[int, ...] = option((512, 1024, 2048), "prompt lengths, tokens", min=1)
    batch: tuple[int, ...] = option((1,), "rows of the batch", min=1)
    new_tokens: int = option(8, "tokens to decode after the prompt", min=1)


def random_prompt(loaded: LoadedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Random token ids (batch, tokens): memory and time do not depend on which they are."""
    generator = torch.Generator().manual_seed(seed)
    size = loaded.model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, size, (batch, tokens), generator=generator)
    return ids.to(loaded.device)


@torch.no_grad()
def decode(model: PreTrainedModel, token: Tensor, cache: Cache, steps: int) -> Tensor:
    """Feed a token (batch, 1) and then the likeliest after it, `steps` in all; the last one."""
    for _ in range(steps):
        token = fill(model, token, cache).argmax(-1, keepdim=True)
    return token


def measure(
    loaded: LoadedModel, spec: CacheSpec, options: MemoryOptions, seed: int = 0
) -> dict[str, Any]:
    """The memory of one cache at every batch and context, as plain values.

    Prefill peak: cache plus temporaries. Decode peak: cache growth plus temporaries of one step.
    Both are bytes relative to the memory already allocated: the weights, and for decoding the
    cache. `*_16bit` is what the cache takes of a 16-bit model, where the model measured is in
    float32.
    """
    points: list[dict[str, Any]] = []
    failures: list[Failure] = []
    places = [(batch, context) for batch in options.batch for context in options.context]
    for batch, context in steps(places, f"{spec.label}: size {{}} of {{}}"):
        place = {"batch": batch, "context": context}
        try:
            points.append(place | _point(loaded, spec, batch, context, options, seed))
        except Exception as error:
            failures.append(failure_of(error))
            points.append(place | {"error": failures[-1].reason})
            raise_if_fatal(failures[-1])
    if len(failures) == len(points):
        raise FailedError(failures[0])
    compressed = spec.is_baseline or any(point.get("packed_bits_per_number") for point in points)
    return {"points": points, "warnings": [] if compressed else [NOTHING_COMPRESSED]}


def _point(
    loaded: LoadedModel,
    spec: CacheSpec,
    batch: int,
    context: int,
    options: MemoryOptions,
    seed: int,
) -> dict[str, Any]:
    model, ids = loaded.model, random_prompt(loaded, batch, context, seed)
    # Tables, compiled kernels and workspaces are made once, not by every prompt.
    fill(model, ids[:, :32], loaded.new_cache(spec))
    cache = loaded.new_cache(spec)
    token = torch.zeros_like(ids[:, :1])
    devices = loaded.devices
    prefill = peak_bytes(lambda: token.copy_(fill(model, ids, cache).argmax(-1, True)), devices)
    decoding = peak_bytes(lambda: decode(model, token, cache, options.new_tokens), devices)
    counted, reachable = footprint(cache, loaded.dtype), reachable_bytes(cache)
    half = counted
    if model.dtype.itemsize != 2:
        make_cache = partial(loaded.new_cache, spec.as_stored(cache))
        del cache  # its memory goes before another is filled
        shapes = layer_shapes(model, ids[:1, :1])
        half = half_decoded_footprint(
            shapes, make_cache, context, options.new_tokens, batch, ids.device
        )
    return {
        "cache_bytes_16bit": half.total_bytes,
        "bits_per_number_16bit": half.bits_per_number,
        "packed_bits_per_number_16bit": half.packed_bits_per_number,
        "long_bits_per_number_16bit": half.long_bits_per_number,
        "cache_bytes": counted.total_bytes,
        "reachable_bytes": reachable,
        "bits_per_number": counted.bits_per_number,
        "packed_bits_per_number": counted.packed_bits_per_number,
        "long_bits_per_number": counted.long_bits_per_number,
        "peak_prefill_bytes": prefill,
        "peak_decode_bytes": decoding,
        "parts": counted.parts,
    }


MEMORY = Measurement(
    name="memory",
    text="bytes of a cache by part, and peaks of prefill and decoding, against context and batch",
    meaning="What compression saves: bytes of the cache, and peaks of the memory in use.",
    options=MemoryOptions,
    prepare=lambda loaded, options, seed: one_by_one(
        lambda spec: measure(loaded, spec, options, seed)
    ),
)
