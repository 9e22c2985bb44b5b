"""Reports of measured rows: a page with plots, Markdown tables, a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..requirements import require_packages
from .blocks import Section

__all__ = ["Section", "write"]

_PACKAGES = ("pandas", "jinja2", "matplotlib", "adjusttext")


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
        NotAvailableError: if a package that makes reports is missing; nothing is written then.
    """
    require_packages("report", _PACKAGES)
    from . import build

    return build.write(rows, headers, out, title)
