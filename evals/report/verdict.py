"""Does a cache pass the limits of `python -m evals verify`, and is that proven?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ..measurements.perplexity import PerplexityOptions
from ..verify import VerifyOptions, reasons
from .frames import texts
from .text import number, plain

WORDS = ("passes", "not proven", "does not pass", "in doubt", "no verdict")
PASSES, UNPROVEN, FAILS, DOUBTFUL, NONE = WORDS


class Verdict(NamedTuple):
    """One of the words above, and why."""

    word: str
    why: str = ""


def judge(figures: Mapping[Any, Any]) -> Verdict:
    """What `verify` says of a perplexity result, and whether that is proven.

    A limit that is broken by the figures themselves fails. What is broken only by the far end of
    the interval, has no interval, or was hardly read quantised, has not enough evidence.
    """
    warnings, options = texts(figures.get("warnings")), VerifyOptions()
    if warnings:
        return Verdict(DOUBTFUL, "; ".join(warnings))
    known: dict[Any, Any] = {key: number(value) for key, value in figures.items()}
    known |= {"warnings": [], "delta_ci95": None}
    try:
        faults = reasons(known | {"compressed_share": 1.0}, options)
        unproven = reasons(known | {"delta_ci95": interval_of(figures)}, options)
    except (ArithmeticError, KeyError, TypeError):
        return Verdict(NONE, "figures are missing, or are no numbers")
    if faults:
        return Verdict(FAILS, "; ".join(faults))
    if interval_of(figures) is None:
        unproven.append("one window only: there is no interval")
    return Verdict(UNPROVEN if unproven else PASSES, "; ".join(unproven))


def interval_of(figures: Mapping[Any, Any]) -> tuple[float, float] | None:
    """The 95% interval of the change of perplexity, if there is one."""
    pair = figures.get("delta_ci95")
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    low, high = map(number, pair)
    return None if low is None or high is None else (low, high)


def limits() -> str:
    """The limits, in the words in which `verify` explains them."""
    own = {entry.name for entry in fields(PerplexityOptions)}
    found = [
        f"{entry.metadata['help']}: {plain(entry.default)}"
        for entry in fields(VerifyOptions)
        if entry.name not in own and isinstance(entry.default, float)
    ]
    return (
        "A cache passes if it is proven to keep the limits of python -m evals verify: by an "
        "interval over several windows, and with enough read quantised. "
        f"The limits: {'; '.join(found)}. Bits are per key or value number in a 16-bit model, "
        "everything counted."
    )
