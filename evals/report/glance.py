"""The first section: what each cache saves, what it costs, and whether it is safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame

from ..verify import NOT_ENOUGH, SAFE
from .blocks import Section, Table, Text
from .frames import results, texts
from .sections import decoded, needles, stored
from .text import change, count, fixed, number, share, shorten, significant, thousands
from .verdict import NONE, WORDS, Verdict, interval_of, judge, limits

DOUBTFUL = " (⚠ see Warnings)"
"""Behind a figure that a warning of its own measurement speaks against."""

_FEW = 8  # that are shown at once, where they are not safe


def section(rows: DataFrame) -> Section:
    """A verdict on every cache of every model: the safe ones first, then by bits."""
    others, judged = _others(rows), results(rows, "perplexity")
    blocks: list[Any] = []
    for panel, group in judged.groupby(level="panel", sort=False):
        records = sorted(zip(group.index, group.to_dict("records"), strict=True), key=_bits)
        members = []
        for (_, model, cache, baseline, _), figures in records:
            said = [*_saved(figures), *_cost(figures), *others.pop((model, cache), [])]
            members += [] if baseline else [(cache, judge(figures), said)]
        if members:
            text = f"{_summary(members)} {rests_on([figures for _, figures in records])}"
            blocks += [Text(str(panel), "heading"), Text(text), *_tables(members)]
    found: dict[str, list[Any]] = {}
    for (model, cache), said in others.items():
        found.setdefault(model, []).append((cache, Verdict(NONE), said))
    for model, members in found.items():
        text = "Perplexity was not measured with these caches, so there is no verdict on them."
        blocks += [Text(model, "heading"), Text(text), *_tables(members)]
    blocks = blocks or [
        Text(
            "No perplexity or KL divergence of a compressed cache was measured, so verify's limits "
            "cannot be judged."
        )
    ]
    return Section("At a glance", blocks, limits() if len(judged) else "")


def rests_on(figures: Sequence[Mapping[Any, Any]]) -> str:
    """A sentence on the tokens, windows and texts of some perplexities."""

    def span(name: str) -> str:
        values = sorted({x for each in figures if (x := number(each.get(name))) is not None})
        ends = dict.fromkeys([*values[:1], *values[-1:]])
        return " to ".join(f"{x:,.0f}" for x in ends) or "an unknown number of"

    names = dict.fromkeys(name for each in figures for name in texts(each.get("documents")))
    text = f"{span('tokens')} predicted tokens, in {span('windows')} windows of at most "
    text += f"{span('window')} tokens, of {count(len(names), 'text')}"
    return f"Each figure rests on {text} ({shorten(', '.join(names), 300) or 'not recorded'})."


def _bits(record: tuple[Any, Mapping[Any, Any]]) -> float:
    return number(record[1].get("bits_per_number_16bit")) or float("inf")


def _saved(figures: Mapping[Any, Any]) -> list[str]:
    bits = number(figures.get("bits_per_number_16bit"))
    if not bits:
        return []
    return [f"{fixed(bits)} bits instead of 16: {fixed(16 / bits, 1)}× smaller in a 16-bit model"]


def _cost(figures: Mapping[Any, Any]) -> list[str]:
    before, after, rise = (
        number(figures.get(name)) for name in ("baseline_perplexity", "perplexity", "delta")
    )
    said = []
    if before and after is not None and rise is not None:
        ends = [change(end / before) for end in interval_of(figures) or ()]
        spread = f", 95%: {' to '.join(ends)}" if ends else ""
        moved = f"perplexity {fixed(before)} → {fixed(after)}"
        said.append(f"{moved} ({change(rise / before)}{spread})")
    kl, top1 = figures.get("kl_mean"), figures.get("top1_agreement")
    return [*said, f"KL {significant(kl, 2)}", f"same likeliest next token {share(top1, 2)}"]


def _others(rows: DataFrame) -> dict[tuple[str, str], list[str]]:
    """What other measurements say, by model and cache."""
    found: dict[tuple[str, str], list[str]] = {}

    def add(kind: str, model: str, cache: str, text: str) -> None:
        doubt = DOUBTFUL if (kind, model, cache) in warned else ""
        found.setdefault((model, cache), []).append(text + doubt)

    doubtful = rows[rows["ok"] & (rows["warnings"].map(len) > 0)]
    warned = set(doubtful[["measurement", "model", "cache"]].itertuples(index=False, name=None))
    for kind, table, ratio, text in (
        (
            "memory",
            stored(results(rows, "memory")),
            "smaller",
            "{}× fewer bytes in the {} model measured, at {} tokens",
        ),
        (
            "speed",
            decoded(results(rows, "speed")),
            "faster",
            "decodes {}× as fast in {}, at {} tokens",
        ),
    ):
        known = table[table[ratio].notna() & ~table["baseline"]].sort_values("context")
        last = known.groupby(["model", "cache"], sort=False)[["dtype", "context", ratio]].last()
        for (model, cache), dtype, context, x in last.itertuples():
            add(kind, model, cache, text.format(fixed(x, 2), dtype, thousands(context)))
    table = needles(results(rows, "needle"))
    table = table[~table["baseline"] & table["accuracy"].notna()]
    fields = ["model", "cache", "accuracy", "baseline_accuracy", "asked"]
    for model, cache, right, full, asked in table[fields].itertuples(index=False):
        text = f"finds {share(right)} of {fixed(asked, 0)} needles"
        text += "" if pd.isna(full) else f", the uncompressed cache {share(full)}"
        add("needle", model, cache, text)
    return found


def _summary(members: list[Any]) -> str:
    words = [verdict.word for _, verdict, _ in members]
    text = f"{words.count(SAFE)} of {count(len(words), 'cache')} shown to be safe"
    if SAFE in words:
        text += f"; the smallest of them: {members[words.index(SAFE)][0]}"
    if NOT_ENOUGH in words:
        text += f"; {words.count(NOT_ENOUGH)} without enough evidence"
    return f"{text}."


def _tables(members: list[Any]) -> list[Table]:
    """The safe ones, and the others, folded where they are many."""
    members = sorted(members, key=lambda member: WORDS.index(member[1].word))
    heads = ["cache", "verdict", "what it saves and costs"]
    values = DataFrame([(c, v.word, _sentence(said, v.why)) for c, v, said in members], None, heads)
    safe = values[values["verdict"] == SAFE]
    rest = values.drop(safe.index)
    if safe.empty or rest.empty:
        return [Table(values, left=3, bold=[True] * len(safe), kind="verdicts")]
    title, folded = "Not shown to be safe", len(rest) > _FEW
    return [
        Table(safe, left=3, bold=[True] * len(safe), kind="verdicts"),
        Table(rest, left=3, title=title, folded=folded, kind="verdicts"),
    ]


def _sentence(said: list[str], why: str) -> str:
    """What is said, and then why, each with a capital and a full stop."""
    parts = [text for text in ("; ".join(said), shorten(why, 300)) if text]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in parts)
