"""Reports of measured rows: a page with plots, Markdown tables, a CSV file.

`write(rows, headers, out, title)` makes all three. Sections (`quality.py`, `memory.py`, ...) turn
rows into blocks (`blocks.py`); `page.py` and `markdown.py` turn blocks into text.
"""

from .write import write

__all__ = ["write"]
