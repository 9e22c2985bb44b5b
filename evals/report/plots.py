"""The kinds of plots: points with a Pareto front, differences with intervals, lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import scales
from .pareto import front
from .placing import Box, Label, along, place
from .style import ACCENT, BAD, DOT, FAINT, INK, Stroke
from .svg import FONT, Canvas, drawing
from .text import shorten

_CORNER = 0.16  # room at the lower left, for the names on the front
_LABEL = 20  # characters of a cache's label inside a plot


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot.

    Attributes:
        x, y: where it is.
        number: in the table below the plot.
        label: what it is.
        hint: all about it.
        low, high: ends of the interval of y, if there is one.
        doubtful: the measurement itself says that its figures mean little.
    """

    x: float
    y: float
    number: int
    label: str
    hint: str
    low: float | None = None
    high: float | None = None
    doubtful: bool = False


@dataclass(frozen=True)
class Line:
    """A series: points (x, y), perhaps with (low, high) of each y."""

    name: str
    stroke: Stroke
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float] | None] = ()


def on_front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front of the points that are not doubtful."""
    sound = [point for point in points if not point.doubtful]
    return [sound[i] for i in front([(point.x, point.y) for point in sound])]


def frontier(
    name: str, x_label: str, y_label: str, points: Sequence[Point], level: tuple[float, str] | None
) -> str:
    """Points over a logarithmic axis, with their Pareto front as a line.

    Points of the front are named; the others get their number where it has room.

    Args:
        name: of the figure.
        x_label, y_label: of the axes.
        points: with y above 0.
        level: a horizontal line and what it is, drawn if it is not far below the points.
    """
    best = on_front(points)
    with drawing(name, x_label, y_label) as canvas:
        axes = canvas.axes
        low, high = min(p.y for p in points), max(p.y for p in points)
        if level is not None and not low / 10 <= level[0] <= high:
            level = None
        scales.logarithmic(axes.yaxis, min(low, level[0]) if level else low, high, _CORNER)
        _bits(axes, points)
        if level is not None:
            _level(canvas, *level)
        axes.plot([p.x for p in best], [p.y for p in best], color=ACCENT, linewidth=1.6, zorder=2)
        _dots(canvas, points, best)
        _annotate(canvas, points, best, [(p.x, p.y) for p in best])
        return canvas.svg()


def intervals(name: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Differences with their intervals as error bars, and a line at 0."""
    with drawing(name, x_label, y_label) as canvas:
        axes = canvas.axes
        ends = [y for p in points for y in (p.low, p.y, p.high) if y is not None]
        scales.differences(axes.yaxis, ends)
        _bits(axes, points)
        axes.axhline(0, color=INK, linewidth=1)
        for p in points:
            if p.low is not None and p.high is not None:
                axes.plot([p.x, p.x], [p.low, p.high], color=DOT, linewidth=1.4, zorder=2)
        xs = [p.x for p in points]
        _dots(canvas, points, [])
        _annotate(canvas, points, [], [(min(xs), 0.0), (max(xs), 0.0)])
        return canvas.svg()


def lines(name: str, x_label: str, y_label: str, series: Sequence[Line], kind: str) -> str:
    """Series against the context's length.

    Args:
        name: of the figure.
        x_label, y_label: of the axes.
        series: what to draw.
        kind: of the values: "bytes" or "rates".
    """
    with drawing(name, x_label, y_label) as canvas:
        axes = canvas.axes
        values = [y for line in series for _, y in line.points]
        values += [y for line in series for ends in line.spread if ends for y in ends]
        scale = scales.bytes_ if kind == "bytes" else scales.rates
        scale(axes.yaxis, min(values), max(values))
        scales.contexts(axes.xaxis, [x for line in series for x, _ in line.points])
        for line in series:
            _line(canvas, line)
        return canvas.svg()


def _level(canvas: Canvas, y: float, text: str) -> None:
    """A dashed line across, named at its left end, below, where a front has no points."""
    canvas.axes.axhline(y, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    canvas.axes.annotate(
        text,
        (0, y),
        (4, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top",
        color=FAINT,
        fontsize=FONT - 2,
    )


def _line(canvas: Canvas, line: Line) -> None:
    axes, stroke = canvas.axes, line.stroke
    points = sorted(zip(line.points, line.spread or [None] * len(line.points), strict=True))
    for (x, _), ends in points:
        if ends is not None:
            axes.plot([x, x], ends, color=stroke.color, linewidth=1.2, alpha=0.55)
    (drawn,) = axes.plot(
        [x for (x, _), _ in points],
        [y for (_, y), _ in points],
        color=stroke.color,
        linestyle=stroke.linestyle,
        linewidth=1.8,
        marker=stroke.marker,
        markersize=6,
        markeredgewidth=0,
    )
    drawn.set_gid(canvas.hint(line.name))


def _bits(axes: Any, points: Sequence[Point]) -> None:
    scales.linear(axes.xaxis, min(p.x for p in points), max(p.x for p in points), _CORNER)


def _dots(canvas: Canvas, points: Sequence[Point], best: Sequence[Point]) -> None:
    chosen = {id(p) for p in best}
    for p in sorted(points, key=lambda p: id(p) in chosen):  # the front on top
        color = BAD if p.doubtful else ACCENT if id(p) in chosen else DOT
        (drawn,) = canvas.axes.plot(
            [p.x],
            [p.y],
            marker="x" if p.doubtful else "o",
            markersize=7.5 if id(p) in chosen else 6.5,
            color=color,
            markeredgewidth=1.6 if p.doubtful else 0,
            zorder=3,
            clip_on=False,
        )
        drawn.set_gid(canvas.hint(p.hint))


def _annotate(
    canvas: Canvas,
    points: Sequence[Point],
    best: Sequence[Point],
    line: Sequence[tuple[float, float]],
) -> None:
    """Names of the front, numbers of the rest where they have room."""
    axes = canvas.axes
    pixel = axes.transData.transform
    obstacles = [tuple(pixel((p.x, p.y))) for p in points]
    for p in points:
        if p.low is not None and p.high is not None:
            obstacles += along(pixel((p.x, p.low)), pixel((p.x, p.high)))
    for a, b in pairwise(line):
        obstacles += along(pixel(a), pixel(b))
    chosen = {id(p) for p in best}
    ordered = [*best, *(p for p in points if id(p) not in chosen)]
    labels = []
    for p in ordered:
        texts = [str(p.number)]
        if id(p) in chosen:
            texts.insert(0, f"{p.number} {shorten(p.label, _LABEL)}")
        at = tuple(pixel((p.x, p.y)))
        labels.append(Label(at, texts, far=id(p) in chosen, needed=id(p) in chosen))
    frame: Box = tuple(axes.bbox.extents)
    to_data = axes.transData.inverted().transform
    for p, spot in zip(ordered, place(labels, obstacles, frame), strict=True):
        if spot is None:
            continue
        x, y = to_data((spot.x, spot.y))
        strong = id(p) in chosen
        axes.text(
            x, y, spot.text, ha="center", va="center_baseline", zorder=5,
            fontsize=FONT - (1 if strong else 2.5), color=INK if strong else FAINT,
        )  # fmt: skip
        if spot.end is not None:
            end = to_data(spot.end)
            axes.plot([p.x, end[0]], [p.y, end[1]], color=FAINT, linewidth=0.8, zorder=1)
