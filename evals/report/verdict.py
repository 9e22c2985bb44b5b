"""Does a cache keep the limits of `verify`, and is that shown?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ..measurements.perplexity import PerplexityOptions
from ..verify import NOT_ENOUGH, NOT_SAFE, SAFE, VerifyOptions, missing, reasons
from .frames import texts
from .text import number, plain

DOUBTFUL, NONE = "in doubt", "no verdict"
WORDS = (SAFE, NOT_ENOUGH, NOT_SAFE, DOUBTFUL, NONE)
"""Those of `verify`, and what it never says: of figures with warnings, and without figures."""


class Verdict(NamedTuple):
    """One of the words above, and why."""

    word: str
    why: str = ""


def judge(figures: Mapping[Any, Any]) -> Verdict:
    """What `verify` says of a perplexity result, by its own limits."""
    warnings, options = texts(figures.get("warnings")), VerifyOptions()
    if warnings and number(figures.get("compressed_share")):
        return Verdict(DOUBTFUL, "; ".join(warnings))
    known: dict[Any, Any] = {key: number(value) for key, value in figures.items()}
    known |= {"warnings": warnings, "delta_ci95": interval_of(figures)}
    known |= {name: figures.get(name) for name in ("interval_over", "documents")}
    try:
        faults, lacking = reasons(known, options), missing(known, options)
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return Verdict(NONE, "figures are missing, or are no numbers")
    if faults:
        return Verdict(NOT_SAFE, "; ".join(faults))
    return Verdict(NOT_ENOUGH if lacking else SAFE, "; ".join(lacking))


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
        "A cache is safe if it is shown to keep the limits of verify: by an interval over "
        "several windows, and with enough read quantised. "
        f"The limits: {'; '.join(found)}. Bits are per key or value element in a 16-bit model, "
        "everything counted."
    )
