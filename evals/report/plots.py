"""Plots as SVG: a Pareto front, differences with intervals, lines against context.

They are transparent, in mid-tones that read on light and dark; text has the page's own colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from math import floor, log10
from textwrap import fill
from typing import Any

import numpy as np
from adjustText import adjust_text
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from pandas import DataFrame

from .text import size, thousands

_INK = "#010203"  # stands for the page's own colour until a figure is written
GREY, ACCENT, BAD = "#868c95", "#3f7fd6", "#e0523f"
_COLORS = (ACCENT, "#d9731a", "#2e9e6b", "#a066d3", "#d9487d", "#1a97ab", "#a3872a", "#99705c")
_MARKERS, _DASHES = "osD^vPX*", ("-", (0, (5, 2)), (0, (1.5, 2)))
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 9,
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
_MAX_NAMES = 16  # of a front that are written out; of longer ones only numbers
_PLAIN = FuncFormatter(lambda x, _: f"{x:,g}")


class _Ticks(LogFormatter):
    """Ticks of a logarithmic axis, all in one format: with powers of ten if some are very small."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The text of a tick; empty where there is no room for one."""
        if not super().__call__(x, pos):
            return ""
        if min(self.axis.get_view_interval()) >= 1e-4:  # type: ignore[union-attr]
            return f"{x:,g}"
        mantissa, power = f"{x:e}".split("e")
        return f"{float(mantissa):g}e{int(power)}".replace("-", "−")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates, by their first number: the Pareto front.

    Less is better in both. A point dominates another if it is nowhere worse and somewhere better;
    of equal points all stay.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        # In this order only what came before can dominate, and the last of the front does so
        # if anything does.
        if not found or points[i][1] < points[found[-1]][1] or points[i] == points[found[-1]]:
            found.append(i)
    return found


@contextmanager
def _drawing(x_label: str, y_label: str, height: float = 3.5) -> Iterator[Axes]:
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        yield axes


def _svg(axes: Axes, name: str) -> str:
    """The figure for a page, on which `name` keeps its ids from those of others."""
    buffer, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure: Any = axes.figure
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg[svg.index("<svg") :], count=4)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg).replace(_INK, "currentColor")
    return svg.replace("<svg", '<svg class="plot" role="img"', 1)


def frontier(name: str, x_label: str, table: DataFrame, noise: float) -> str:
    """KL divergence over bits, with the Pareto front as a line and its points named.

    Args:
        name: of the figure.
        x_label: what the bits are.
        table: `x`, `y` (above 0), `number`, `cache`, `front`, `safe` and `doubtful`.
        noise: the divergence that rounding makes, drawn if it is not far below the points; or NaN.
    """
    with _drawing(x_label, "mean KL divergence of all tokens (nats)") as axes:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_Ticks())
        axes.yaxis.set_minor_formatter(_Ticks(minor_thresholds=(1, 0.5)))
        if table["y"].min() / 10 <= noise <= table["y"].max():
            at = axes.get_yaxis_transform()
            axes.axhline(noise, color=GREY, linestyle="--", linewidth=1)
            axes.text(0.99, noise, "rounding noise", transform=at, va="bottom", ha="right")
        best = table[table["front"]].sort_values(["x", "y"])
        axes.plot(best["x"], best["y"], color=ACCENT)
        _dots(axes, table)
        width = table["x"].max() - table["x"].min()
        axes.set_xlim(left=axes.get_xlim()[0] - 0.25 * width)  # room for names under the front
        annotate(axes, table)
        return _svg(axes, name)


def intervals(name: str, x_label: str, table: DataFrame) -> str:
    """Changes of perplexity with their intervals, and a line at 0.

    Args:
        name: of the figure.
        x_label: what the bits are.
        table: as of `frontier`, and `low` and `high` of each y; NaN where there is none.
    """
    with _drawing(x_label, "change in perplexity (%)") as axes:
        spread = table[["y", "low", "high"]].abs().max(axis=1)
        if spread.max() > 8 * spread.median() > 0:  # a few would dwarf the rest
            near = 10.0 ** floor(log10(spread.median()))
            axes.set_yscale("symlog", linthresh=near, linscale=0.7)
            axes.yaxis.set_major_formatter(_PLAIN)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.vlines(table["x"], table["low"], table["high"], color=GREY, alpha=0.7, linewidth=1.2)
        _dots(axes, table)
        annotate(axes, table.assign(front=False))
        return _svg(axes, name)


def _dots(axes: Axes, table: DataFrame) -> None:
    """Blue what is safe, grey what is not, a cross what has warnings."""
    axes.margins(0.08)
    for (safe, doubtful), group in table.groupby(["safe", "doubtful"]):
        color = BAD if doubtful else ACCENT if safe else GREY
        marker = "x" if doubtful else "o"
        axes.scatter(group["x"], group["y"], 24, color, marker=marker, zorder=3)


def annotate(axes: Axes, table: DataFrame) -> list[Text]:
    """Names of the front, numbers of the rest, as far as they have room.

    Args:
        axes: with their points drawn.
        table: `x`, `y`, `number`, `cache` and `front`.

    Returns:
        The texts: none covers another or a point, or leaves the figure.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are final from here on
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    texts = (table["number"].astype(str) + " " + table["cache"]).map(lambda x: fill(x, 20))
    named = table["front"] & (texts.str.count("\n") < 3) & (table["front"].sum() <= _MAX_NAMES)
    best, rest = table[named].sort_values(["x", "y"]), table
    dots = axes.transData.transform(table[["x", "y"]])
    names, arrows, line = [], [], axes.transData.transform(best[["x", "y"]])
    for (x, y), text in zip(line, texts[best.index], strict=True):
        # Under a front there is room: names start there.
        at = axes.transData.inverted().transform((x - 6, y - 6))
        names.append(axes.text(at[0], at[1], text, fontsize=8, linespacing=1, ha="right", va="top"))
    if names:
        steps = np.linspace(0, len(line) - 1, 40)
        along = [np.interp(steps, range(len(line)), line[:, i]) for i in (0, 1)]
        obstacles = axes.transData.inverted().transform([*dots, *np.transpose(along)])
        _, arrows = adjust_text(
            names, *obstacles.T, target_x=list(best["x"]), target_y=list(best["y"]), ax=axes,
            iter_lim=400, expand=(1.1, 1.5), avoid_self=False, force_explode=(0, 0),
            force_text=(0.2, 0.4), force_static=(0.2, 0.4),
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
        )  # fmt: skip
    kept: dict[Text, Bbox] = {}
    for i, text in zip(best.index, names, strict=True):
        if _keep(text, kept, dots):
            rest = rest.drop(i)
        else:
            for gone in (text, *(x for x in arrows if x.patchA is text)):
                gone.remove()
    for x, y, n in zip(rest["x"], rest["y"], rest["number"], strict=True):
        for offset, side in (((4, 0), "left"), ((-4, 0), "right"), ((0, 5), "center")):
            text = axes.annotate(str(n), (x, y), offset, textcoords="offset points", fontsize=7)
            text.set(ha=side, va="baseline" if side == "center" else "center_baseline")
            if _keep(text, kept, dots):
                break
            text.remove()
    return list(kept)


def _keep(text: Text, kept: dict[Text, Bbox], dots: Any) -> bool:
    """Add a text to those kept, with its box, if it covers none of them and no dot."""
    box, frame = text.get_window_extent(), text.figure.bbox
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 < box.y1 <= frame.y1
    if not inside or box.padded(2).count_contains(dots) or box.count_overlaps(kept.values()):
        return False
    kept[text] = box
    return True


def styles(names: Iterable[str], baselines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each cache's line is drawn; baselines are grey and dashed."""
    grey = dict.fromkeys(baselines)
    found = {name: {"color": GREY, "marker": "o", "linestyle": (0, (4, 3))} for name in grey}
    # Colours come round with another dash.
    looks = cycler(linestyle=_DASHES) * (cycler(color=_COLORS) + cycler(marker=_MARKERS))
    others = [name for name in dict.fromkeys(names) if name not in grey]
    return found | dict(zip(others, cycle(looks), strict=False))


def lines(name: str, y_label: str, table: DataFrame, drawn: dict[str, dict[str, Any]]) -> str:
    """A line a cache against the context's length.

    Args:
        name: of the figure.
        y_label: "bytes", which has a scale of powers of two, or another.
        table: `cache`, `x` (above 0) and `y`; `low` and `high` of each y, or NaN.
        drawn: by cache, from `styles`.
    """
    labels = {cache: fill(cache, 60) for cache in dict.fromkeys(table["cache"])}
    legend = "\n".join(labels.values()).count("\n")
    with _drawing("context (tokens)", y_label, 3.2 + 0.16 * legend) as axes:
        values: Any = table[["y", "low", "high"]].stack()
        low, high = values.min(), values.max()
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: thousands(x)))
        for cache, label in labels.items():
            group, style = table[table["cache"] == cache].sort_values("x"), drawn[cache]
            axes.plot(group["x"], group["y"], label=label, markersize=5, **style)
            axes.vlines(group["x"], group["low"], group["high"], style["color"], alpha=0.55)
        if low > 0 and (y_label == "bytes" or high / low > 10):
            base = 2 if y_label == "bytes" else 10
            axes.set_yscale("log", base=base)
            axes.set_ylim(low / 1.3, max(high * 1.3, low * base))
            axes.yaxis.set_major_formatter(_Ticks())
            axes.yaxis.set_minor_formatter(_Ticks(minor_thresholds=(1, 0.5)))
        else:
            axes.set_ylim(0, high * 1.08 or 1)
            axes.yaxis.set_major_formatter(_PLAIN)
        if y_label == "bytes":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: size(x)))
            axes.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.figure.legend(loc="outside lower left", fontsize=8, handlelength=3)
        return _svg(axes, name)
