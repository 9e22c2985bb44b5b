"""Every measurement that a sweep can make, under one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..caches.registry import CacheSpec
from ..failures import Failure, failure_of
from ..subjects.models import Subject
from . import memory, speed
from .agreement import AgreementMeasurement, AgreementOptions
from .lm_eval import LmEvalOptions
from .lm_eval import measure as lm_eval_scores
from .memory import MemoryOptions
from .needle import NeedleMeasurement, NeedleOptions
from .perplexity import PerplexityMeasurement, PerplexityOptions
from .speed import SpeedOptions

Run = Callable[[Sequence[CacheSpec]], list[dict[str, Any] | Failure]]
"""Measures caches; for each its figures as plain values, or why there are none."""


@dataclass(frozen=True)
class Measurement:
    """A measurement.

    Attributes:
        text: what it tells.
        options: the class of its options.
        prepare: makes what measures from a model, options and seed; it keeps what all caches
            share, such as the baseline's logits.
        together: whether all caches are measured in one run, side by side.
    """

    text: str
    options: type
    prepare: Callable[[Subject, Any, int], Run]
    together: bool = False


def _one_by_one(measure: Callable[[CacheSpec], dict[str, Any]]) -> Run:
    def run(specs: Sequence[CacheSpec]) -> list[dict[str, Any] | Failure]:
        results: list[dict[str, Any] | Failure] = []
        for spec in specs:
            try:
                results.append(measure(spec))
            except Exception as error:
                results.append(failure_of(error))
        return results

    return run


def _perplexity(subject: Subject, options: PerplexityOptions, seed: int) -> Run:
    return _one_by_one(PerplexityMeasurement(subject, options).run)


def _memory(subject: Subject, options: MemoryOptions, seed: int) -> Run:
    return _one_by_one(lambda spec: memory.measure(subject, spec, options, seed))


def _speed(subject: Subject, options: SpeedOptions, seed: int) -> Run:
    return lambda specs: speed.measure(subject, specs, options, seed)


def _needle(subject: Subject, options: NeedleOptions, seed: int) -> Run:
    return _one_by_one(NeedleMeasurement(subject, options, seed).run)


def _agreement(subject: Subject, options: AgreementOptions, seed: int) -> Run:
    return _one_by_one(AgreementMeasurement(subject, options, seed).run)


def _lm_eval(subject: Subject, options: LmEvalOptions, seed: int) -> Run:
    return _one_by_one(lambda spec: lm_eval_scores(subject, spec, options, seed))


MEASUREMENTS: dict[str, Measurement] = {
    "perplexity": Measurement(
        "perplexity of a text read through a cache, and divergence from the uncompressed one",
        PerplexityOptions,
        _perplexity,
    ),
    "memory": Measurement(
        "bytes of a cache by part, and peaks of prefill and decoding, against context and batch",
        MemoryOptions,
        _memory,
    ),
    "speed": Measurement(
        "prefill and decoding speed of the whole model against context, caches side by side",
        SpeedOptions,
        _speed,
        together=True,
    ),
    "needle": Measurement(
        "whether a fact that was stored quantised is still found", NeedleOptions, _needle
    ),
    "agreement": Measurement(
        "how many tokens of text agree with the uncompressed cache's", AgreementOptions, _agreement
    ),
    "lm_eval": Measurement(
        "scores of lm-eval's tasks, all requests read through the cache", LmEvalOptions, _lm_eval
    ),
}
