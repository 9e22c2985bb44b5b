"""What reading a cache changed: divergence and perplexity beside a reference, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..caches.base import Elements
from ..probes.chunked import passes, read
from ..probes.footprint import elements_of, footprint
from ..progress import within
from .intervals import Interval, interval, mean_interval, quantile_interval, share_interval
from .reference import Reference, SinglePass

_READS_CODES = 0.5  # share of what a token reads that is read quantised, for it to count as such
_ELEMENTS = 1 << 19  # of logits that are compared at once, or up to twice as many


@dataclass(frozen=True)
class Figures:
    """What reading a cache changed, over some tokens. KL divergence in nats.

    Intervals are over the documents, or over the windows of the only one; None for a single
    window. How they are made: `intervals.py`.

    Attributes:
        perplexity: of the text, read through the cache.
        baseline_perplexity: of the same text, read through the reference.
        delta: their difference.
        delta_ci95: its 95% confidence interval (Student's t of the paired differences of mean
            log-likelihoods).
        kl_mean: mean KL divergence of the next-token distributions to the reference's.
        kl_p99: its 99th percentile over the tokens.
        top1_agreement: share of tokens whose likeliest successor is the reference's.
        tokens: predicted tokens.
        kl_mean_ci95, kl_p99_ci95, top1_agreement_ci95: their 95% intervals.
    """

    perplexity: float
    baseline_perplexity: float
    delta: float
    delta_ci95: Interval | None
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    kl_mean_ci95: Interval | None
    kl_p99_ci95: Interval | None
    top1_agreement_ci95: Interval | None


@dataclass(frozen=True)
class CodeReaders(Figures):
    """The figures of the tokens that read at least half of their context quantised.

    Tokens near the beginning of a window read most of it in full precision, as later ones do not:
    the shorter the windows, the more do the figures of all tokens flatter a cache.

    Attributes:
        compressed_share: share of the keys and values that these tokens read that were quantised.
    """

    compressed_share: float


@dataclass(frozen=True)
class Comparison(Figures):
    """The figures of all tokens, and what the cache took.

    Attributes:
        bits_per_number: bits of the cache with the last token in, over the elements it stands
            for; everything counted. Mean over the windows.
        packed_bits_per_number: the same without the full-precision tokens; tables and spare
            capacity are spread over the tokens measured. None where a window is too short to
            quantise any.
        long_bits_per_number: the limit for long texts: codes and scales alone, per element.
        compressed_share: share of the keys and values read that were read quantised. (Of layers
            with a sliding window an upper bound: what leaves it during a pass is counted.)
        code_readers: the figures of the tokens that read mostly codes; None if none do.
    """

    bits_per_number: float
    packed_bits_per_number: float | None
    long_bits_per_number: float | None
    compressed_share: float
    code_readers: CodeReaders | None


@dataclass(frozen=True)
class _Window:
    """What was found in one window: per token, but for the sums.

    Attributes:
        document: that it is of.
        kl, agree: (tokens,).
        losses: (2, tokens - 1), of the cache and the reference: the last token has no successor.
        sums: (2,), of the losses, added up pass by pass.
        share: (tokens,), of what a token read that it read quantised.
    """

    document: Any
    kl: NDArray
    agree: NDArray
    losses: NDArray
    sums: NDArray
    share: NDArray


class Reading:
    """Reads windows of text through new caches, and compares each with the reference.

    Args:
        model: in evaluation mode.
        reference: of the same windows.
        make_cache: makes an empty cache; called once per window.
        chunk: maximum tokens of a forward pass; 1 is true decoding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: Reference | SinglePass,
        make_cache: Callable[[], Cache],
        chunk: int,
    ) -> None:
        self.model, self.reference = model, reference
        self.make_cache, self.chunk = make_cache, chunk
        self.windows: list[_Window] = []
        self.bits: list[tuple[float, float | None, float | None]] = []
        self.quantised = self.seen = 0.0

    def read(
        self,
        index: int,
        ids: Tensor,
        document: Any,
        before_last: Callable[[int, Cache, int], None] | None = None,
    ) -> Cache:
        """Read a window.

        Args:
            index: of the window, for the reference.
            ids: token ids (1, tokens).
            document: that it is of.
            before_last: told, before the last pass, the index, the cache, and how many tokens of
                the window it holds.

        Returns:
            The cache, which holds the window.
        """
        cache, stored, tokens = self.make_cache(), Elements(0, 0), ids.shape[1]
        found: list[list[NDArray]] = []
        sums, shares = np.zeros(2), []
        for start, end in passes(cache, self.chunk, tokens):
            if before_last is not None and end == tokens:
                before_last(index, cache, start)
            n = end - start
            actual = read(self.model, ids[:, start:end], cache)
            # The pass read quantised what was so before it; the rest, itself included, was not.
            before, stored = stored, elements_of(cache)
            self.quantised += n * before.quantised
            # Token i of the pass sees i - 1 more than its first.
            self.seen += n * (before.held + stored.held + (stored.held - before.held) / n) / 2
            held = before.held + (stored.held - before.held) / n * np.arange(1, n + 1)
            shares.append(before.quantised / np.maximum(held, 1))
            expected = self.reference.logits(index, start, end)
            one = compared(actual, expected, ids[0, start + 1 : end + 1])
            sums += [float(x.sum()) for x in one[2]]
            found.append([x.numpy() for x in one])
            within(end / tokens)
        kl, agree, losses = [np.concatenate(x, axis=-1) for x in zip(*found, strict=True)]
        self.windows.append(_Window(document, kl, agree, losses, sums, np.concatenate(shares)))
        last = footprint(cache, self.model.dtype)
        bits = (last.bits_per_number, last.packed_bits_per_number, last.long_bits_per_number)
        self.bits.append(bits)
        return cache

    def comparison(self, level: float = 0.95) -> Comparison:
        """The figures of the windows read so far.

        Args:
            level: of confidence of the intervals; their names say 95% whatever it is.
        """
        every, packed, long = zip(*self.bits, strict=True)
        return Comparison(
            **_figures(self.windows, level),
            bits_per_number=sum(every) / len(every),
            packed_bits_per_number=_mean(packed),
            long_bits_per_number=_mean(long),
            compressed_share=self.quantised / self.seen,
            code_readers=_code_readers(self.windows, level),
        )


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
        model, reference, make_cache, chunk: as of `Reading`.
        windows: token ids (1, tokens) each.
        documents: what each window is of; windows of one document are not independent.
        before_last: as of `Reading.read`.
    """
    reading = Reading(model, reference, make_cache, chunk)
    for index, ids in enumerate(windows):
        document = None if documents is None else documents[index]
        reading.read(index, ids, document, before_last)
    return reading.comparison()


def compared(actual: Tensor, expected: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two passes' logits, compared in float64.

    A few rows at a time: all rows of a large vocabulary at once leave the processor's cache, and
    take five times as long.

    Args:
        actual, expected: logits (n, vocabulary).
        target: ids of the tokens that come next, n, or one less at the end of a text.

    Returns:
        Of every token the KL divergence of `actual` from `expected`, nats; whether the likeliest
        successor is the same; and the losses (2, targets) of both. On the CPU.
    """
    kl, agree, losses = [], [], []
    # No slice of one row where there are more: one row's sum is split among threads, and differs.
    slices = max(1, len(actual) // max(2, _ELEMENTS // actual.shape[-1]))
    ends = [0]
    for a, e in zip(actual.tensor_split(slices), expected.tensor_split(slices), strict=True):
        ends.append(ends[-1] + len(a))
        agree.append(e.argmax(-1) == a.argmax(-1))
        a, e = a.double().log_softmax(-1), e.double().log_softmax(-1)
        next_ = target[ends[-2] : ends[-1]].unsqueeze(-1)
        losses.append(torch.stack([-x[: len(next_)].gather(-1, next_)[:, 0] for x in (a, e)]))
        kl.append((e - a).mul_(e.exp_()).sum(-1))
    return torch.cat(kl).cpu(), torch.cat(agree).cpu(), torch.cat(losses, dim=1).cpu()


def _code_readers(windows: Sequence[_Window], level: float) -> CodeReaders | None:
    chosen = []
    for window in windows:
        reads = window.share >= _READS_CODES
        losses = window.losses[:, reads[:-1]]
        if losses.size:
            parts = (window.kl[reads], window.agree[reads], losses, losses.sum(-1))
            chosen.append(_Window(window.document, *parts, window.share[reads]))
    if not chosen:
        return None
    share = float(np.concatenate([window.share for window in chosen]).mean())
    return CodeReaders(**_figures(chosen, level), compressed_share=share)


def _figures(windows: Sequence[_Window], level: float) -> dict[str, Any]:
    """The fields of `Figures`."""
    documents = _by_document(windows)
    rows = [(window.losses.shape[1], *window.sums.tolist()) for window in windows]
    tokens = sum(n for n, _, _ in rows)
    actual_loss, expected_loss = (sum(row[i] for row in rows) / tokens for i in (1, 2))
    divergence, agree = (
        torch.cat([torch.from_numpy(x) for x in found])
        for found in ([w.kl for w in windows], [w.agree for w in windows])
    )
    baseline = math.exp(expected_loss)
    kl = [np.concatenate([w.kl for w in each]) for each in documents]
    changed = share_interval([np.concatenate([~w.agree for w in x]) for x in documents], level)
    return {
        "perplexity": math.exp(actual_loss),
        "baseline_perplexity": baseline,
        "delta": math.exp(actual_loss) - baseline,
        "delta_ci95": interval([_difference(each) for each in documents], baseline, level),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence.numpy(), 0.99)),
        "top1_agreement": float(agree.double().mean()),
        "tokens": tokens,
        "kl_mean_ci95": mean_interval(kl, level),
        "kl_p99_ci95": quantile_interval(kl, 0.99, level),
        "top1_agreement_ci95": (1 - changed[1], 1 - changed[0]) if changed else None,
    }


def _by_document(windows: Sequence[_Window]) -> list[list[_Window]]:
    """The windows of every document, or each alone if there is but one document."""
    found: dict[Any, list[_Window]] = {}
    for window in windows:
        found.setdefault(window.document, []).append(window)
    return list(found.values()) if len(found) > 1 else [[window] for window in windows]


def _difference(windows: Sequence[_Window]) -> tuple[int, float]:
    """Tokens of a document, and the difference of its mean losses."""
    tokens, difference = 0, 0.0
    for window in windows:
        tokens += window.losses.shape[1]
        difference += float(window.sums[0]) - float(window.sums[1])
    return tokens, difference / tokens


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
