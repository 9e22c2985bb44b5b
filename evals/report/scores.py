"""Tables of the measurements that have no plot: agreement, lm-eval's scores, any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Cell, Heading, Section, Table
from .names import Names, Row, measured, part
from .text import clean, fixed, number, plain, share, shorten, significant, whole

KNOWN = ("perplexity", "memory", "speed", "needle", "agreement", "lm_eval")


def agreement(rows: Sequence[Row], names: Names) -> Section | None:
    """How long greedy text stays the uncompressed cache's."""
    header = ("cache", "mean tokens", "median", "identical", "prompts", "new tokens each")
    blocks: list = []
    for name, members in names.panels(measured(rows, "agreement")):
        table = []
        for row in members:
            result = part(row, "result")
            cells = [
                Cell(fixed(result.get(key), 1), number(result.get(key)))
                for key in ("mean_length", "median_length")
            ]
            cells += [
                Cell(whole(result.get(key)), number(result.get(key)))
                for key in ("identical", "prompts", "new_tokens")
            ]
            table.append((names.cache(row), *cells))
        blocks += [Heading(name), Table(header, table, sortable=True)]
    return Section("Agreement of generated text", blocks) if blocks else None


def lm_eval(rows: Sequence[Row], names: Names) -> Section | None:
    """Scores of lm-eval, with their standard errors."""
    blocks: list = []
    for name, members in names.panels(measured(rows, "lm_eval")):
        scores = [(row, _scores(part(row, "result"))) for row in members]
        columns = list(dict.fromkeys(column for _, found in scores for column in found))
        table = []
        for row, found in scores:
            compressed = part(row, "result").get("compressed_share")
            cells = [found.get(column, Cell("–", tone="faint")) for column in columns]
            table.append((names.cache(row), Cell(share(compressed), number(compressed)), *cells))
        header = ("cache", "compressed", *columns)
        note = "± one standard error."
        blocks += [Heading(name), Table(header, table, note=note, sortable=True)]
    return Section("lm-eval", blocks) if blocks else None


def _scores(result: Mapping[str, Any]) -> dict[str, Cell]:
    """By task and metric; a metric `x_stderr` (or lm-eval's `x_stderr,filter`) is x's error."""
    found = {}
    for task, metrics in part(result, "scores").items():
        if not isinstance(metrics, Mapping):
            metrics = {"": metrics}
        for metric, value in metrics.items():
            if "_stderr" in str(metric) or number(value) is None:
                continue
            base, comma, filter_ = str(metric).partition(",")
            error = number(metrics.get(f"{base}_stderr{comma}{filter_}"))
            text = significant(value) + (f" ± {significant(error, 2)}" if error is not None else "")
            found[clean(f"{task} {metric}")] = Cell(text, number(value))
    return found


def others(rows: Sequence[Row], names: Names) -> list[Section]:
    """A section for each measurement that this report knows nothing of."""
    found = []
    for kind in dict.fromkeys(clean(row.get("measurement")) for row in rows):
        same = [row for row in rows if clean(row.get("measurement")) == kind]
        chosen = [] if kind in KNOWN else measured(same, same[0].get("measurement"))
        blocks: list = []
        for name, members in names.panels(chosen):
            columns = list(dict.fromkeys(k for row in members for k in part(row, "result")))
            columns = [k for k in columns if k != "warnings"]
            table = [(names.cache(row), *_generic(part(row, "result"), columns)) for row in members]
            header = ("cache", *map(clean, columns))
            blocks += [Heading(name), Table(header, table, sortable=True)]
        if blocks:
            found.append(Section("No measurement named" if kind == "None" else kind, blocks))
    return found


def _generic(result: Mapping[str, Any], columns: Sequence[str]) -> list[Cell]:
    cells = []
    for name in columns:
        value = result.get(name)
        if number(value) is not None:
            cells.append(
                Cell(
                    whole(value) if isinstance(value, int) else significant(value, 4), number(value)
                )
            )
        else:
            text = "–" if value is None else shorten(plain(value), 80)
            cells.append(Cell(text, hint=plain(value) if len(plain(value)) > 80 else ""))
    return cells
