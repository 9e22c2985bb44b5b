"""Perplexity of a text read through a cache, and divergence from the uncompressed cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import Cache

from ..caches.registry import BASELINE, CacheSpec
from ..options import option
from ..probes.footprint import Footprint
from ..probes.half_size import half_footprint, layer_shapes
from ..probes.integrity import warnings_of, warnings_of_filled
from ..progress import steps
from ..subjects.models import LoadedModel
from ..subjects.texts import TextOptions, cut
from .base import Measurement, one_by_one
from .comparison import Reading
from .reference import Reference, SinglePass


@dataclass(frozen=True)
class PerplexityOptions(TextOptions):
    """How `perplexity` is measured."""

    chunk: int = option(64, "maximum tokens of a forward pass; 1 is true decoding", min=1)

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install: scipy for intervals."""
        return (*super().packages, "scipy")


class PerplexityMeasurement:
    """Perplexity and divergence of caches on one text.

    Args:
        loaded: the model.
        options: text and chunk.

    Raises:
        InputError: for a text that is missing or too short.
    """

    def __init__(self, loaded: LoadedModel, options: PerplexityOptions) -> None:
        self.loaded, self.options = loaded, options
        documents = options.documents()
        self.windows, self.left_out = cut(
            loaded.tokenizer, documents, options, loaded.context, options.chunk
        )
        self.ids = [window.ids.to(loaded.device) for window in self.windows]
        self.shapes = layer_shapes(loaded.model, self.ids[0][:, :1])
        baseline = CacheSpec.of(BASELINE)
        self.reference = Reference(loaded.model, self.ids, lambda: loaded.new_cache(baseline))

    @property
    def longest(self) -> int:
        """The window that has the most tokens, or the first of them."""
        return max(range(len(self.ids)), key=lambda i: self.ids[i].shape[1])

    def begin(self, spec: CacheSpec) -> PerplexityRun:
        """The reading of the windows through one cache, of which none is read yet."""
        return PerplexityRun(self, spec)

    def run(self, spec: CacheSpec) -> dict[str, Any]:
        """The figures of one cache, as plain values.

        For the baseline itself the reference is one pass without a cache: its divergence is the
        rounding noise of the model's dtype.
        """
        run = self.begin(spec)
        for index in steps(range(len(self.windows)), f"{spec.label}: window {{}} of {{}}"):
            run.read(index, probed=index == self.longest)
        return run.figures()


class PerplexityRun:
    """Some windows read through one cache, and the figures of those read so far.

    Args:
        measurement: that has the windows and the reference.
        spec: the cache.

    Raises:
        NotAvailableError, InputError: for a cache that is not to be had here.
    """

    def __init__(self, measurement: PerplexityMeasurement, spec: CacheSpec) -> None:
        self.of, self.spec = measurement, spec
        self._stored = spec  # as the latest window has been
        self._half: tuple[CacheSpec, Footprint] | None = None
        self.warnings: list[str] = []
        model = measurement.loaded.model
        single = SinglePass(model, measurement.ids) if spec.is_baseline else None
        chunk = measurement.options.chunk
        self.reading = Reading(model, single or measurement.reference, self.make_cache, chunk)
        self.make_cache()  # an unavailable cache says so before any work

    def make_cache(self) -> Cache:
        """A new, empty cache."""
        return self.of.loaded.new_cache(self.spec)

    def read(self, index: int, probed: bool) -> None:
        """Read a window.

        Args:
            index: of the window.
            probed: whether its cache is probed, unless it is the baseline: one of the longest.
        """
        probe = self._probe if probed and not self.spec.is_baseline else None
        ids, name = self.of.ids[index], self.of.windows[index].name
        self._stored = self.spec.as_stored(self.reading.read(index, ids, name, probe))

    def _probe(self, index: int, cache: Cache, start: int) -> None:
        model, ids, chunk = self.of.loaded.model, self.of.ids[index], self.of.options.chunk
        if start:  # the cache is filled as a probe needs it
            found = warnings_of_filled(model, ids, start, cache, self.make_cache, chunk)
        else:
            found = warnings_of(model, ids, self.make_cache, chunk)
        self.warnings += found

    def _in_half_size(self) -> Footprint:
        if self._half is None or self._half[0] != self._stored:
            tokens, chunk = self.of.ids[self.of.longest].shape[1], self.of.options.chunk
            loaded = self.of.loaded
            make_cache = partial(loaded.new_cache, self._stored)
            counted = half_footprint(self.of.shapes, make_cache, tokens, chunk, loaded.device)
            self._half = self._stored, counted
        return self._half[1]

    def figures(self, level: float = 0.95) -> dict[str, Any]:
        """The figures of the windows read so far, as plain values.

        Args:
            level: of confidence of the intervals.
        """
        found = self.reading.comparison(level)
        counted = found if self.of.loaded.model.dtype.itemsize == 2 else self._in_half_size()
        names = [window.document for window in self.reading.windows]
        return asdict(found) | {
            "bits_per_number_16bit": counted.bits_per_number,
            "packed_bits_per_number_16bit": counted.packed_bits_per_number,
            "long_bits_per_number_16bit": counted.long_bits_per_number,
            "reference": "one pass without a cache" if self.spec.is_baseline else "dynamic",
            "chunk": self.of.options.chunk,
            "window": self.of.ids[self.of.longest].shape[1],
            "windows": len(names),
            "documents": sorted(set(names)),
            "interval_over": "documents" if len(set(names)) > 1 else "windows of one document",
            "documents_left_out": self.of.left_out,
            "warnings": list(self.warnings),
            "notes": list(self.spec.notes),
        }


PERPLEXITY = Measurement(
    name="perplexity",
    text="perplexity of a text read through a cache, and divergence from the uncompressed one",
    meaning=(
        "What compression costs: KL divergence from the uncompressed cache, nats per token, and "
        "the change of perplexity, against the bits of an element."
    ),
    options=PerplexityOptions,
    prepare=lambda loaded, options, seed: one_by_one(PerplexityMeasurement(loaded, options).run),
)
