"""Colours of plots and page: named here, given values for light and dark in style.css."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Matplotlib wants colours as numbers. These stand for the page's variables and are replaced when
# a figure is written, so that it follows the reader's choice of light or dark.
INK, FAINT, GRID, ACCENT, DOT, BAD = (f"#0101{i:02x}" for i in range(1, 7))
_SERIES = tuple(f"#0102{i:02x}" for i in range(8))

VARIABLES = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    ACCENT: "var(--accent)",
    DOT: "var(--dot)",
    BAD: "var(--bad)",
    **{color: f"var(--s{i})" for i, color in enumerate(_SERIES)},
}

_MARKERS = "osD^vPX*"
_DASHES = ("", "5 2", "1.5 2")


@dataclass(frozen=True)
class Stroke:
    """How a series is drawn.

    Attributes:
        color: a key of `VARIABLES`.
        marker: matplotlib's letter.
        dash: lengths of strokes and gaps, as SVG writes them; empty for a solid line.
    """

    color: str
    marker: str
    dash: str

    @property
    def linestyle(self) -> str | tuple[int, tuple[float, ...]]:
        """The dash as matplotlib takes it."""
        return (0, tuple(float(x) for x in self.dash.split())) if self.dash else "-"


def strokes(names: Iterable[str], baselines: Iterable[str] = ()) -> dict[str, Stroke]:
    """A stroke for every name, the same in all plots of a report; baselines are grey and dashed.

    Colours come round again after eight names, then with another dash and marker.
    """
    grey = dict.fromkeys(baselines)
    found = {name: Stroke(FAINT, "o", "4 3") for name in grey}
    for i, name in enumerate(x for x in dict.fromkeys(names) if x not in grey):
        turn = i // len(_SERIES)
        marker = _MARKERS[(i + turn) % len(_MARKERS)]
        found[name] = Stroke(_SERIES[i % len(_SERIES)], marker, _DASHES[turn % len(_DASHES)])
    return found
