"""Rows in, three files out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from pandas import DataFrame, Series

from ..measurements.registry import MEASUREMENTS
from ..places import called
from ..tables import markdown
from . import glance
from .blocks import Section, Table, Text
from .frames import Row, frame, part, results, to_csv
from .sections import SECTIONS
from .sections import section as known_section
from .text import clean, count, figure, fixed, number, plain, shorten

_MANY = 12  # rows of a table, from which on it is folded
_LONG = 38  # characters of a cell, from which on it is broken into lines and never bold


def write(rows: Sequence[Row], headers: Sequence[Row], out: Path, title: str) -> list[Path]:
    """As `evals.report.write`."""
    found: dict[str, Any] = {"title": clean(title), "sections": sections(rows, headers)}
    found |= {"long": _LONG, "command": called()}
    page, text = _environment(autoescape=True), _environment(finalize=_escaped)
    page.filters["svg"] = Markup  # our own plots, in which labels are escaped already
    text.filters |= {"table": _markdown_table, "fenced": _fenced}
    lines = text.get_template("report.md.j2").render(found)
    made = {
        "report.html": page.get_template("report.html.j2").render(found),
        "report.md": re.sub(r"\n{3,}", "\n\n", lines).rstrip() + "\n",
        "rows.csv": to_csv(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (out / name).write_text(content, encoding="utf-8", newline="\n")
    return [out / name for name in made]


def sections(rows: Sequence[Row], headers: Sequence[Row]) -> list[Section]:
    """The sections there is something to say in."""
    table = frame(rows)
    there = dict.fromkeys(table["measurement"])
    kinds = [kind for kind in SECTIONS if kind in there]
    measured = [_measured(kind, table) for kind in dict.fromkeys([*kinds, *there])]
    found = [glance.section(table), *_problems(table), *measured, _origin(table, headers)]
    return [section for section in [*found, _caches(table), _all_rows(table)] if section]


def _measured(kind: str, table: DataFrame) -> Section | None:
    """The section that a measurement brings itself, or the one of this report."""
    found, measurement = results(table, kind), MEASUREMENTS.get(kind)
    if not found.columns.size:
        return None
    own = getattr(measurement, "section", None)
    section = own(found) if own else known_section(kind, found)
    if section is not None and not section.meaning:
        section.meaning = getattr(measurement, "meaning", "")
    return section


def _problems(table: DataFrame) -> list[Section]:
    """Rows without figures, and figures that come with warnings; nothing where there are none."""
    found = []
    whose = {"model": table["model"], "cache": table["cache"], "measurement": _what(table)}
    reasons = table["error"].where(table["error"] != "", "no reason was recorded")
    missing = DataFrame({"status": table["status"], **whose, "reason": reasons})
    missing = missing[table["status"] != "ok"]
    if len(missing):
        title, folded = f"Not measured: {count(len(missing), 'row')}", len(missing) > _MANY
        found.append(Section(title, [Table(missing, left=5, folded=folded, kind="reasons")]))
    warned = DataFrame({**whose, "warning": table["warnings"]}).explode("warning").dropna()
    if len(warned):
        said = "The measurements themselves say that these figures may not mean anything:"
        warning = Text(said, "warning")
        listed = Table(warned, left=4, kind="reasons")
        found.append(Section(f"Warnings: {len(warned)}", [warning, listed]))
    return found


def _what(table: DataFrame) -> Series:
    return table["measurement"] + table["setting"].map(lambda text: text and f": {text}")


def _origin(table: DataFrame, headers: Sequence[Row]) -> Section:
    """What was measured, with which settings and versions, by which commands."""
    counts = table["status"].value_counts()
    kinds = dict.fromkeys(["ok", "failed", "not run", *sorted(counts.index)])
    dates = sorted(set(table["finished"]) - {"–"})
    facts = {
        "rows": f"{len(table):,}: " + ", ".join(f"{counts.get(x, 0):,} {x}" for x in kinds),
        "sweeps": "; ".join(dict.fromkeys(map(_sweep, headers))),
        "finished": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "models": "; ".join(dict.fromkeys(table["model"])),
    }
    for kind, group in table.groupby("measurement", sort=False):
        options = _columns([part(row, "options") for row in group["row"]])
        known = [name for name in options if options[name].notna().any()]
        facts[f"options of {kind}"] = "; ".join(f"{x}: {_counted(options[x])}" for x in known)
    versions = _columns([part(row, "versions") for row in table["row"]])
    for name in versions.columns.difference(["kind", "command"], sort=False):
        facts[name.removeprefix("packages.")] = _counted(versions[name])
    blocks: list[Any] = []
    for name in ("device", "torch", "transformers", "rotorquant_hf"):
        if name in versions and versions[name].nunique() > 1:
            said = f"These rows come from {count(versions[name].nunique(), name)}"
            said += " versions" if name != "device" else ""
            blocks.append(Text(f"{said}: {_counted(versions[name])}.", "warning"))
    values = DataFrame([(x, text or "none") for x, text in facts.items()], None, ["what", "value"])
    commands = dict.fromkeys(clean(r.get("command")) for r in table["row"] if r.get("command"))
    code = [Text("\n".join(commands), "code")] if commands else []
    return Section("What was measured", [*blocks, Table(values, left=2), *code])


def _columns(values: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Mappings as texts: a column a path, None where there is nothing."""
    found = pd.json_normalize([dict(each) for each in values]).astype(object)
    found = found.rename(columns=clean).loc[:, lambda table: ~table.columns.duplicated()]
    return found.map(lambda x: None if x is None or x != x else plain(x))


def _counted(values: Series, limit: int = 12) -> str:
    """Each value once, with the number of its rows if there are several."""
    counts = values.value_counts(sort=False)
    shown = [shorten(value, 300) for value in counts.index[:limit]]
    if len(counts) > 1:
        shown = [f"{x} ({count(n, 'row')})" for x, n in zip(shown, counts, strict=False)]
    return ", ".join([*shown, *([f"{len(counts) - limit} more"] if len(counts) > limit else [])])


def _sweep(header: Row) -> str:
    name, fingerprint = clean(header.get("name") or "unnamed"), header.get("fingerprint")
    return f"{name} ({clean(fingerprint)[:12]})" if fingerprint else name


def _caches(table: DataFrame) -> Section:
    """Every option of every cache, by kind."""
    blocks = []
    kinds = table["row"].map(lambda row: clean(part(row, "cache").get("kind") or "unknown kind"))
    for kind, group in table.groupby(kinds, sort=False):
        options = _columns([part(part(row, "cache"), "options") for row in group["row"]])
        options = options.fillna("none").drop(columns="cache", errors="ignore")
        same = [name for name in options if options[name].nunique() == 1]
        note = "In all: " + ", ".join(f"{x} {options[x].iloc[0]}" for x in same) + "."
        options = options.drop(columns=same)
        options.insert(0, "cache", list(group["cache"]))
        options = options.drop_duplicates(ignore_index=True)
        blocks.append(Table(options, title=str(kind), note=note if same else "", folded=True))
    return Section("Options of the caches", blocks)


def _all_rows(table: DataFrame) -> Section:
    """All rows, whatever became of them."""
    shown = table[["status", "model", "cache"]].copy()
    shown["measurement"] = _what(table)
    shown["figures"] = [_summary(part(row, "result")) for row in table["row"]]
    warnings = table["warnings"].map(lambda found: [f"⚠ {text}" for text in found])
    errors = table["error"].map(lambda error: [error] if error else [])
    shown["remarks"] = (warnings + errors).map("; ".join)
    shown[["seconds", "finished"]] = table[["seconds", "finished"]]
    formats, folded = {"seconds": lambda x: fixed(x, 1)}, len(shown) > _MANY
    note = "Every option and figure is in rows.csv."
    return Section("All rows", [Table(shown, formats, 6, note=note, folded=folded, kind="wide")])


def _summary(result: Mapping[str, Any]) -> str:
    """The first figures of a result, and how many points it has."""
    found = [f"{clean(k)} {figure(v)}" for k, v in result.items() if number(v) is not None]
    points = result.get("points")
    found = found[:5] + ([count(len(points), "point")] if isinstance(points, list) else [])
    return shorten(", ".join(found), 160) or "–"


def _environment(**more: Any) -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **more)


def _escaped(value: Any) -> str:
    """What autoescape is to HTML: a text without what Markdown or HTML take for their own."""
    if isinstance(value, Markup):
        return value
    text = escape(str(value), quote=False)
    return re.sub(r"([\\`*|\[\]~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _markdown_table(table: Table) -> Markup:
    rows = []
    for row, bold in zip_longest(table.rows(), table.bold):
        rows.append([_escaped(text) for text, _ in row])
        for i, (text, value) in enumerate(row[: table.left]):
            if bold and text and value is None and len(text) <= _LONG:
                rows[-1][i] = f"**{rows[-1][i]}**"
    return Markup(markdown(list(map(_escaped, table.header)), rows, table.left))


def _fenced(text: str) -> Markup:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")
