"""What a report is made of, before it is a page or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """An entry of a table.

    Attributes:
        text: what is read.
        value: what it is sorted by, where that is not the text.
        heat: share of one, drawn as the depth of the cell's colour.
        tone: "good", "bad", "faint" or "": how it stands out.
        hint: more about it, shown where the pointer rests.
    """

    text: str
    value: float | None = None
    heat: float | None = None
    tone: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: one text a column.
        rows: of texts or `Cell`s.
        left: how many of the first columns are text; the others are figures.
        title: above it.
        note: below it.
        sortable: columns sort when their header is clicked.
        folded: closed until it is opened, on the page.
        compact: as narrow as its contents.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    left: int = 1
    title: str = ""
    note: str = ""
    sortable: bool = False
    folded: bool = False
    compact: bool = False


@dataclass(frozen=True)
class Key:
    """What one line of a plot stands for; see `style.Stroke`."""

    text: str
    color: str
    dash: str
    marker: str


@dataclass(frozen=True)
class Plot:
    """A plot: on the page only."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` as of a `Cell`."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Points:
    """A list of sentences, some with a term that they explain."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text kept as it is; `folded` under its title on the page."""

    text: str
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Legend:
    """What the lines of the plots beside it stand for."""

    keys: Sequence[Key]


@dataclass(frozen=True)
class Beside:
    """Blocks side by side where there is room."""

    blocks: Sequence[Block]


Block = Table | Plot | Text | Points | Code | Heading | Legend | Beside


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading of its own."""

    title: str
    blocks: Sequence[Block]
