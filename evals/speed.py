"""Speed of prefill and decoding against context length, all caches in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evals.caches import CacheSpec
from evals.failures import Failure, failure_of
from evals.feeding import fill
from evals.memory import decode, random_prompt
from evals.models import Subject
from evals.options import option
from evals.timing import Timing


@dataclass(frozen=True)
class SpeedOptions:
    """How `speed` is measured."""

    context: tuple[int, ...] = option((512, 1024, 2048), "prompt lengths, tokens", least=1)
    batch: tuple[int, ...] = option((1,), "rows of the batch", least=1)
    new_tokens: int = option(16, "tokens to decode after each prompt", least=1)
    repeats: int = option(5, "times to prefill and decode with each cache", least=1)


def measure(
    subject: Subject, specs: Sequence[CacheSpec], options: SpeedOptions, seed: int = 0
) -> list[dict[str, Any] | Failure]:
    """The speed of every cache, side by side.

    In every repeat each cache in turn takes the prompt and decodes after it, so that a drift of
    the machine meets all alike; the order turns round from one repeat to the next. The first
    repeat warms up and is not counted. Figures are whole-model, on the host's clock, up to the
    device's last result.

    Returns:
        For every cache its figures as plain values, or why there are none.
    """
    results: list[Any] = [{"points": [], "warnings": []} for _ in specs]
    for batch in options.batch:
        for context in options.context:
            prompt = random_prompt(subject, batch, context, seed)
            timed = _interleaved(subject, specs, prompt, options, results)
            for i, samples in timed.items():
                results[i]["points"].append(_point(batch, context, samples, options.new_tokens))
    return results


def _interleaved(
    subject: Subject,
    specs: Sequence[CacheSpec],
    prompt: torch.Tensor,
    options: SpeedOptions,
    results: list[Any],
) -> dict[int, list[tuple[float, float]]]:
    """Seconds of prefill and of a decoding step of every cache; failures go into `results`."""
    samples: dict[int, list[tuple[float, float]]] = {
        i: [] for i, result in enumerate(results) if isinstance(result, dict)
    }
    for repeat in range(options.repeats + 1):
        order = sorted(samples, reverse=bool(repeat % 2))
        for i in order:
            try:
                sample = _sample(subject, specs[i], prompt, options.new_tokens)
            except Exception as error:
                results[i] = failure_of(error)
                del samples[i]
                continue
            if repeat:
                samples[i].append(sample)
    return samples


def _sample(
    subject: Subject, spec: CacheSpec, prompt: torch.Tensor, new_tokens: int
) -> tuple[float, float]:
    model, cache = subject.model, subject.new_cache(spec)
    gc.collect()

    def prefill() -> torch.Tensor:
        return fill(model, prompt, cache).argmax(-1, keepdim=True)

    first, token = _timed(prefill, prompt.device)
    # The step after a prompt sets decoding up (a ring, a first quantised block): not a usual one.
    token = decode(model, token, cache, 1)
    rest, _ = _timed(lambda: decode(model, token, cache, new_tokens), prompt.device)
    return first, rest / new_tokens


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _synchronize(device)
    begin = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - begin, result


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _point(
    batch: int, context: int, samples: list[tuple[float, float]], new_tokens: int
) -> dict[str, Any]:
    prefill = Timing.of([batch * context / first for first, _ in samples])
    step = Timing.of([batch / each for _, each in samples])
    return {
        "batch": batch,
        "context": context,
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
