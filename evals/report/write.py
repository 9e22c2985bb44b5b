"""Rows in, three files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import (
    everything,
    flat,
    markdown,
    memory,
    needle,
    overview,
    page,
    quality,
    scores,
    speed,
)
from .blocks import Section
from .names import Names, Row, is_baseline, points
from .style import strokes
from .text import clean


def write(
    rows: Sequence[Mapping[str, Any]],
    headers: Sequence[Mapping[str, Any]],
    out: Path,
    title: str,
) -> list[Path]:
    """Write report.html, report.md and rows.csv; the same rows give the same bytes.

    Args:
        rows: of sweeps, those that failed or were not run included.
        headers: of the sweeps that they come from.
        out: the folder; made if it is not there.
        title: of the report.

    Returns:
        The files.

    Raises:
        NotAvailableError: if there is something to plot, and matplotlib is not installed.
    """
    found = sections(rows, headers)
    title = clean(title)
    texts = {
        "report.html": page.document(title, found),
        "report.md": markdown.document(title, found),
        "rows.csv": flat.to_csv(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    return [out / name for name in texts]


def sections(rows: Sequence[Row], headers: Sequence[Row]) -> list[Section]:
    """The sections there is something to say in."""
    names = Names(rows)
    lined = [row for row in rows if points(row)]
    drawn = strokes(map(names.cache, lined), [names.cache(r) for r in lined if is_baseline(r)])
    measurements = (
        quality.section(rows, names),
        memory.section(rows, names, drawn),
        speed.section(rows, names, drawn),
        needle.section(rows, names),
        scores.agreement(rows, names),
        scores.lm_eval(rows, names),
        *scores.others(rows, names),
    )
    return [
        overview.section(rows, headers, names),
        *overview.problems(rows, names),
        *(section for section in measurements if section is not None),
        everything.section(rows, names),
    ]
