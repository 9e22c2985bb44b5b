"""Blocks as GitHub's Markdown; plots are left to the page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..tables import markdown
from .blocks import Beside, Block, Cell, Code, Heading, Points, Section, Table, Text


def document(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    parts = [
        f"# {escape(title)}",
        "Plots, if any, are in report.html; every figure is in rows.csv.",
    ]
    for section in sections:
        parts.append(f"## {escape(section.title)}")
        parts += [text for block in section.blocks if (text := render(block))]
    return "\n\n".join(parts) + "\n"


def render(block: Block) -> str:
    """One block; empty if it is for the page only."""
    match block:
        case Table():
            return _table(block)
        case Text():
            text = escape(block.text)
            return f"**{text}**" if block.tone == "bad" else text
        case Points():
            return "\n".join(f"- **{escape(term)}**: {escape(text)}" for term, text in block.items)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            code = f"{fence}\n{block.text}\n{fence}"
            if block.folded:
                title = escape(block.title)
                return f"<details><summary>{title}</summary>\n\n{code}\n\n</details>"
            return f"{escape(block.title)}:\n\n{code}" if block.title else code
        case Heading():
            return f"### {escape(block.text)}"
        case Beside():
            return "\n\n".join(text for inner in block.blocks if (text := render(inner)))
    return ""


def escape(text: str) -> str:
    """A text without what Markdown or HTML would take for their own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _table(table: Table) -> str:
    rows = [[_cell(x) for x in row] for row in table.rows]
    parts = [f"**{escape(table.title)}**"] if table.title else []
    parts.append(markdown([escape(x) for x in table.header], rows, table.left))
    parts += [escape(table.note)] if table.note else []
    return "\n\n".join(parts)


def _cell(cell: Cell | str) -> str:
    return escape(cell.text if isinstance(cell, Cell) else cell)
