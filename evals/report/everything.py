"""The table of all rows, whatever became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .blocks import Cell, Section, Table
from .names import Names, Row, part, points, warnings
from .overview import reason, setting, status
from .text import (
    clean,
    count,
    fixed,
    number,
    plain,
    share,
    shorten,
    significant,
    size,
    thousands,
    whole,
)

_HEADER = ("status", "model", "cache", "measurement", "figures", "remarks", "seconds", "finished")


def section(rows: Sequence[Row], names: Names) -> Section:
    """The last section."""
    table = [_entry(row, names) for row in rows]
    note = "Every option and figure is in rows.csv."
    return Section("All rows", [Table(_HEADER, table, left=6, note=note, sortable=True)])


def _entry(row: Row, names: Names) -> tuple[Cell | str, ...]:
    ok, warned = row.get("status") == "ok", warnings(row)
    remarks = "; ".join(f"⚠ {text}" for text in warned)
    if not ok:
        remarks = reason(row)
    elif row.get("error"):
        remarks = "; ".join(filter(None, [remarks, clean(row["error"])]))
    return (
        Cell(status(row), tone="" if ok else "bad"),
        names.subject(row),
        names.cache(row),
        setting(row, names),
        figures(row),
        Cell(remarks, tone="bad" if remarks else ""),
        Cell(fixed(row.get("seconds"), 1), number(row.get("seconds"))),
        clean(row.get("finished") or "–"),
    )


def figures(row: Row) -> str:
    """The result of a row in a few words."""
    result = part(row, "result")
    if not result:
        return "–"
    return _SUMMARIES.get(str(row.get("measurement")), _any)(result, row)


def _perplexity(result: Mapping[str, Any], row: Row) -> str:
    bits = fixed(result.get("bits_per_number_16bit"))
    return (
        f"{bits} bits, KL {significant(result.get('kl_mean'))}, "
        f"Δ {significant(result.get('delta'), 2, sign=True)}"
    )


def _memory(result: Mapping[str, Any], row: Row) -> str:
    point = _longest(row)
    return f"{size(point.get('cache_bytes'))} at {_context(point)}"


def _speed(result: Mapping[str, Any], row: Row) -> str:
    point = _longest(row)
    prefill, decode = (significant(point.get(f"{x}_tokens_per_s")) for x in ("prefill", "decode"))
    return f"prefill {prefill}, decode {decode} tokens/s at {_context(point)}"


def _needle(result: Mapping[str, Any], row: Row) -> str:
    return f"{share(result.get('accuracy'))} right of {whole(result.get('asked'))}"


def _agreement(result: Mapping[str, Any], row: Row) -> str:
    return (
        f"{fixed(result.get('mean_length'), 1)} tokens, "
        f"{whole(result.get('identical'))} of {whole(result.get('prompts'))} identical"
    )


def _lm_eval(result: Mapping[str, Any], row: Row) -> str:
    tasks = list(map(clean, part(result, "scores")))
    return f"{count(len(tasks), 'task')}: {shorten(', '.join(tasks), 60)}"


def _any(result: Mapping[str, Any], row: Row) -> str:
    scalars = [f"{clean(k)} {plain(v)}" for k, v in result.items() if number(v) is not None]
    return shorten(", ".join(scalars), 80) or "–"


def _longest(row: Row) -> Mapping[str, Any]:
    return max(points(row), key=lambda p: number(p.get("context")) or 0, default={})


def _context(point: Mapping[str, Any]) -> str:
    x = number(point.get("context"))
    return "–" if x is None else thousands(x)


_SUMMARIES: dict[str, Callable[[Mapping[str, Any], Row], str]] = {
    "perplexity": _perplexity,
    "memory": _memory,
    "speed": _speed,
    "needle": _needle,
    "agreement": _agreement,
    "lm_eval": _lm_eval,
}
