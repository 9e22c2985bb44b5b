"""Needles: which facts of a long text were found again, by depth and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Beside, Cell, Heading, Section, Table, Text
from .names import Names, Row, measured, part, points
from .text import fixed, number, plain, share, thousands, whole


def section(rows: Sequence[Row], names: Names) -> Section | None:
    """The section, or None without results."""
    blocks: list = []
    for name, members in names.panels(measured(rows, "needle")):
        summary = [_summary(names.cache(row), part(row, "result")) for row in members]
        header = ("cache", "right", "chosen right", "asked")
        blocks += [Heading(name), Table(header, summary, sortable=True)]
        grids = [_grid(names.cache(row), points(row)) for row in members if points(row)]
        if grids:
            blocks.append(Beside(grids))
        if any(p.get("quantised") is False for row in members for p in points(row)):
            blocks.append(Text("* not stored quantised when it was asked for: still exact."))
    return Section("Needles", blocks) if blocks else None


def _summary(label: str, result: Mapping[str, Any]) -> tuple[Cell | str, ...]:
    return (
        label,
        *(
            Cell(share(result.get(k)), number(result.get(k)))
            for k in ("accuracy", "choice_accuracy")
        ),
        Cell(whole(result.get("asked")), number(result.get("asked"))),
    )


def _grid(label: str, found: Sequence[Mapping[str, Any]]) -> Table:
    lengths = sorted({x for p in found if (x := number(p.get("length"))) is not None})
    depths = sorted({x for p in found if (x := number(p.get("depth"))) is not None})
    cells: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for p in found:
        cells.setdefault((number(p.get("length")), number(p.get("depth"))), []).append(p)
    rows = [
        (
            Cell(fixed(100 * depth, 0, "%"), depth),
            *(_cell(cells.get((n, depth), [])) for n in lengths),
        )
        for depth in depths
    ]
    header = ("depth", *(thousands(n) for n in lengths))
    return Table(header, rows, title=label, compact=True)


def _cell(found: Sequence[Mapping[str, Any]]) -> Cell:
    """Passed of asked, of the points of one length and depth."""
    asked, passed, chosen = (
        [x for p in found if (x := number(p.get(key))) is not None]
        for key in ("asked", "passed", "chosen")
    )
    if not found or not sum(asked):
        return Cell("–", tone="faint")
    exact = any(p.get("quantised") is False for p in found)
    text = f"{plain(sum(passed))}/{plain(sum(asked))}{'*' if exact else ''}"
    hint = f"{plain(sum(chosen))} of {plain(sum(asked))} right among the candidates"
    rate = sum(passed) / sum(asked)
    return Cell(text, rate, heat=rate, hint=hint if chosen else "")
