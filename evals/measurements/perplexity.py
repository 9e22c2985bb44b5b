"""Perplexity of a text read through a cache, and divergence from the uncompressed cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..caches.base import Elements
from ..caches.registry import BASELINE, CacheSpec
from ..options import option
from ..probes.chunked import passes, read
from ..probes.footprint import elements_of, footprint
from ..probes.half_size import half_footprint, layer_shapes
from ..probes.integrity import warnings_of, warnings_of_filled
from ..subjects.models import LoadedModel
from ..subjects.texts import TextOptions, cut
from .base import Measurement, one_by_one

_KEPT_BYTES = 2 << 30  # of the baseline's logits, in the host's memory


@dataclass(frozen=True)
class PerplexityOptions(TextOptions):
    """How `perplexity` is measured."""

    chunk: int = option(64, "maximum tokens of a forward pass; 1 is true decoding", min=1)

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install: scipy for intervals."""
        return (*super().packages, "scipy")


@dataclass(frozen=True)
class Comparison:
    """What reading a cache changed. KL divergence in nats.

    Attributes:
        perplexity: of the text, read through the cache.
        baseline_perplexity: of the same text, read through the reference.
        delta: their difference.
        delta_ci95: its 95% confidence interval over the documents, or over the windows of the
            only one (Student's t of the paired differences of their mean log-likelihoods);
            None for a single window.
        kl_mean: mean KL divergence of the next-token distributions to the reference's.
        kl_p99: its 99th percentile over the tokens.
        top1_agreement: share of tokens whose likeliest successor is the reference's.
        bits_per_number: bits of the cache with the last token in, over the elements it stands
            for; everything counted. Mean over the windows.
        packed_bits_per_number: the same without the full-precision tokens: the limit for long
            texts. None where a window is too short to quantise any.
        compressed_share: share of the keys and values read that were read quantised. (Of layers
            with a sliding window an upper bound: what leaves it during a pass is counted.)
        tokens: predicted tokens.
    """

    perplexity: float
    baseline_perplexity: float
    delta: float
    delta_ci95: tuple[float, float] | None
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    bits_per_number: float
    packed_bits_per_number: float | None
    compressed_share: float
    tokens: int


class Reference:
    """The logits that a cache's are compared with: those of the uncompressed cache.

    They are computed in the same passes as the cache's own, so that both round alike, and kept
    for the next cache while they fit in `kept_bytes`.

    Args:
        model: in evaluation mode.
        windows: token ids (1, tokens) each.
        make_cache: makes the uncompressed cache.
        kept_bytes: of the host's memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[Tensor],
        make_cache: Callable[[], Cache] | None = None,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self.model, self.windows = model, windows
        self.make_cache = make_cache or (lambda: DynamicCache(config=model.config))
        self.room = kept_bytes
        self.kept: dict[tuple[int, int, int], Tensor] = {}
        self.at: tuple[int, int] = (-1, 0)  # the window and token that the cache has come to
        self.cache: Cache | None = None

    def logits(self, window: int, start: int, end: int) -> Tensor:
        """Logits (end - start, vocabulary) after the tokens start..end-1 of a window."""
        key, ids = (window, start, end), self.windows[window]
        if key in self.kept:
            return self.kept[key].to(ids.device)
        cache = self.cache if self.at == (window, start) else None
        self.at, self.cache = (-1, 0), None  # a pass that fails leaves a cache of unknown content
        if cache is None:
            cache = self.make_cache()
            if start:
                read(self.model, ids[:, :start], cache)
        found = read(self.model, ids[:, start:end], cache)
        self.at, self.cache = (window, end), cache
        if found.nbytes <= self.room:
            self.room -= found.nbytes
            self.kept[key] = found.cpu()
        return found


class SinglePass:
    """The logits of one pass without a cache: what the uncompressed cache is compared with."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[Tensor]) -> None:
        self.model, self.windows = model, windows
        self.at, self.found = -1, torch.empty(0)

    def logits(self, window: int, start: int, end: int) -> Tensor:
        """As `Reference.logits`."""
        if window != self.at:
            self.at, self.found = window, single_pass(self.model, self.windows[window])
        return self.found[start:end]


@torch.no_grad()
def single_pass(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (tokens, vocabulary), float32, of a text (1, tokens), in one pass without a cache."""
    return model(ids, use_cache=False).logits[0].float()


def compare(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    reference: Reference | SinglePass,
    make_cache: Callable[[], Cache],
    chunk: int,
    documents: Sequence[Any] | None = None,
    before_last: Callable[[int, Cache, int], None] | None = None,
) -> Comparison:
    """Feed texts through new caches and compare with a reference.

    Args:
        model: in evaluation mode.
        windows: token ids (1, tokens) each.
        reference: of the same windows.
        make_cache: makes an empty cache; called once per window.
        chunk: maximum tokens of a forward pass; 1 is true decoding.
        documents: what each window is of; windows of one document are not independent.
        before_last: told, before the last pass over a window, its index, the cache, and how many
            tokens of it the cache holds.
    """
    kl, agree, losses, bits = [], [], [], []
    quantised = seen = 0.0
    for index, ids in enumerate(windows):
        cache, stored = make_cache(), Elements(0, 0)
        loss = torch.zeros(2, dtype=torch.float64)
        for start, end in passes(cache, chunk, ids.shape[1]):
            if before_last is not None and end == ids.shape[1]:
                before_last(index, cache, start)
            n = end - start
            actual = read(model, ids[:, start:end], cache).double().log_softmax(-1)
            # The pass read quantised what was so before it; the rest, itself included, was not.
            before, stored = stored, elements_of(cache)
            quantised += n * before.quantised
            # Token i of the pass sees i - 1 more than its first.
            seen += n * (before.held + stored.held + (stored.held - before.held) / n) / 2
            expected = reference.logits(index, start, end).double().log_softmax(-1)
            kl.append((expected.exp() * (expected - actual)).sum(-1).cpu())
            agree.append((expected.argmax(-1) == actual.argmax(-1)).cpu())
            target = ids[0, start + 1 : end + 1].unsqueeze(-1)
            for i, predicted in enumerate((actual, expected)):
                loss[i] -= predicted[: len(target)].gather(-1, target).sum().cpu()
        losses.append((ids.shape[1] - 1, *loss.tolist()))
        last = footprint(cache, model.dtype)
        bits.append((last.bits_per_number, last.packed_bits_per_number))
    tokens = sum(n for n, _, _ in losses)
    actual_loss, expected_loss = (sum(row[i] for row in losses) / tokens for i in (1, 2))
    divergence = torch.cat(kl)
    baseline = math.exp(expected_loss)
    return Comparison(
        perplexity=math.exp(actual_loss),
        baseline_perplexity=baseline,
        delta=math.exp(actual_loss) - baseline,
        delta_ci95=interval(_by_document(losses, documents), baseline),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence.numpy(), 0.99)),
        top1_agreement=float(torch.cat(agree).double().mean()),
        bits_per_number=sum(total for total, _ in bits) / len(bits),
        packed_bits_per_number=_mean([quantised for _, quantised in bits]),
        compressed_share=quantised / seen,
        tokens=tokens,
    )


def _by_document(
    losses: list[tuple[int, float, float]], documents: Sequence[Any] | None
) -> list[tuple[int, float]]:
    """Tokens and difference of mean losses, of every document, or window if there is but one."""
    if documents is None or len(set(documents)) == 1:
        documents = range(len(losses))
    sums: dict[Any, list[float]] = {}
    for document, (tokens, actual, expected) in zip(documents, losses, strict=True):
        found = sums.setdefault(document, [0, 0.0])
        found[0] += tokens
        found[1] += actual - expected
    return [(int(tokens), difference / tokens) for tokens, difference in sums.values()]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def interval(differences: list[tuple[int, float]], baseline: float) -> tuple[float, float] | None:
    """95% confidence interval of a perplexity's difference to `baseline`.

    Args:
        differences: of every document, its tokens and the difference of its mean losses, nats.
        baseline: the perplexity compared with, taken as known.
    """
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return None
    total = sum(n for n, _ in differences)
    mean = sum(n * d for n, d in differences) / total
    square = sum((n / total) ** 2 * (d - mean) ** 2 for n, d in differences)
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(square * count / (count - 1))
    low, high = (baseline * math.expm1(mean + sign * half) for sign in (-1, 1))
    return low, high


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

    def run(self, spec: CacheSpec) -> dict[str, Any]:
        """The figures of one cache, as plain values.

        For the baseline itself the reference is one pass without a cache: its divergence is the
        rounding noise of the model's dtype.
        """
        model = self.loaded.model
        reference = SinglePass(model, self.ids) if spec.is_baseline else self.reference

        def make_cache() -> Cache:
            return self.loaded.new_cache(spec)

        make_cache()  # an unavailable cache says so before any work
        names = [window.name for window in self.windows]
        chunk, warnings = self.options.chunk, list[str]()
        longest = max(range(len(self.ids)), key=lambda i: self.ids[i].shape[1])

        def probe(index: int, cache: Cache, start: int) -> None:
            if index != longest or spec.is_baseline:
                return
            ids = self.ids[index]
            if start:  # the cache is filled as a probe needs it
                found = warnings_of_filled(model, ids, start, cache, make_cache, chunk)
            else:
                found = warnings_of(model, ids, make_cache, chunk)
            warnings.extend(found)

        result = compare(model, self.ids, reference, make_cache, chunk, names, probe)
        if model.dtype.itemsize == 2:
            bits = (result.bits_per_number, result.packed_bits_per_number)
        else:
            tokens, device = self.ids[longest].shape[1], self.loaded.device
            half = half_footprint(self.shapes, make_cache, tokens, chunk, device)
            bits = (half.bits_per_number, half.packed_bits_per_number)
        return asdict(result) | {
            "bits_per_number_16bit": bits[0],
            "packed_bits_per_number_16bit": bits[1],
            "reference": "one pass without a cache" if spec.is_baseline else "dynamic",
            "chunk": self.options.chunk,
            "window": self.ids[longest].shape[1],
            "windows": len(self.ids),
            "documents": sorted(set(names)),
            "interval_over": "documents" if len(set(names)) > 1 else "windows of one document",
            "documents_left_out": self.left_out,
            "warnings": warnings,
            "notes": list(spec.notes),
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
