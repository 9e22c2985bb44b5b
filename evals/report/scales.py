"""Axes: which scale suits some values, and ticks that read as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .text import size, thousands

_ROOM = 0.06  # around the values, as a share of their span
_MANY = 6  # ticks at most of an axis of powers of two


def logarithmic(axis: Any, low: float, high: float, below: float = _ROOM) -> None:
    """A logarithmic axis from a little below `low` to a little above `high`, both above 0.

    `below` is the room before the lowest value, as a share of the span.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _limits(axis, low, high, True, below)
    low, high = sorted(axis.get_view_interval())
    ticks = _decimal_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axis.set_minor_locator(NullLocator())


def linear(axis: Any, low: float, high: float, below: float = _ROOM) -> None:
    """A linear axis; `below` as above."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _limits(axis, low, high, False, below)
    axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))


def contexts(axis: Any, values: Sequence[float]) -> None:
    """An axis of context lengths, with ticks at those measured where they have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = sorted(set(values))
    log = len(found) > 1 and found[0] > 0 and found[-1] / found[0] >= 4
    _limits(axis, found[0], found[-1], log)
    axis.set_major_locator(FixedLocator(_apart(found, log)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: thousands(x)))
    axis.set_minor_locator(NullLocator())


def bytes_(axis: Any, low: float, high: float) -> None:
    """An axis of bytes: by powers of two where the values span several, else from 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

    if low <= 0 or high / low < 4:
        _limits(axis, 0, high, log=False)
        axis.set_major_locator(MultipleLocator(_binary_step(high)))
    else:
        _limits(axis, low, high, log=True)
        low, high = sorted(axis.get_view_interval())
        first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
        step = max(1, -(-(last - first + 1) // _MANY))
        axis.set_major_locator(FixedLocator([2.0**i for i in range(first, last + 1, step)]))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: size(x).replace(".00", "").replace(".0 ", " "))
    )


def rates(axis: Any, low: float, high: float) -> None:
    """An axis of rates: from 0, or logarithmic where they span more than a power of ten."""
    if low > 0 and high / low > 10:
        logarithmic(axis, low, high)
    else:
        linear(axis, 0, high)


def differences(axis: Any, values: Sequence[float]) -> None:
    """An axis of differences about 0, compressed away from it where a few would dwarf the rest."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(0.0, *values), max(0.0, *values)
    sizes = sorted(abs(x) for x in values if x)
    if len(sizes) < 3 or sizes[-1] < 12 * sizes[len(sizes) // 2]:
        linear(axis, low, high)
        return
    # Linear up to about the smaller quarter, logarithmic beyond.
    near = 10.0 ** math.floor(math.log10(sizes[len(sizes) // 4]))
    near = max(near, 10.0 ** (math.floor(math.log10(sizes[-1])) - 4))
    _scale(axis)("symlog", linthresh=near, linscale=0.6)
    room = 1.25
    axis.axes.set_ylim(low * room - 0.3 * near, high * room + 0.3 * near)
    powers = range(round(math.log10(near)), 8)
    ticks = [0.0, *(s * 10.0**i for i in powers for s in (-1, 1))]
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator(sorted(x for x in ticks if low <= x <= high)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axis.set_minor_locator(NullLocator())


def tick(x: float) -> str:
    """A round number, without needless zeros."""
    if x and not 1e-5 <= abs(x) < 1e6:
        mantissa, power = f"{x:.0e}".split("e")
        return f"{mantissa}e{int(power)}".replace("-", "−")
    text = f"{x:,.7f}".rstrip("0").rstrip(".")
    return text.replace("-", "−") if text != "-0" else "0"


def _scale(axis: Any) -> Callable[..., None]:
    return axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale


def _limits(axis: Any, low: float, high: float, log: bool, below: float = _ROOM) -> None:
    """Set the scale and the limits, with some room around, and more where there is one value."""
    if log:
        _scale(axis)("log")
        span = max(high / low, 6.0)
        limits = (low / span**below, high * span**_ROOM)
    else:
        span = high - low or abs(high) or 1.0
        limits = (low - below * span if low else 0.0 if high > 0 else -span, high + _ROOM * span)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*limits)


def _decimal_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them where there are few, and more between where none."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [s * 10.0**i for i in range(first, last + 1) for s in steps]
        ticks = [x for x in ticks if low <= x <= high]
        if len(ticks) >= 4:
            break
    every = -(-len(ticks) // 9)
    return ticks[::every] if ticks else [low, high]


def _apart(values: Sequence[float], log: bool) -> list[float]:
    """Those values that are at least a tenth of the axis apart."""
    place = [math.log(x) if log else x for x in values]
    least = (place[-1] - place[0]) / 10
    kept = [0]
    for i in range(1, len(values)):
        if place[i] - place[kept[-1]] >= least:
            kept.append(i)
    return [values[i] for i in kept]


def _binary_step(high: float) -> float:
    """A power of two that divides 0..high into four to eight."""
    return 2.0 ** (math.floor(math.log2(max(high, 1))) - 2)
