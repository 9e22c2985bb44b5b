"""The sections of the measurements that the report knows, and one for any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from ..verify import SAFE
from . import plots
from .blocks import Plot, Section, Table, Text
from .frames import figures, part, points, texts
from .text import (
    change,
    clean,
    figure,
    fixed,
    number,
    share,
    significant,
    size,
    thousands,
    times,
    whole,
)
from .verdict import interval_of, judge

_MANY = 12  # rows of a table, from which on it is folded under plots
_BITS, _LONG_BITS = "bits_per_number_16bit", "long_bits_per_number_16bit"
_PACKED_BITS = "packed_bits_per_number_16bit"

Column = tuple[str, str, Callable[[Any], str]]
"""Its head, the field, and how a value is shown."""


def table_of(data: DataFrame, columns: Sequence[Column], **more: Any) -> Table:
    """A table of some columns of a frame."""
    heads, fields, shown = zip(*columns, strict=True)
    values = data.reindex(columns=fields).set_axis(heads, axis=1)
    return Table(values, dict(zip(heads, shown, strict=True)), **more)


def panels(
    data: DataFrame, make: Callable[[DataFrame], list[Any]], key: Any = "panel"
) -> list[Any]:
    """What `make` makes of the lines of each model and setting, under a heading."""
    groups = data.groupby(key, sort=False)
    return [x for name, group in groups for x in (Text(str(name), "heading"), *make(group))]


_CACHE: Column = ("cache", "cache", str)

# Quality

_QUALITY: list[Column] = [
    ("#", "number", whole),
    _CACHE,
    ("verdict", "verdict", str),
    ("front", "mark", str),
    ("bits (16-bit model)", _BITS, fixed),
    ("bits, long texts", _LONG_BITS, fixed),
    ("KL mean", "kl_mean", significant),
    ("KL p99", "kl_p99", significant),
    ("KL, code readers", "kl_readers", significant),
    ("top-1", "top1_agreement", lambda x: share(x, 2)),
    ("perplexity", "perplexity", lambda x: fixed(x, 3)),
    ("change", "change", change),
    ("95% interval", "interval", str),
    ("read quantised", "compressed_share", share),
    ("tokens", "tokens", whole),
    ("windows", "windows", whole),
]


def perplexity(found: DataFrame) -> list[Any]:
    """Quality against bits: plots with Pareto fronts, and a table."""
    records: list[Any] = found.to_dict("records")
    names = {field for _, field, _ in _QUALITY} | {"baseline_perplexity", "delta", _PACKED_BITS}
    table = figures(found, sorted(names - {"cache"}))
    # Rows recorded without it have what is near.
    table[_LONG_BITS] = table[_LONG_BITS].fillna(table[_PACKED_BITS])
    readers = [part(record, "code_readers").get("kl_mean") for record in records]
    table["kl_readers"] = Series([number(x) for x in readers], dtype=float)
    table["verdict"] = [judge(record).word for record in records]
    table["notes"] = [texts(record.get("notes")) for record in records]
    ends = DataFrame([interval_of(record) or (None, None) for record in records], dtype=float)
    table[["low", "high"]] = ends.div(table["baseline_perplexity"], axis=0).to_numpy()
    table["change"] = table["delta"] / table["baseline_perplexity"]
    table["interval"] = _between(table["low"], table["high"], change)
    table["safe"] = (table["verdict"] == SAFE) & ~table["baseline"]
    warned = [bool(texts(record.get("warnings"))) for record in records]
    table["doubtful"] = Series(warned, dtype=bool) & (table["compressed_share"] > 0)
    table["verdict"] = table["verdict"].mask(table["baseline"], "uncompressed")
    return panels(table, _quality)


def _quality(table: DataFrame) -> list[Any]:
    table = table.sort_values([_BITS, "kl_mean"])
    baselines, others = table[table["baseline"]], table[~table["baseline"]].copy()
    others["number"] = range(1, len(others) + 1)
    noise = baselines["kl_mean"].where(lambda x: x > 0).min()
    drawn: list[Any] = []
    fronts = []
    for bits, title, label in _FRONTS:
        dots = others.assign(x=others[bits], y=others["kl_mean"]).dropna(subset=["x", "y"])
        dots = dots[dots["y"] > 0]
        sound = dots[~dots["doubtful"]]
        best = sound.index[plots.front(list(zip(sound["x"], sound["y"], strict=True)))]
        fronts.append(best)
        if len(dots):
            dots["front"] = dots.index.isin(best)
            name = f"bits-{table.index[0]}-{len(drawn)}"
            svg = plots.frontier(name, label, dots, noise)
            drawn.append(Plot(title, svg, _front_note(others, noise) if bits == _BITS else _LONG))
    dots = others.assign(x=others[_BITS], y=others["change"]).dropna(subset=["x", "y"])
    dots[["y", "low", "high"]] *= 100
    if len(dots):
        one = dots["low"].isna().all()
        note = "One window only: no interval." if one else "Bars: 95% intervals; one that crosses "
        svg = plots.intervals(f"change-{table.index[0]}", _FRONTS[0][2], dots)
        note += "" if one else "0 is no proven change."
        drawn.append(Plot("Change in perplexity", svg, note))
    shown = pd.concat([baselines, others])
    shown["mark"] = ["●" if i in fronts[0] else "" for i in shown.index]
    shown["cache"] += shown["doubtful"].map({True: " ⚠", False: ""})
    note = "● on the Pareto front: no other cache here has fewer bits and less divergence. Bold: "
    note += "safe. Bits: per element in a 16-bit model; of long texts: codes and scales alone."
    for text in dict.fromkeys(text for notes in shown["notes"] for text in notes):
        note += f" {', '.join(shown['cache'][[text in x for x in shown['notes']]])}: {text}."
    columns = [x for x in _QUALITY if x[1] != "kl_readers" or shown["kl_readers"].notna().any()]
    bold = list(shown["safe"])
    return [*drawn, table_of(shown, columns, left=4, note=note, bold=bold, kind="wide")]


_FRONTS = (
    (_BITS, "KL divergence against all bits", "bits per element, 16-bit model, everything counted"),
    (
        _LONG_BITS,
        "KL divergence against bits on long texts",
        "bits per element on long texts: codes and scales alone",
    ),
)
"""Figures of bits, the titles of their plots, and the labels of their axes."""

_LONG = (
    "The same KL divergence, of all tokens. Across: what the bits of longer and longer texts come "
    "near to."
)


def _front_note(others: DataFrame, noise: float) -> str:
    note = "Lower left is better; the line is the Pareto front. Blue: safe. Numbers: see table."
    if noise > 0:
        note += f" Rounding alone makes {significant(noise, 2)} nats."
    if others["doubtful"].any():
        note += " Crosses: the row has warnings; kept off the front."
    zero = others["cache"][others["kl_mean"] <= 0]
    return note + (f" Divergence of 0 or less, not drawn: {', '.join(zero)}." if len(zero) else "")


def _between(low: Series, high: Series, shown: Callable[[Any], str]) -> list[str]:
    pairs = zip(low, high, strict=True)
    return ["–" if pd.isna(a) or pd.isna(b) else f"{shown(a)} to {shown(b)}" for a, b in pairs]


# Memory and speed against context

_PLACE = ["panel", "batch", "context"]


def against_context(found: DataFrame, fields: list[str], ratios: Mapping[str, str]) -> Any:
    """Points, and by name the ratio of a figure to the uncompressed cache's at the same place."""
    table = figures(points(found), ["batch", "context", *fields])
    for name, field in ratios.items():
        base = table[table["baseline"]].groupby(_PLACE, dropna=False)[field].first()
        base = table[_PLACE].join(base, on=_PLACE)[field]
        table[name] = table[field] / base.where(base > 0)
    return table


def _context(
    kind: str, table: DataFrame, drawn: Mapping[str, tuple[str, str, list[str]]], rest: Callable
) -> list[Any]:
    """Plots of a measurement's points, and the tables that `rest` makes of those of a panel.

    Args:
        kind: the name of the measurement.
        table: from `against_context`.
        drawn: by field, the title of its plot, its unit, and the fields of its spread.
        rest: of the points of a panel.
    """
    styles = plots.styles(table["cache"], table["cache"][table["baseline"]])
    blocks: list[Any] = []
    groups: Any = table.groupby(["panel", "batch"], sort=False, dropna=False)
    for i, ((panel, batch), group) in enumerate(groups):
        name = panel if pd.isna(batch) else f"{panel}, batch {whole(batch)}"
        blocks.append(Text(name, "heading"))
        for field, (title, unit, ends) in drawn.items():
            low, high = (group[end] for end in ends) if ends else (float("nan"), float("nan"))
            dots = group.assign(x=group["context"], y=group[field], low=low, high=high)
            dots = dots[(dots["x"] > 0) & (dots["y"] >= 0)]
            if len(dots):
                note = "Medians; bars from the 10th to the 90th percentile. " if ends else ""
                svg = plots.lines(f"{kind}-{i}-{field}", unit, dots, styles)
                blocks.append(Plot(title, svg, note + _overlaps(dots)))
        blocks += rest(group)
    return blocks


def _overlaps(dots: DataFrame) -> str:
    """A sentence on the lines that hide each other; empty if none do."""
    alike: dict[Any, list[str]] = {}
    for cache, group in dots.groupby("cache", sort=False):
        line = [(x, float(f"{y:.2g}")) for x, y in zip(group["x"], group["y"], strict=True)]
        alike.setdefault(tuple(line), []).append(str(cache))
    hidden = [names for names in alike.values() if len(names) > 1]
    return " ".join(f"{', '.join(names[:-1])} and {names[-1]} overlap." for names in hidden)


def stored(found: DataFrame) -> DataFrame:
    """The points of memory, and how much `smaller` than the uncompressed cache each is."""
    names = ["cache_bytes", "peak_prefill_bytes", "peak_decode_bytes", _BITS, "bits_per_number"]
    table = against_context(found, names, {"smaller": "cache_bytes"})
    table["parts"] = points(found).reindex(columns=["parts"])["parts"].to_numpy()
    return table.assign(smaller=1 / table["smaller"].where(table["smaller"] > 0))


def memory(found: DataFrame) -> list[Any]:
    """Bytes of the cache, and peaks, against context."""
    drawn: dict[str, tuple[str, str, list[str]]] = {
        "cache_bytes": ("Bytes of the cache", "bytes", []),
        "peak_prefill_bytes": ("Peak while prefilling, above the model's own", "bytes", []),
        "peak_decode_bytes": ("Peak while decoding, above the model's own", "bytes", []),
    }
    return _context("memory", stored(found), drawn, _memory_tables)


def _memory_tables(table: DataFrame) -> list[Table]:
    dtypes = ", ".join(dict.fromkeys(table["dtype"]))
    half = table[_BITS].notna().any()
    bits = ("bits (16-bit model)", _BITS) if half else (f"bits ({dtypes})", "bits_per_number")
    columns: list[Column] = [
        _CACHE,
        ("context", "context", whole),
        (*bits, fixed),
        ("bytes of the cache", "cache_bytes", size),
        ("smaller", "smaller", times),
        ("peak of prefill", "peak_prefill_bytes", size),
        ("peak of decoding", "peak_decode_bytes", size),
    ]
    note = f"Bytes as measured in {dtypes}. “Smaller”: than the uncompressed cache of the same "
    note += "context. Prompts are random tokens."
    if "float32" in dtypes:
        note += " In a 16-bit model an uncompressed cache and full-precision tokens take half."
    folded = len(table) > _MANY
    every = table_of(table, columns, title="All points", note=note, folded=folded)
    return [every, *_parts(table)]


def _parts(table: DataFrame) -> list[Table]:
    """Where the bytes are at the longest context of each cache."""
    table = table[[isinstance(x, Mapping) and bool(x) for x in table["parts"]]]
    last = table.sort_values("context").groupby("cache", sort=False).tail(1).sort_index()
    parts = [{_part(name): number(x) for name, x in parts.items()} for parts in last["parts"]]
    shown = last[["cache", "context"]].join(DataFrame(parts, last.index))
    formats = dict.fromkeys(shown.columns[2:], size) | {"context": whole}
    found = Table(shown, formats, title="Where the bytes are", folded=len(shown) > _MANY)
    return [found] if len(shown) else []


def _part(name: Any) -> str:
    """A part of a cache in words; full precision is what is not compressed."""
    return {"exact": "uncompressed"}.get(name) or clean(name).replace("_", " ")


_STAGES = {"prefill": "Prefill", "decode": "Decoding"}


def decoded(found: DataFrame) -> DataFrame:
    """The points of speed, and how much `faster` than the uncompressed cache each decodes."""
    names = [f"{x}_{y}" for x in _STAGES for y in ("tokens_per_s", "p10", "p90")]
    ratios = {"prefill_faster": "prefill_tokens_per_s", "faster": "decode_tokens_per_s"}
    return against_context(found, [*names, "new_tokens", "samples"], ratios)


def speed(found: DataFrame) -> list[Any]:
    """Tokens per second of the whole model, against context."""
    table = decoded(found)
    drawn = {
        f"{stage}_tokens_per_s": (title, "tokens/s", [f"{stage}_p10", f"{stage}_p90"])
        for stage, title in _STAGES.items()
    }
    columns: list[Column] = [_CACHE, ("context", "context", whole)]
    for stage, ratio in zip(_STAGES, ("prefill_faster", "faster"), strict=True):
        table[f"{stage}_spread"] = _between(table[f"{stage}_p10"], table[f"{stage}_p90"], _rate)
        columns += [
            (f"{stage} tokens/s", f"{stage}_tokens_per_s", _rate),
            (f"{stage} p10 to p90", f"{stage}_spread", str),
            (f"{stage} of uncompressed", ratio, times),
        ]
    columns += [("new tokens", "new_tokens", whole), ("samples", "samples", whole)]

    def rest(group: DataFrame) -> list[Table]:
        return [table_of(group, columns, title="All points", folded=len(group) > _MANY)]

    return _context("speed", table, drawn, rest)


def _rate(x: Any) -> str:
    return whole(x) if (number(x) or 0) >= 100 else significant(x)


# Needles, agreement, scores, others

_NEEDLE: list[Column] = [
    _CACHE,
    ("right", "accuracy", share),
    ("chosen right", "choice_accuracy", share),
    ("asked", "asked", whole),
    ("stored quantised", "quantised", whole),
]


def needles(found: DataFrame) -> DataFrame:
    """The summaries of needles."""
    return figures(found, [*(field for _, field, _ in _NEEDLE[1:]), "baseline_accuracy"])


def needle(found: DataFrame) -> list[Any]:
    """Which facts of a long text were found again, by depth and length."""
    every = points(found)
    grid = figures(every, ["length", "depth", "asked", "passed"])
    grid["exact"] = [x is False for x in every.reindex(columns=["quantised"])["quantised"]]

    def make(group: DataFrame) -> list[Any]:
        chosen = grid[(grid["panel"] == group["panel"].iloc[0]) & (grid["asked"] > 0)]
        grids = [_grid(str(name), each) for name, each in chosen.groupby("cache", sort=False)]
        text = Text("* not stored quantised when it was asked for: still at full precision.")
        return [table_of(group, _NEEDLE), *grids, *([text] if chosen["exact"].any() else [])]

    return panels(needles(found), make)


def _grid(cache: str, table: DataFrame) -> Table:
    """Passed of asked, by depth and length."""
    cells = table.groupby(["depth", "length"]).agg(
        {"passed": "sum", "asked": "sum", "exact": "any"}
    )
    rates = (cells["passed"] / cells["asked"]).unstack()
    shown = {
        (depth, thousands(length)): f"{whole(passed)}/{whole(asked)}{'*' if exact else ''}"
        for (depth, length), passed, asked, exact in cells.itertuples()
    }
    rates = rates.rename(columns=thousands).rename_axis(columns=None)
    rates.insert(0, "depth", rates.index)
    formats = {"depth": lambda x: share(x, 0)} | dict.fromkeys(rates.columns[1:], share)
    return Table(rates, formats, title=cache, kind="grid", texts=shown)


def agreement(found: DataFrame) -> list[Any]:
    """How long greedy text stays the uncompressed cache's."""
    columns: list[Column] = [
        _CACHE,
        ("mean tokens", "mean_length", lambda x: fixed(x, 1)),
        ("median", "median_length", lambda x: fixed(x, 1)),
        ("identical", "identical", whole),
        ("prompts", "prompts", whole),
        ("tokens of a prompt", "prompt_tokens", whole),
        ("new tokens each", "new_tokens", whole),
    ]
    table = figures(found, [field for _, field, _ in columns[1:]])
    return panels(table, lambda group: [table_of(group, columns)])


def lm_eval(found: DataFrame) -> list[Any]:
    """Scores of lm-eval, with their standard errors."""
    table = figures(found, ["compressed_share"])[["panel", "cache", "compressed_share"]]
    scores = [_scores(tasks) for tasks in found.reindex(columns=["scores"])["scores"]]
    shown = {(i, name): text for i, each in enumerate(scores) for name, (_, text) in each.items()}
    table = table.join(DataFrame([{name: x for name, (x, _) in each.items()} for each in scores]))

    def make(group: DataFrame) -> list[Any]:
        values = group.drop(columns="panel").dropna(axis=1, how="all")
        values = values.rename(columns={"compressed_share": "read quantised"})
        note = "± one standard error."
        return [Table(values, {"read quantised": share}, note=note, texts=shown)]

    return panels(table, make)


def _scores(tasks: Any) -> dict[str, tuple[float, str]]:
    """By task and metric; a metric `x_stderr` (or lm-eval's `x_stderr,filter`) is x's error."""
    found = {}
    for task, metrics in tasks.items() if isinstance(tasks, Mapping) else ():
        metrics = metrics if isinstance(metrics, Mapping) else {"": metrics}
        for metric, value in metrics.items():
            x = number(value)
            if "_stderr" in str(metric) or x is None:
                continue
            base, comma, filter_ = str(metric).partition(",")
            error = number(metrics.get(f"{base}_stderr{comma}{filter_}"))
            text = f" ± {significant(error, 2)}" if error is not None else ""
            found[clean(f"{task} {metric}")] = (x, significant(x) + text)
    return found


def generic(found: DataFrame) -> list[Any]:
    """A table of the results of a measurement without a section of its own."""
    shown = found.drop(columns=["warnings", "points"], errors="ignore").rename(columns=clean)
    shown = shown.loc[:, ~shown.columns.duplicated()].reset_index(drop=True)
    formats = dict.fromkeys(shown.columns, figure)
    cache, panel = (found.index.get_level_values(name) for name in ("cache", "panel"))
    shown.insert(0, "cache", cache, allow_duplicates=True)
    return panels(shown, lambda group: [Table(group, formats)], panel)


SECTIONS: dict[str, tuple[str, Callable[[DataFrame], list[Any]], str]] = {
    "perplexity": (
        "Quality against bits",
        perplexity,
        "KL divergence: in nats, of the next-token distribution read through a cache from that of "
        "the uncompressed cache, fed in the same passes; mean and 99th percentile over the tokens. "
        "(The uncompressed cache itself is compared with one pass without a cache: rounding.) "
        "Change: of the text's perplexity against the uncompressed cache's, with a 95% interval "
        "over the texts (over the windows, if there is one text). Bits: all bytes of the cache, "
        "recent tokens, scales and spare room included, over the key and value elements it stands "
        "for, as in a 16-bit model whatever the model was measured in. Top-1: share of tokens "
        "whose likeliest successor is the uncompressed cache's. Code readers: tokens that read at "
        "least half of their context quantised; verdicts rest on their figures. Read quantised: "
        "share of the keys and values read.",
    ),
    "memory": (
        "Memory against context",
        memory,
        "Bytes of the cache are counted on its tensors; peaks are how far the memory in use rises "
        "above where it stood before.",
    ),
    "speed": (
        "Speed against context",
        speed,
        "Tokens per second of the whole model: median, 10th and 90th percentile.",
    ),
    "needle": (
        "Needles",
        needle,
        "Right: the greedy answer is the needle's. Chosen right: the needle's answer is the "
        "likeliest of the candidates.",
    ),
    "agreement": (
        "Agreement of generated text",
        agreement,
        "New tokens written before the text first differs from the uncompressed cache's.",
    ),
    "lm_eval": ("lm-eval", lm_eval, "Scores of its tasks, every request read through the cache."),
}


def section(kind: str, found: DataFrame) -> Section | None:
    """The section of a measurement that brings none itself; None without anything to show."""
    title, make, meaning = SECTIONS.get(kind, (kind, generic, ""))
    blocks = make(found)
    return Section(title, blocks, meaning) if blocks else None
