"""Measuring window after window, until every verdict is clear or the text ends.

Figures are looked at several times: after all windows, half of them, a quarter, down to four. At
each look the intervals have a level of their own, such that in all looks together one misses in at
most 5% of all texts, whenever one stops: the last look takes half of the 5%, the one before half of
that, and so on (Bonferroni's inequality, with the error spent over the looks as Lan and DeMets do,
Biometrika 70, 1983).

That is 2.5% for either end, as far as windows are like each other (`intervals.py` says how far). A
cache is called safe only if all four upper ends are within their limits, so that one which breaks
any of them passes in at most 2.5% of all texts; one that lies just within all four is refused in at
most 10%.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..caches.registry import CacheSpec
from ..failures import Failure, failure_of
from ..measurements.perplexity import PerplexityMeasurement, PerplexityRun
from ..progress import task
from ..subjects.models import LoadedModel
from .judge import NOT_ENOUGH, NOT_SAFE, SAFE, counted, missing, reasons
from .options import VerifyOptions

FAILED, NOT_MEASURED = "failed", "not measured"
STATUS = {SAFE: 0, NOT_SAFE: 1, NOT_ENOUGH: 3, FAILED: 4, NOT_MEASURED: 4}
"""Exit status of the command by what it found; 2 is that of bad input and missing packages."""

_FIRST = 4  # windows before the first look
_ERROR = 0.05


@dataclass(frozen=True)
class Verdict:
    """What was found about a cache.

    Attributes:
        label: its name.
        figures: of `PerplexityRun.figures`; empty if it was not measured.
        reasons: why it is not safe: the figures that break a limit.
        missing: what evidence is missing, and how much text would give it.
        spec: the cache.
        failure: why it was not measured.
    """

    label: str
    figures: dict[str, Any]
    reasons: list[str]
    missing: list[str]
    spec: CacheSpec | None = None
    failure: Failure | None = None

    @property
    def outcome(self) -> str:
        """`SAFE`, `NOT_SAFE` or `NOT_ENOUGH`; `FAILED` or `NOT_MEASURED` without figures."""
        if self.failure:
            return FAILED if self.failure.status == "failed" else NOT_MEASURED
        if self.reasons:
            return NOT_SAFE
        return NOT_ENOUGH if self.missing else SAFE

    @property
    def why(self) -> str:
        """Why it is that; empty of a safe one."""
        return self.failure.reason if self.failure else "; ".join(self.reasons or self.missing)

    @property
    def basis(self) -> str:
        """What the figures rest on, in words."""
        of = counted(self.figures)
        share = of["compressed_share"]
        return f"{of['tokens']:,} tokens, which read {share:.0%} of their context quantised"


def verdicts(loaded: LoadedModel, options: VerifyOptions) -> Iterator[Verdict]:
    """A verdict on every cache, as soon as it is clear.

    All caches read a window before any reads the next, so that the uncompressed cache reads each
    once, and no more than the logits of one window are kept.

    Raises:
        InputError: for a cache that there is not.
        TooShortError: if the text is shorter than one chunk.
    """
    specs = options.caches()
    measurement = PerplexityMeasurement(loaded, options)
    windows, open_ = order(measurement), list[tuple[CacheSpec, PerplexityRun]]()
    for spec in specs:
        try:
            open_.append((spec, measurement.begin(spec)))
        except Exception as error:
            yield Verdict(spec.label, {}, [], [], spec, failure_of(error))
    levels, read = looks(len(windows)), 0
    with task("verify") as shown:
        for count, index in enumerate(windows, 1):
            for i, (spec, run) in enumerate(tuple(open_)):
                total = read + (len(windows) - count + 1) * len(open_) - i
                text = f"{spec.label}: window {count} of {len(windows)}"
                shown.at(read / total, text, 1 / total)
                try:
                    run.read(index, probed=count == 1)
                except Exception as error:
                    open_.remove((spec, run))
                    yield Verdict(spec.label, {}, [], [], spec, failure_of(error))
                read += 1
            measurement.reference.forget(index)
            if count not in levels:
                continue
            for spec, run in tuple(open_):
                found = verdict_of(spec, run, levels[count], options)
                # More windows of this length would not be read quantised either.
                short = found.figures["compressed_share"] < options.min_packed
                if found.outcome != NOT_ENOUGH or short or count == len(windows):
                    open_.remove((spec, run))
                    yield found


def verdict_of(
    spec: CacheSpec, run: PerplexityRun, level: float, options: VerifyOptions
) -> Verdict:
    """The verdict on what was read so far; its intervals are of some level of confidence."""
    figures = run.figures(level) | {"interval_level": level}
    return Verdict(spec.label, figures, reasons(figures, options), missing(figures, options), spec)


def looks(windows: int) -> dict[int, float]:
    """After how many windows the figures are looked at, and each look's level of confidence."""
    counts = [windows]
    while counts[-1] // 2 >= _FIRST:
        counts.append(counts[-1] // 2)
    weights = [2.0**-i for i in range(len(counts))]
    return {
        count: 1 - _ERROR * weight / sum(weights)
        for count, weight in zip(counts, weights, strict=True)
    }


def order(measurement: PerplexityMeasurement, seed: int = 0) -> list[int]:
    """The order in which windows are read, by index: what is read by a look is a fair sample.

    The documents take turns, and the windows of each come in random order; but the first, in which
    caches are probed, is one of the longest.
    """
    draw, queues = random.Random(seed), dict[str, list[int]]()
    for index, window in enumerate(measurement.windows):
        queues.setdefault(window.name, []).append(index)
    turns = list(queues.values())
    draw.shuffle(turns)
    for queue in turns:
        draw.shuffle(queue)
    rounds = range(max(map(len, turns)))
    found = [queue[i] for i in rounds for queue in turns if i < len(queue)]
    first = max(found, key=lambda index: measurement.ids[index].shape[1])
    return sorted(found, key=lambda index: index != first)


def recommended(found: list[Verdict]) -> Verdict | None:
    """The safe cache with the fewest bits on long texts, or None; of equals, on those measured."""
    safe = [verdict for verdict in found if verdict.outcome == SAFE]
    return min(safe, key=bits_of, default=None)


def bits_of(verdict: Verdict) -> tuple[float, float]:
    """Bits per element in a 16-bit model: of long texts, and with windows as measured."""
    figures = verdict.figures
    return figures["long_bits_per_number_16bit"], figures["bits_per_number_16bit"]


def outcome(found: list[Verdict]) -> str:
    """That of all caches: `SAFE` if one is, `NOT_SAFE` if every one is known not to be.

    Else that of those that failed or could not be measured, before that of those undecided.
    """
    outcomes = {verdict.outcome for verdict in found}
    order = (SAFE, FAILED, NOT_MEASURED, NOT_ENOUGH, NOT_SAFE)
    return next(name for name in order if name in outcomes)
