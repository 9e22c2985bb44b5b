"""Does a cache keep the limits of `verify`, and is that shown?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..verify import NOT_ENOUGH, NOT_SAFE, SAFE, VerifyOptions, missing, percent, reasons
from .frames import texts
from .text import number

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
    """What the verdicts rest on, and the limits of `verify`."""
    limit = VerifyOptions()
    return (
        "A cache is safe if all four 95% intervals lie within verify's limits and enough was read "
        "from codes. Only tokens that read at least half of their context from codes are counted. "
        f"Limits: mean KL ≤ {limit.max_kl:g} nats; KL p99 ≤ {limit.max_kl_p99:g}; same top token ≥ "
        f"{percent(limit.min_top1)}; perplexity rise ≤ {percent(limit.max_delta)}; ≥ "
        f"{percent(limit.min_packed)} of reads from codes. Rows recorded without intervals are "
        "never called safe. Bits are per key or value element in a 16-bit model, everything "
        "counted."
    )
