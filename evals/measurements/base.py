"""What a measurement is: what every file of this folder defines, and `registry.py` lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..caches.registry import CacheSpec
from ..failures import Failure, failure_of
from ..subjects.models import LoadedModel

Run = Callable[[Sequence[CacheSpec]], Sequence[dict[str, Any] | Failure]]
"""Measures caches; for each its figures as plain values, or why there are none."""


@dataclass(frozen=True)
class Measurement:
    """A measurement.

    Attributes:
        name: by which it is chosen.
        text: what it measures, in a line.
        meaning: how its figures are to be read, in a sentence; the report shows it.
        options: the class of its options, a dataclass of `option`s.
        prepare: makes what measures from a model, options and seed; it keeps what all caches
            share, such as the baseline's logits.
        together: whether all caches are measured in one run, side by side.
        section: makes a section of its own in the report from a data frame of its rows; without
            one the report tabulates its figures.
    """

    name: str
    text: str
    meaning: str
    options: type
    prepare: Callable[[LoadedModel, Any, int], Run]
    together: bool = False
    section: Callable[[Any], Any] | None = None


def one_by_one(measure: Callable[[CacheSpec], dict[str, Any]]) -> Run:
    """Measure caches one after the other; one that fails ends none of the others."""

    def run(specs: Sequence[CacheSpec]) -> list[dict[str, Any] | Failure]:
        results: list[dict[str, Any] | Failure] = []
        for spec in specs:
            try:
                results.append(measure(spec))
            except Exception as error:
                results.append(failure_of(error))
        return results

    return run
