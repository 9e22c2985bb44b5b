"""What sections are made of; a measurement's own section is built of these too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .text import number, plain

if TYPE_CHECKING:  # the command line's --help does without pandas
    from pandas import DataFrame


@dataclass
class Text:
    """A "paragraph", a "heading" over the rows of one model, a "warning", or "code" to copy."""

    text: str
    kind: str = "paragraph"


@dataclass
class Plot:
    """A figure as SVG, with its title and a note; the page has it, Markdown does not."""

    title: str
    svg: str
    note: str = ""
    kind: str = "plot"


@dataclass
class Table:
    """A table whose columns sort by their values.

    Attributes:
        values: a line a row; columns are the heads.
        formats: by column, how a value is shown; `text.plain` where there is none.
        left: how many of the first columns are texts.
        title, note: above it, and below it.
        bold: the rows, by position, whose texts are bold.
        folded: whether it is hidden under its title at first.
        kind: "grid" for a small table whose cells are coloured by their values, 0 to 1; where
            there is little room, rows are paragraphs of "verdicts" and "reasons", and of "wide"
            tables paragraphs in which every figure has its head before it.
        texts: by row of `values.index` and column, what is shown instead of the value.
    """

    values: DataFrame
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    left: int = 1
    title: str = ""
    note: str = ""
    bold: Sequence[bool] = ()
    folded: bool = False
    kind: str = "table"
    texts: Mapping[tuple[Any, str], str] = field(default_factory=dict)

    @property
    def header(self) -> list[str]:
        """The heads."""
        return [str(name) for name in self.values.columns]

    def rows(self) -> list[list[tuple[str, float | None]]]:
        """Of every cell what is shown, and the number to sort by, None for a text."""
        shown = [self.formats.get(name, plain) for name in self.header]
        return [
            [
                (self.texts.get((key, name)) or show(value), number(value))
                for name, show, value in zip(self.header, shown, values, strict=True)
            ]
            for key, *values in self.values.itertuples(name=None)
        ]


@dataclass
class Section:
    """A part of the report: its title, what is in it, and what its figures mean."""

    title: str
    blocks: Sequence[Text | Plot | Table]
    meaning: str = ""
