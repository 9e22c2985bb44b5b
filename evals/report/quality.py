"""Quality against size: KL divergence and perplexity over bits per number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import plots
from .blocks import Beside, Cell, Heading, Plot, Section, Table
from .names import Names, Row, is_baseline, measured, part, warnings
from .text import fixed, number, share, significant

_HEADER = (
    "#",
    "cache",
    "front",
    "bits",
    "on long texts",
    "KL mean",
    "KL p99",
    "top-1",
    "perplexity",
    "Δ perplexity",
    "95% interval",
    "compressed",
)
# In 16 bits, also of models that were measured in float32: there exact tokens, and the scales of
# quanto and HQQ, would take twice as much.
_TOTAL, _PACKED = "bits_per_number_16bit", "packed_bits_per_number_16bit"
_BITS = "bits per number in a 16-bit model, everything counted"
_LONG_BITS = "bits per number in a 16-bit model, exact tokens left out"


def section(rows: Sequence[Row], names: Names) -> Section | None:
    """The section, or None without rows that have figures."""
    panels = names.panels(measured(rows, "perplexity"))
    blocks = [
        block
        for i, (name, members) in enumerate(panels)
        for block in _panel(f"quality-{i}", name, members, names)
    ]
    return Section("Quality against bits", blocks) if blocks else None


def _panel(slug: str, name: str, rows: Sequence[Row], names: Names) -> list:
    ordered = sorted(rows, key=_order)
    baselines = [row for row in ordered if is_baseline(row)]
    others = [row for row in ordered if not is_baseline(row)]
    numbered = list(enumerate(others, start=1))
    divergences = _points(numbered, "kl_mean", names)
    drawn = [point for point in divergences if point.y > 0]
    best = {point.number for point in plots.on_front(drawn)}
    figures = []
    if drawn:
        level = next((x for row in baselines if (x := _figure(row, "kl_mean")) and x > 0), None)
        noise = None if level is None else (level, "rounding noise")
        svg = plots.frontier(f"{slug}-kl", _BITS, "mean KL divergence (nats)", drawn, noise)
        note = _kl_note([p for p in divergences if p.y <= 0], drawn, baselines)
        figures.append(Plot("KL divergence to the uncompressed cache", svg, note))
    packed = [p for p in _points(numbered, "kl_mean", names, _PACKED) if p.y > 0]
    if packed:
        svg = plots.frontier(f"{slug}-long", _LONG_BITS, "mean KL divergence (nats)", packed, None)
        figures.append(Plot("The same, by the bits that long texts come near to", svg, _LONG_NOTE))
    deltas = _points(numbered, "delta", names)
    if deltas:
        svg = plots.intervals(f"{slug}-delta", _BITS, "change in perplexity", deltas)
        figures.append(Plot("Change in perplexity", svg, _delta_note(deltas)))
    table = [_entry(None, row, False, names) for row in baselines]
    table += [_entry(n, row, n in best, names) for n, row in numbered]
    note = "● on the Pareto front: no other cache here has fewer bits and less divergence."
    beside = [Beside(figures)] if figures else []
    return [Heading(name), *beside, Table(_HEADER, table, left=3, note=note, sortable=True)]


_LONG_NOTE = (
    "Only what is stored quantised, with its scales, statistics, tables and spare room: on long "
    "texts the exact tokens weigh nothing. Numbers as in the table."
)


def _order(row: Row) -> tuple[float, float]:
    return (
        _figure(row, _TOTAL) or float("inf"),
        _figure(row, "kl_mean") or float("inf"),
    )


def _figure(row: Row, name: str) -> float | None:
    return number(part(row, "result").get(name))


def _points(
    numbered: Sequence[tuple[int, Row]], figure: str, names: Names, across: str = _TOTAL
) -> list[plots.Point]:
    found = []
    for n, row in numbered:
        x, y = _figure(row, across), _figure(row, figure)
        if x is None or y is None:
            continue
        low, high = _interval(row) if figure == "delta" else (None, None)
        label = names.cache(row)
        hint = (
            f"#{n} {label}: {fixed(x)} bits, KL {significant(_figure(row, 'kl_mean'))}, "
            f"Δ perplexity {significant(_figure(row, 'delta'), sign=True)}"
        )
        found.append(plots.Point(x, y, n, label, hint, low, high, bool(warnings(row))))
    return found


def _interval(row: Row) -> tuple[float | None, float | None]:
    ends = part(row, "result").get("delta_ci95")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None, None
    low, high = (number(x) for x in ends)
    return (low, high) if low is not None and high is not None else (None, None)


def _kl_note(
    zeros: Sequence[plots.Point], drawn: Sequence[plots.Point], baselines: Sequence[Row]
) -> str:
    sentences = ["Lower left is better; the line is the Pareto front; numbers as in the table."]
    if baselines:
        noise = significant(_figure(baselines[0], "kl_mean"), 2)
        sentences.append(f"The uncompressed cache's own rounding noise is {noise} nats.")
    if zeros:
        listed = ", ".join(point.label for point in zeros)
        sentences.append(f"Not on a logarithmic axis, as the divergence is 0 or less: {listed}.")
    if any(point.doubtful for point in drawn):
        sentences.append("Crosses: the row has warnings; kept off the front.")
    return " ".join(sentences)


def _delta_note(points: Sequence[plots.Point]) -> str:
    if all(point.low is None for point in points):
        return "One window only, so there is no interval. Numbers as in the table."
    return (
        "Bars: 95% intervals over the documents; one that crosses 0 is no proven change. "
        "Numbers as in the table."
    )


def _entry(n: int | None, row: Row, best: bool, names: Names) -> tuple[Cell | str, ...]:
    result, warned = part(row, "result"), warnings(row)
    label = names.cache(row) + (" ⚠" if warned else "")
    low, high = _interval(row)
    interval = "–" if low is None else f"{_signed(low)} to {_signed(high)}"
    return (
        Cell("" if n is None else str(n), 0 if n is None else n, tone="faint"),
        Cell(label, tone="bad" if warned else "good" if best else "", hint="; ".join(warned)),
        Cell("●" if best else "", float(best), tone="good"),
        _cell(fixed, result, _TOTAL),
        _cell(fixed, result, _PACKED),
        _cell(significant, result, "kl_mean"),
        _cell(significant, result, "kl_p99"),
        Cell(share(result.get("top1_agreement"), 2), number(result.get("top1_agreement"))),
        _cell(lambda x: fixed(x, 3), result, "perplexity"),
        _cell(_signed, result, "delta"),
        Cell(interval, low),
        Cell(share(result.get("compressed_share")), number(result.get("compressed_share"))),
    )


def _cell(format_: Callable[[Any], str], result: Mapping[str, Any], name: str) -> Cell:
    return Cell(format_(result.get(name)), number(result.get(name)))


def _signed(x: float | None) -> str:
    return significant(x, 2, sign=True)
