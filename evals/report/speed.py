"""Speed against the context's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import plots
from .blocks import Beside, Cell, Heading, Legend, Plot, Section, Table
from .names import Names, Row, is_baseline
from .series import Member, by_batch, keys_of, line_of, overlaps
from .style import Stroke
from .text import fixed, number, significant, whole

_STAGES = (("prefill", "Prefill"), ("decode", "Decoding"))
_HEADER = (
    "cache",
    "context",
    "prefill tokens/s",
    "p10 to p90",
    "of uncompressed",
    "decode tokens/s",
    "p10 to p90",
    "of uncompressed",
    "samples",
)


def section(rows: Sequence[Row], names: Names, strokes: Mapping[str, Stroke]) -> Section | None:
    """The section, or None without points."""
    blocks = []
    for i, (name, members) in enumerate(by_batch(rows, "speed", names)):
        blocks += _panel(f"speed-{i}", name, members, names, strokes)
    return Section("Speed against context", blocks) if blocks else None


def _panel(
    slug: str,
    name: str,
    members: Sequence[Member],
    names: Names,
    strokes: Mapping[str, Stroke],
) -> list:
    figures, drawn = [], []
    for stage, title in _STAGES:
        ends = (f"{stage}_p10", f"{stage}_p90")
        figure = f"{stage}_tokens_per_s"
        series = [line_of(names.cache(row), found, figure, strokes, ends) for row, found in members]
        series = [line for line in series if line.points]
        if series:
            svg = plots.lines(f"{slug}-{stage}", "context (tokens)", "tokens/s", series, "rates")
            spread = any(end for line in series for end in line.spread)
            note = "Medians; bars from the 10th to the 90th percentile. " if spread else ""
            figures.append(Plot(title, svg, (note + overlaps(series)).strip()))
            drawn += series
    beside = [Beside([*figures, Legend(keys_of(drawn))])] if figures else []
    base = {
        point.get("context"): point for row, found in members if is_baseline(row) for point in found
    }
    table = [_entry(names.cache(row), point, base) for row, found in members for point in found]
    return [
        Heading(name),
        *beside,
        Table(_HEADER, table, title="All points", sortable=True, folded=len(table) > 12),
    ]


def _entry(
    label: str, point: Mapping[str, Any], base: Mapping[Any, Mapping[str, Any]]
) -> tuple[Cell | str, ...]:
    context = point.get("context")
    cells: list[Cell | str] = [label, Cell(whole(context), number(context))]
    for stage, _ in _STAGES:
        rate = number(point.get(f"{stage}_tokens_per_s"))
        full = number(base.get(context, {}).get(f"{stage}_tokens_per_s"))
        ratio = rate / full if rate is not None and full else None
        low, high = (number(point.get(f"{stage}_{end}")) for end in ("p10", "p90"))
        spread = "–" if low is None or high is None else f"{_rate(low)} to {_rate(high)}"
        cells += [Cell(_rate(rate), rate), Cell(spread, low), Cell(fixed(ratio, 2, "×"), ratio)]
    return (*cells, Cell(whole(point.get("samples")), number(point.get("samples"))))


def _rate(x: float | None) -> str:
    return whole(x) if x is not None and x >= 100 else significant(x)
