"""Memory against the context's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import plots
from .blocks import Beside, Cell, Heading, Legend, Plot, Section, Table
from .names import Names, Row, is_baseline, part
from .series import by_batch, keys_of, line_of, overlaps
from .style import Stroke
from .text import clean, fixed, number, size, whole

_HEADER = (
    "cache",
    "context",
    "bytes of the cache",
    "smaller",
    "bits/number",
    "peak of prefill",
    "peak of decoding",
)
_FIGURES = (
    ("cache_bytes", "Bytes of the cache", "bytes of the cache"),
    ("peak_prefill_bytes", "Peak while prefilling", "bytes above the model's own"),
    ("peak_decode_bytes", "Peak while decoding", "bytes above the model's own"),
)


def section(rows: Sequence[Row], names: Names, strokes: Mapping[str, Stroke]) -> Section | None:
    """The section, or None without points."""
    blocks = []
    panels = by_batch(rows, "memory", names)
    for i, (name, members) in enumerate(panels):
        blocks += _panel(f"memory-{i}", name, members, names, strokes)
    return Section("Memory against context", blocks) if blocks else None


def _panel(
    slug: str,
    name: str,
    members: Sequence[tuple[Row, list[Mapping[str, Any]]]],
    names: Names,
    strokes: Mapping[str, Stroke],
) -> list:
    figures, drawn = [], []
    for key, title, label in _FIGURES:
        series = [line_of(names.cache(row), found, key, strokes) for row, found in members]
        series = [line for line in series if line.points]
        if series:
            svg = plots.lines(f"{slug}-{key}", "context (tokens)", label, series, "bytes")
            figures.append(Plot(title, svg, overlaps(series)))
            drawn += series
    beside = [Beside([*figures, Legend(keys_of(drawn))])] if figures else []
    base = {
        point.get("context"): number(point.get("cache_bytes"))
        for row, found in members
        if is_baseline(row)
        for point in found
    }
    table = [_entry(names.cache(row), point, base) for row, found in members for point in found]
    return [
        Heading(name),
        *beside,
        Table(
            _HEADER,
            table,
            title="All points",
            note="“Smaller”: than the uncompressed cache of the same context.",
            sortable=True,
            folded=len(table) > 12,
        ),
        *_parts(members, names),
    ]


def _entry(
    label: str, point: Mapping[str, Any], base: Mapping[Any, float | None]
) -> tuple[Cell | str, ...]:
    taken, full = number(point.get("cache_bytes")), base.get(point.get("context"))
    ratio = full / taken if full and taken else None
    return (
        label,
        Cell(whole(point.get("context")), number(point.get("context"))),
        Cell(size(taken), taken),
        Cell(fixed(ratio, 2, "×"), ratio),
        Cell(fixed(point.get("bits_per_number")), number(point.get("bits_per_number"))),
        *(
            Cell(size(point.get(key)), number(point.get(key)))
            for key in ("peak_prefill_bytes", "peak_decode_bytes")
        ),
    )


def _parts(members: Sequence[tuple[Row, list[Mapping[str, Any]]]], names: Names) -> list[Table]:
    """Where the bytes are at the longest context of each cache."""
    found = []
    for row, candidates in members:
        point = max(candidates, key=lambda p: number(p.get("context")) or 0)
        parts = part(point, "parts")
        if parts:
            found.append((names.cache(row), point, parts))
    columns = list(dict.fromkeys(name for _, _, parts in found for name in parts))
    if not columns:
        return []
    rows = [
        (
            label,
            Cell(whole(point.get("context")), number(point.get("context"))),
            *(
                Cell(size(parts[name]) if name in parts else "", number(parts.get(name)))
                for name in columns
            ),
        )
        for label, point, parts in found
    ]
    header = ("cache", "context", *map(clean, columns))
    return [Table(header, rows, title="Where the bytes are", sortable=True, folded=len(rows) > 12)]
