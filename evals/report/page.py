"""Blocks as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .blocks import (
    Beside,
    Block,
    Cell,
    Code,
    Heading,
    Key,
    Legend,
    Plot,
    Points,
    Section,
    Table,
    Text,
)
from .style import VARIABLES

_HERE = Path(__file__).parent
_LONG = 38  # characters of a cell, from which on its text is broken into lines
# What the browser itself then refuses to load: everything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(
        f'<li><a href="#part-{i}">{escape(section.title)}</a></li>'
        for i, section in enumerate(sections)
    )
    body = "\n".join(
        f'<section id="part-{i}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(map(render, section.blocks))
        + "\n</section>"
        for i, section in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_file("style.css")}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<nav aria-label="Contents"><ul>{links}</ul></nav>
{body}
</main>
<script>
{_file("sort.js")}</script>
</body>
</html>
"""


def render(block: Block) -> str:
    """One block."""
    match block:
        case Table():
            return _table(block)
        case Plot():
            note = f"<p>{escape(block.note)}</p>" if block.note else ""
            name = block.svg.split('aria-labelledby="', 1)[1].split('"', 1)[0]
            caption = f'<figcaption><strong id="{name}">{escape(block.title)}</strong></figcaption>'
            return f'<figure>{caption}<div class="scroll">{block.svg}</div>{note}</figure>'
        case Text():
            return f"<p{_class(block.tone)}>{escape(block.text)}</p>"
        case Points():
            items = (f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in block.items)
            return f"<dl>{''.join(items)}</dl>"
        case Code():
            code = f'<pre tabindex="0">{escape(block.text)}</pre>'
            return _folded(block.title, code, block.folded)
        case Heading():
            return f"<h3>{escape(block.text)}</h3>"
        case Legend():
            return f'<ul class="legend">{"".join(map(_key, block.keys))}</ul>'
        case Beside():
            return f'<div class="beside">{"".join(map(render, block.blocks))}</div>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_class("text" if i < table.left else "")}>{escape(name)}</th>'
        for i, name in enumerate(table.header)
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(x, i < table.left) for i, x in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    kinds = " ".join(
        name for name, there in (("sortable", table.sortable), ("compact", table.compact)) if there
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    inner = (
        f'<div class="scroll" tabindex="0"><table{_class(kinds)}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{note}"
    )
    if table.compact:
        return f'<div class="grid"><h4>{escape(table.title)}</h4>{inner}</div>'
    title = f"{table.title} ({len(table.rows)})" if table.folded and table.title else table.title
    return _folded(title, inner, table.folded)


def _folded(title: str, inner: str, folded: bool) -> str:
    if folded:
        return f"<details><summary>{escape(title or 'Show')}</summary>\n{inner}</details>"
    return f"<h4>{escape(title)}</h4>\n{inner}" if title else inner


def _cell(cell: Cell | str, text: bool) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
    heat = "" if cell.heat is None else f' style="--heat:{100 * cell.heat:.0f}%"'
    kinds = ("text" if text else "", "long" if len(cell.text) > _LONG else "", cell.tone)
    names = " ".join(filter(None, [*kinds, "heat" if heat else ""]))
    return f"<td{_class(names)}{value}{hint}{heat}>{escape(cell.text)}</td>"


def _key(key: Key) -> str:
    color = VARIABLES[key.color]
    dash = f' stroke-dasharray="{key.dash}"' if key.dash else ""
    return (
        f'<li><svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true" '
        f'style="color:{color}"><path d="M0 6H34" stroke="currentColor" stroke-width="2"{dash}/>'
        f'<path d="{_SHAPES[key.marker]}" fill="currentColor"/></svg>{escape(key.text)}</li>'
    )


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


# The markers of `style.Stroke` about the middle of a legend's swatch.
_SHAPES = {
    "o": "M13 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "s": "M13.3 2.3h7.4v7.4h-7.4z",
    "D": "M17 1l5 5l-5 5l-5 -5z",
    "^": "M17 1.6l4.4 8h-8.8z",
    "v": "M17 10.4l4.4 -8h-8.8z",
    "P": "M15.6 1.8h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
    "X": "M14.6 1.6l2.4 2.4l2.4 -2.4l2 2l-2.4 2.4l2.4 2.4l-2 2l-2.4 -2.4l-2.4 2.4l-2 -2"
    "l2.4 -2.4l-2.4 -2.4z",
    "*": "M17 0.8l1.4 3.6l3.9 .2l-3 2.4l1 3.8l-3.3 -2.1l-3.3 2.1l1 -3.8l-3 -2.4l3.9 -.2z",
}
