"""Where the labels of a scatter plot go so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .svg import FONT

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels

# Directions in the order in which they are tried. What lies on a Pareto front has nothing to its
# lower left, so there its label may go farther off before another side is tried.
_CLEAR = ((-1, -1), (0, -1), (-1, 0))
_OTHERS = ((1, 1), (1, 0), (0, 1), (1, -1), (-1, 1))
_DISTANCES = (7.0, 16.0, 28.0, 42.0, 60.0, 80.0)
_NEAR = 12.0  # a label farther off gets a line to its point
_CHARACTER = 0.58  # of the font size: a mean width
_POINT = 5.0


@dataclass(frozen=True)
class Label:
    """A text beside a point.

    Attributes:
        at: the point, in pixels.
        texts: what to write, the first that finds room.
        far: it may stand away from its point, tied to it by a line.
        needed: it is written even where it covers something.
    """

    at: tuple[float, float]
    texts: Sequence[str]
    far: bool = False
    needed: bool = False


@dataclass(frozen=True)
class Placed:
    """A label that found room.

    Attributes:
        text: what is written.
        x, y: the middle of its box.
        end: of the line from its point to its box; None where it is near enough without.
    """

    text: str
    x: float
    y: float
    end: tuple[float, float] | None


def place(
    labels: Sequence[Label], points: Sequence[tuple[float, float]], frame: Box, size: float = FONT
) -> list[Placed | None]:
    """Place labels, the first first.

    Args:
        labels: what to write, and where.
        points: everything that must not be covered, in pixels.
        frame: the axes' box, which labels do not leave.
        size: of the font.
    """
    points_taken = [_around(point, _POINT) for point in points]
    written: list[Box] = []
    lines: list[Box] = []
    found: list[Placed | None] = []
    for label in labels:
        best = _free(label, points_taken + lines, written, frame, size)
        if best is None and label.needed:
            best = _candidate(label.at, label.texts[-1], _CLEAR[0], _DISTANCES[0], size)
        if best is None:
            found.append(None)
            continue
        placed, box = best
        written.append(box)
        lines += _line(label, placed)
        found.append(placed)
    return found


def along(a: Sequence[float], b: Sequence[float], step: float = 6.0) -> list[tuple[float, float]]:
    """Points on the way from a to b, close enough that no label slips between."""
    count = int(max(abs(b[0] - a[0]), abs(b[1] - a[1])) / step) + 1
    return [
        (a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count)
        for i in range(count + 1)
    ]


def _free(
    label: Label, taken: Sequence[Box], written: Sequence[Box], frame: Box, size: float
) -> tuple[Placed, Box] | None:
    """The first candidate inside the frame that meets nothing, and whose line crosses no text."""
    for text in label.texts:
        for distance, direction in _tries(label.far):
            placed, box = _candidate(label.at, text, direction, distance, size)
            if (
                _inside(box, frame)
                and not any(_meet(box, other) for other in (*taken, *written))
                and not any(_meet(x, other) for x in _line(label, placed) for other in written)
            ):
                return placed, box
    return None


def _line(label: Label, placed: Placed) -> list[Box]:
    """Boxes along the line that ties a label to its point."""
    return [_around(x, 1.0) for x in along(label.at, placed.end)] if placed.end else []


def _around(point: Sequence[float], by: float) -> Box:
    return (point[0] - by, point[1] - by, point[0] + by, point[1] + by)


def _tries(far: bool) -> list[tuple[float, tuple[int, int]]]:
    clear = [(d, direction) for d in _DISTANCES[: None if far else 1] for direction in _CLEAR]
    return clear + [(_DISTANCES[0], direction) for direction in _OTHERS]


def _candidate(
    at: tuple[float, float], text: str, direction: tuple[int, int], distance: float, size: float
) -> tuple[Placed, Box]:
    width, height = _CHARACTER * size * len(text), 0.95 * size
    slant = 0.72 if all(direction) else 1.0
    x = at[0] + direction[0] * (slant * distance + width / 2)
    y = at[1] + direction[1] * (slant * distance + height / 2)
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    end = (x - direction[0] * width / 2, y - direction[1] * height / 2)
    return Placed(text, x, y, end if distance > _NEAR else None), box


def _inside(box: Box, frame: Box) -> bool:
    return all((box[0] >= frame[0], box[1] >= frame[1], box[2] <= frame[2], box[3] <= frame[3]))


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
