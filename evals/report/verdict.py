"""Does a cache keep the limits of `verify`, and is that shown?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ..verify import LIMITS, NOT_ENOUGH, NOT_SAFE, SAFE, VerifyOptions, missing, reasons
from .frames import texts
from .text import number, plain

NONE = "no verdict"
WORDS = (SAFE, NOT_ENOUGH, NOT_SAFE, NONE)
"""Those of `verify`, and one for figures that it could not judge."""


class Verdict(NamedTuple):
    """One of the words above, and why."""

    word: str
    why: str = ""


def judge(figures: Mapping[Any, Any]) -> Verdict:
    """What `verify` says of a perplexity result, by its own limits."""
    options, known = VerifyOptions(), _known(figures)
    try:
        faults, lacking = reasons(known, options), missing(known, options)
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return Verdict(NONE, "figures are missing, or are no numbers")
    if faults:
        return Verdict(NOT_SAFE, "; ".join(faults))
    return Verdict(NOT_ENOUGH if lacking else SAFE, "; ".join(lacking))


def _known(figures: Mapping[Any, Any]) -> dict[Any, Any]:
    """The figures with numbers where there are numbers, and None where there are none."""
    known: dict[Any, Any] = {key: number(value) for key, value in figures.items()}
    known |= {name: figures.get(name) for name in ("interval_over", "documents")}
    known["warnings"] = texts(figures.get("warnings"))
    known["delta_ci95"] = interval_of(figures)
    known |= {name: _pair(figures[name]) for name in _INTERVALS if name in figures}
    readers = figures.get("code_readers")
    if isinstance(readers, Mapping):
        known["code_readers"] = _known(readers)
    return known


_INTERVALS = ("kl_mean_ci95", "kl_p99_ci95", "top1_agreement_ci95")


def _pair(value: Any) -> tuple[float | None, float | None] | None:
    """An interval; an end that is infinite is None in JSON."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    return number(value[0]), number(value[1])


def interval_of(figures: Mapping[Any, Any]) -> tuple[float, float] | None:
    """The 95% interval of the change of perplexity, if there is one."""
    low, high = _pair(figures.get("delta_ci95")) or (None, None)
    return None if low is None or high is None else (low, high)


def limits() -> str:
    """The limits, in the words in which `verify` explains them."""
    found = [
        f"{entry.metadata['help']}: {plain(entry.default)}"
        for entry in fields(VerifyOptions)
        if entry.name in LIMITS
    ]
    return (
        "A cache is safe if its figures keep the limits of verify to the worse end of their 95% "
        "intervals, over several documents or windows, and enough is read quantised. Tokens count "
        "that read at least half of their context quantised. Rows that were recorded without "
        f"these figures are never called safe. The limits: {'; '.join(found)}. Bits are per key or "
        "value element in a 16-bit model, everything counted."
    )
