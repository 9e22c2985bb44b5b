"""Verdicts on a cache's figures: their intervals beside the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotorquant_hf import RotorQuantConfig

from .options import VerifyOptions

SAFE, NOT_SAFE, NOT_ENOUGH = "safe", "not safe", "not enough evidence"

_HOPELESS = 1000  # times the text that was read; a figure that would take more lies at its limit
_OPEN = 4  # times the text for a figure whose interval has no end yet


@dataclass(frozen=True)
class Bound:
    """A figure of which less is better, with its interval, beside its limit.

    Attributes:
        found, low, high: the figure and the ends of its interval; infinite where it has no end.
        limit: that it must not exceed.
        over: what is said where it does.
        may: what is said where it could.
    """

    found: float
    low: float
    high: float
    limit: float
    over: str
    may: str


def counted(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures that a verdict rests on: of the tokens that read mostly codes.

    Of rows that were recorded without them, those of all tokens.
    """
    return figures.get("code_readers") or figures


def reasons(figures: Mapping[str, Any], options: VerifyOptions) -> list[str]:
    """Why a cache with these figures is not safe; empty if nothing speaks against it."""
    if not figures["compressed_share"]:
        return []  # nothing was read quantised: what the figures lack is said by `missing`
    found = list(figures["warnings"])
    if not _finite(counted(figures)):
        return [*found, "its figures are not finite"]
    return found + [x.over for x in bounds(figures, options) if x.low > x.limit]


def missing(figures: Mapping[str, Any], options: VerifyOptions) -> list[str]:
    """What evidence these figures lack, and how much text would give it; empty if they suffice."""
    share, window = figures["compressed_share"], figures["window"]
    needed, found = window_for(figures, options), []
    if not share and window >= needed:
        found += figures["warnings"]  # why nothing was, however long the text
    if share < options.min_packed or not share:
        more = f": give texts, and a --window, of at least {needed:,} tokens"
        read = f"{share:.0%} of what was read was read quantised, under {options.min_packed:.0%}"
        found.append(
            (read if share else "nothing was read quantised") + (more if window < needed else "")
        )
    elif figures.get("code_readers", ...) is None:
        found.append(
            "no token reads mostly codes: give texts, and a --window, of at least "
            f"{_round_up(2 * _kept(figures)):,} tokens"
        )
    if counted(figures)["delta_ci95"] is None:
        found.append(
            f"one window of {window:,} tokens gives no interval: give at least "
            f"{2 * max(window, needed):,} tokens (--text, --max-tokens)"
        )
    elif "kl_mean_ci95" not in counted(figures):
        found.append("KL and top-1 were recorded without intervals: measure again")
    else:
        open_ = [x for x in bounds(figures, options) if x.low <= x.limit < x.high]
        if open_:
            found.append("; ".join(x.may for x in open_) + _text_for(open_, figures))
    return found


def bounds(figures: Mapping[str, Any], options: VerifyOptions) -> list[Bound]:
    """Every figure beside its limit; none where there is a single window, without intervals."""
    of = counted(figures)
    if of["delta_ci95"] is None:
        return []
    base, kl, kl_p99, top1 = (
        of[name] for name in ("baseline_perplexity", "kl_mean", "kl_p99", "top1_agreement")
    )
    less, more = _ends(of, "top1_agreement", -math.inf)
    low, high = (x / base for x in _ends(of, "delta"))
    delta = of["delta"] / base
    return [
        _kl("mean KL", kl, *_ends(of, "kl_mean"), options.max_kl),
        _kl("KL p99", kl_p99, *_ends(of, "kl_p99"), options.max_kl_p99),
        Bound(
            1 - top1, 1 - more, 1 - less, 1 - options.min_top1,
            f"top-1 {top1:.2%} is under {options.min_top1:.2%}" + _spread(less, more, ".2%"),
            f"top-1 could be as low as {less:.2%} (limit {percent(options.min_top1)})",
        ),
        Bound(
            delta, low, high, options.max_delta,
            f"perplexity rises by {delta:.2%}, over {options.max_delta:.2%}"
            + _spread(low, high, ".2%"),
            f"perplexity could rise by {high:.2%} (limit {percent(options.max_delta)})",
        ),
    ]  # fmt: skip


def _kl(name: str, found: float, low: float, high: float, limit: float) -> Bound:
    may = f"{name} could be as high as {high:.3g} (limit {limit:g})"
    return Bound(
        found, low, high, limit,
        f"{name} {found:.3g} is over {limit:g}" + _spread(low, high, ".3g"),
        may if high < math.inf else f"{name}: too few tokens for an upper bound",
    )  # fmt: skip


def _ends(figures: Mapping[str, Any], name: str, worst: float = math.inf) -> tuple[float, float]:
    """The interval of a figure.

    A row that was recorded without one is judged by the figure itself where it breaks a limit, and
    is never shown to keep it: its interval goes on to the worst.
    """
    pair = figures.get(f"{name}_ci95") or sorted((figures[name], worst))
    low, high = (worst if x is None else x for x in pair)
    return low, high


def percent(fraction: float) -> str:
    """A limit in percent, with no more decimal places than it has."""
    return f"{100 * fraction:.6g}%"


def _spread(low: float, high: float, shown: str) -> str:
    if not math.isfinite(low) or not math.isfinite(high):
        return ""
    return f" (95%: {low:{shown}} to {high:{shown}})"


def _finite(figures: Mapping[str, Any]) -> bool:
    """Whether all figures are numbers; only KL p99 may have an interval without an end."""
    values = [figures[name] for name in ("kl_mean", "kl_p99", "top1_agreement", "delta")]
    for name in ("delta", "kl_mean", "top1_agreement"):
        values += figures.get(f"{name}_ci95") or ()
    return all(map(math.isfinite, [*values, figures["baseline_perplexity"]]))


def window_for(figures: Mapping[str, Any], options: VerifyOptions) -> int:
    """Tokens of a window of which the share `min_packed` is read quantised, rounded up.

    Of a window of w tokens that keeps f in full precision, (1 - f / w)^2 is read quantised.
    """
    return _round_up(_kept(figures) / max(1 - math.sqrt(options.min_packed), 1e-3))


def _kept(figures: Mapping[str, Any]) -> float:
    """Tokens of a window that stay in full precision."""
    share, default = figures["compressed_share"], RotorQuantConfig()
    if share:
        return figures["window"] * (1 - math.sqrt(share))
    return default.tokens_before_packing


def _text_for(open_: list[Bound], figures: Mapping[str, Any]) -> str:
    """How much text would decide: that one figure is over its limit, or that all are within.

    An interval shrinks with the square root of the tokens, and Student's t comes near to normal.
    """
    from scipy.stats import norm, t

    by_document = figures["interval_over"] == "documents"
    samples = len(figures["documents"]) if by_document else figures["windows"]
    tail = (1 + figures.get("interval_level", 0.95)) / 2
    normal = float(norm.ppf(tail) / t.ppf(tail, samples - 1))

    def times(bound: Bound) -> float:
        """As much text as was read, this many times."""
        room = abs(bound.limit - bound.found)
        end = bound.high if bound.found <= bound.limit else bound.low
        if not math.isfinite(end):
            return _OPEN
        if not room:
            return math.inf
        if not bound.found:  # nothing changed: the end comes down as the tokens grow
            return max(2.0, end / room)
        return max(2.0, (abs(end - bound.found) * normal / room) ** 2)

    over = [times(bound) for bound in open_ if bound.found > bound.limit]
    most = min(over) if over else max(map(times, open_))
    if most > _HOPELESS:
        return "; so near to the limit that no text would decide"
    tokens = _round_up(figures["tokens"] * most)
    many = f"from at least {math.ceil(samples * most):,} documents" if by_document else "of text"
    return f"; about {tokens:,} tokens {many} would decide"


def _round_up(tokens: float) -> int:
    """To two significant digits, from 100 on."""
    step = 10 ** max(1, math.floor(math.log10(tokens)) - 1)
    return math.ceil(tokens / step) * step
