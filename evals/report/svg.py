"""Matplotlib figures as SVG that lives inside a page and follows its colours."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import NotAvailableError
from .style import FAINT, GRID, INK, VARIABLES
from .text import clean

WIDTH, HEIGHT = 620, 400  # pixels of the drawing; the page scales it
FONT = 13.0
_MARGINS = {"left": 78, "right": 14, "top": 12, "bottom": 50}


class Canvas:
    """One figure with one pair of axes.

    Args:
        name: of this figure on its page; its ids begin with it.
        x_label, y_label: of the axes.
    """

    def __init__(self, name: str, x_label: str, y_label: str) -> None:
        from matplotlib.figure import Figure

        self.name = name
        self.hints: list[str] = []
        self.figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        left, right = _MARGINS["left"] / WIDTH, 1 - _MARGINS["right"] / WIDTH
        bottom, top = _MARGINS["bottom"] / HEIGHT, 1 - _MARGINS["top"] / HEIGHT
        self.axes = self.figure.add_axes((left, bottom, right - left, top - bottom))
        self.axes.set_xlabel(x_label)
        self.axes.set_ylabel(y_label)
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.grid(True, color=GRID, linewidth=1)
        self.axes.set_axisbelow(True)

    def hint(self, text: str) -> str:
        """The id for an artist that shows this text where the pointer rests."""
        self.hints.append(clean(text))
        return f"hint-{len(self.hints) - 1}"

    def svg(self) -> str:
        """The figure as an `<svg>` element."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        return inline(buffer.getvalue(), self.name, self.hints)


@contextmanager
def drawing(name: str, x_label: str, y_label: str) -> Iterator[Canvas]:
    """A canvas with the report's settings of matplotlib, which are undone afterwards.

    Raises:
        NotAvailableError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NotAvailableError(
            "reports need matplotlib, which is not installed: pip install -e '.[eval]'"
        ) from error
    settings: dict[str, Any] = {
        "svg.fonttype": "none",  # text stays text: it is found, read aloud and coloured
        "svg.hashsalt": "rotorquant_hf",  # ids depend on the contents alone
        "text.parse_math": False,  # a label may hold a dollar sign
        "axes.unicode_minus": True,
        "font.size": FONT,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 1.0,
        "path.simplify": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not those of the reader's matplotlibrc
        matplotlib.rcParams.update(settings)
        yield Canvas(name, x_label, y_label)


def inline(svg: str, name: str, hints: list[str]) -> str:
    """Matplotlib's SVG file as an element of a page.

    Args:
        svg: the file.
        name: put before every id that is referred to, so that figures do not share them.
        hints: `hint-i` is the id of the group that gets the i-th as its title.
    """
    body = svg[svg.index("<g ") : svg.rindex("</svg>")]
    body = re.sub(r'style="([^"]*)"', _style, body)
    body = re.sub(
        r'<g id="hint-(\d+)">',
        lambda m: f'<g class="hint"><title>{html.escape(hints[int(m[1])])}</title>',
        body,
    )
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'(<(?:path|clipPath) id=")', rf"\g<1>{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace('clip-path="url(#', f'clip-path="url(#{name}-')
    body = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", body)
    body = re.sub(r' d="([^"]*)"', lambda m: f' d="{" ".join(m[1].split())}"', body)
    body = re.sub(r">\s+<", ">\n<", body)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}">\n'
        f"{body.strip()}\n</svg>"
    )


def _style(match: re.Match[str]) -> str:
    style = re.sub(r"font-family: [^;\"]*;? ?", "", match[1])  # the page's own
    for color, variable in VARIABLES.items():
        style = style.replace(color, variable)
    return f'style="{style}"'
