"""Rows whose results are points along the context's length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .blocks import Key
from .names import Names, Row, measured, points
from .plots import Line
from .style import Stroke
from .text import number, plain

_ALIKE = 0.01  # a difference that no plot shows

Member = tuple[Row, list[Mapping[str, Any]]]


def by_batch(rows: Sequence[Row], measurement: str, names: Names) -> list[tuple[str, list[Member]]]:
    """Panels: name, and rows with those of their points that have one batch size."""
    found = []
    for name, members in names.panels(measured(rows, measurement)):
        batches = dict.fromkeys(_batch(point) for row in members for point in points(row))
        for batch in batches:
            chosen = [(row, [p for p in points(row) if _batch(p) == batch]) for row in members]
            chosen = [(row, kept) for row, kept in chosen if kept]
            title = name if batch == "none" else f"{name}, batch {batch}"
            found.append((title, chosen))
    return found


def _batch(point: Mapping[str, Any]) -> str:
    return plain(point.get("batch"))


def line_of(
    name: str,
    found: Iterable[Mapping[str, Any]],
    figure: str,
    strokes: Mapping[str, Stroke],
    spread: tuple[str, str] | None = None,
) -> Line:
    """A figure against context, where both are there, with two more as the ends of its spread."""
    xy, ends = [], []
    for point in found:
        x, y = number(point.get("context")), number(point.get(figure))
        if x is None or y is None or x <= 0 or y < 0:
            continue
        xy.append((x, y))
        low, high = (number(point.get(key)) for key in spread or (figure, figure))
        ends.append((low, high) if spread and low is not None and high is not None else None)
    return Line(name, strokes[name], xy, ends)


def keys_of(lines: Iterable[Line]) -> list[Key]:
    """The legend of some lines."""
    unique = {line.name: line.stroke for line in lines}
    return [Key(name, s.color, s.dash, s.marker) for name, s in unique.items()]


def overlaps(lines: Sequence[Line]) -> str:
    """A sentence on the lines that hide each other; empty if none do."""
    groups: list[list[Line]] = []
    for line in lines:
        for group in groups:
            if _alike(line, group[0]):
                group.append(line)
                break
        else:
            groups.append([line])
    hidden = [", ".join(line.name for line in group) for group in groups if len(group) > 1]
    return f"On one another: {'; '.join(hidden)}." if hidden else ""


def _alike(a: Line, b: Line) -> bool:
    first, second = dict(a.points), dict(b.points)
    return first.keys() == second.keys() and all(
        math.isclose(y, second[x], rel_tol=_ALIKE) for x, y in first.items()
    )
