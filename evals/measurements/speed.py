"""Speed of prefill and decoding against context length, all caches in one run."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..caches.registry import CacheSpec
from ..failures import Failure, failure_of, raise_if_fatal
from ..options import option
from ..probes.chunked import fill
from ..probes.footprint import elements_of
from ..probes.integrity import NOTHING_COMPRESSED
from ..progress import steps
from ..subjects.models import LoadedModel
from ..timing import Timing, timed
from .base import Measurement
from .memory import decode, random_prompt


@dataclass(frozen=True)
class SpeedOptions:
    """How `speed` is measured."""

    context: tuple[int, ...] = option((512, 1024, 2048), "prompt lengths, tokens", min=1)
    batch: tuple[int, ...] = option((1,), "rows of the batch", min=1)
    new_tokens: int = option(
        128,
        "tokens to decode after each prompt: a multiple of those after which a cache quantises "
        "again (32 for rotorquant, 128 for quanto and hqq), so that each is charged its share",
        min=1,
    )
    repeats: int = option(5, "times to prefill and decode with each cache", min=1)


def measure(
    loaded: LoadedModel, specs: Sequence[CacheSpec], options: SpeedOptions, seed: int = 0
) -> list[dict[str, Any] | Failure]:
    """The speed of every cache, side by side.

    In every repeat each cache in turn takes the prompt and decodes after it, so that a drift of
    the machine affects all alike; every other repeat takes them in reverse order. The first repeat
    warms up and is not counted. Figures are of the whole model, by the host's clock, until the
    device is done.

    Returns:
        For every cache its figures as plain values, or why there are none.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in specs]
    failures: list[list[Failure]] = [[] for _ in specs]
    compressed = [spec.is_baseline for spec in specs]
    places = [(batch, context) for batch in options.batch for context in options.context]
    for batch, context in steps(places, "size {} of {}"):
        prompt = random_prompt(loaded, batch, context, seed)
        place = {"batch": batch, "context": context}
        timed = _interleaved(loaded, specs, prompt, options)
        for i, samples in enumerate(timed):
            if isinstance(samples, Failure):
                raise_if_fatal(samples)
                failures[i].append(samples)
                found[i].append(place | {"error": samples.reason})
            else:
                compressed[i] |= any(sample.compressed for sample in samples)
                found[i].append(place | _point(batch, context, samples, options.new_tokens))
    return [
        failed[0]
        if len(failed) == len(points)
        else {"points": points, "warnings": _warnings(spec, options, read)}
        for spec, points, failed, read in zip(specs, found, failures, compressed, strict=True)
    ]


def _warnings(spec: CacheSpec, options: SpeedOptions, compressed: bool) -> list[str]:
    found = [] if compressed else [NOTHING_COMPRESSED]
    if options.new_tokens % spec.period:
        found.append(
            f"new_tokens is {options.new_tokens}, not a multiple of the {spec.period} tokens after "
            f"which {spec.label} quantises again, so the cost of quantising is over- or "
            "under-counted"
        )
    return found


class _Sample(NamedTuple):
    """Seconds of a prefill, and of a decoding step; whether anything was quantised."""

    prefill: float
    step: float
    compressed: bool


def _interleaved(
    loaded: LoadedModel, specs: Sequence[CacheSpec], prompt: torch.Tensor, options: SpeedOptions
) -> list[list[_Sample] | Failure]:
    """Samples of every cache, or why there are none."""
    samples: list[list[_Sample] | Failure] = [[] for _ in specs]
    for repeat in steps(range(options.repeats + 1), "round {} of {}"):
        order = range(len(specs)) if repeat % 2 else range(len(specs) - 1, -1, -1)
        for i in order:
            kept = samples[i]
            if isinstance(kept, Failure):
                continue
            try:
                sample = _sample(loaded, specs[i], prompt, options.new_tokens)
            except Exception as error:
                samples[i] = failure_of(error)
                continue
            if repeat:
                kept.append(sample)
    return samples


def _sample(loaded: LoadedModel, spec: CacheSpec, prompt: torch.Tensor, new_tokens: int) -> _Sample:
    model, cache = loaded.model, loaded.new_cache(spec)
    gc.collect()

    def prefill() -> torch.Tensor:
        return fill(model, prompt, cache).argmax(-1, keepdim=True)

    first, token = timed(prefill, prompt.device)
    # The step after a prompt sets decoding up (a ring, a first quantised block): not a usual one.
    token = decode(model, token, cache, 1)
    rest, _ = timed(lambda: decode(model, token, cache, new_tokens), prompt.device)
    return _Sample(first, rest / new_tokens, elements_of(cache).quantised > 0)


def _point(batch: int, context: int, samples: list[_Sample], new_tokens: int) -> dict[str, Any]:
    prefill = Timing.of([batch * context / sample.prefill for sample in samples])
    step = Timing.of([batch / sample.step for sample in samples])
    return {
        "prefill_tokens_per_s": prefill.median,
        "prefill_p10": prefill.p10,
        "prefill_p90": prefill.p90,
        "decode_tokens_per_s": step.median,
        "decode_p10": step.p10,
        "decode_p90": step.p90,
        "decode_ms": 1e3 * batch / step.median,
        "new_tokens": new_tokens,
        "samples": len(samples),
    }


SPEED = Measurement(
    name="speed",
    text="prefill and decoding speed of the whole model against context, caches side by side",
    meaning="Tokens per second of the whole model; comparable within one run only.",
    options=SpeedOptions,
    prepare=lambda loaded, options, seed: lambda specs: measure(loaded, specs, options, seed),
    together=True,
)
