"""What the rows are: counts, dates, machines, commands, texts; what the figures mean."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .blocks import Code, Points, Section, Table, Text
from .names import Names, Row, measured, part, warnings
from .text import clean, count, plain, shorten

STATUSES = ("ok", "failed", "not run")

_MEANINGS = {
    "perplexity": (
        (
            "KL divergence",
            "in nats, of the next-token distribution read through a cache from that of the "
            "uncompressed cache, fed in the same passes; mean and 99th percentile over the tokens. "
            "The uncompressed cache itself is compared with one pass without a cache: rounding.",
        ),
        (
            "Δ perplexity",
            "perplexity of the text read through the cache less that of the uncompressed cache, "
            "with a 95% interval over the documents (over the windows, if there is one only).",
        ),
        (
            "bits",
            "per number, in a 16-bit model: all bytes of the cache, exact window, scales and spare "
            "room included, over the key and value numbers it stands for. (Also of a model that "
            "was measured in float32, where exact numbers would count twice. Tables of memory are "
            "of the dtype measured.)",
        ),
        ("top-1", "share of tokens whose most likely successor is the uncompressed cache's."),
        ("compressed", "share of the keys and values read that were read quantised."),
    ),
    "memory": (
        (
            "memory",
            "bytes of the cache counted on its tensors; peaks are how far the memory in use rises "
            "above where it stood before.",
        ),
    ),
    "speed": (("speed", "tokens per second of the whole model: median, 10th, 90th percentile."),),
    "needle": (
        (
            "needles",
            "right: the greedy answer is the needle's; chosen right: the needle's answer is the "
            "most likely of the candidates.",
        ),
    ),
    "agreement": (
        (
            "agreement",
            "new tokens written before the text first differs from the uncompressed cache's.",
        ),
    ),
}


def section(rows: Sequence[Row], headers: Sequence[Row], names: Names) -> Section:
    """The first section."""
    blocks: list = [Points(_facts(rows, headers, names))]
    blocks += [Text(text, "bad") for text in _mixtures(rows)]
    meanings = [item for kind, items in _MEANINGS.items() if measured(rows, kind) for item in items]
    if meanings:
        blocks += [Text("What the figures are:"), Points(meanings)]
    commands = _counted(row.get("command") for row in rows)
    if commands:
        lines = [clean(command) for command in commands]
        blocks.append(Code("\n".join(lines), count(len(lines), "command line"), len(lines) > 3))
    for header in headers:
        if header.get("config") is not None:
            text = json.dumps(header["config"], indent=2, sort_keys=False, default=str)
            text = text.encode("utf-8", "replace").decode()
            blocks.append(Code(text, f"Configuration of {_sweep(header)}", True))
    return Section("What this is", blocks)


def problems(rows: Sequence[Row], names: Names) -> list[Section]:
    """Rows without figures, and figures that come with warnings; nothing where there are none."""
    found = []
    missing = [row for row in rows if row.get("status") != "ok"]
    if missing:
        table = [(status(row), *_whose(row, names), reason(row)) for row in missing]
        header = ("status", "model", "cache", "measurement", "reason")
        title = f"Not measured: {count(len(missing), 'row')}"
        found.append(Section(title, [Table(header, table, left=5, folded=len(table) > 12)]))
    warned = [(row, text) for row in rows for text in warnings(row)]
    if warned:
        table = [(*_whose(row, names), text) for row, text in warned]
        header = ("model", "cache", "measurement", "warning")
        blocks = [
            Text(
                "The measurements themselves say that these figures may not mean anything:", "bad"
            ),
            Table(header, table, left=4),
        ]
        found.append(Section(f"Warnings: {len(warned)}", blocks))
    return found


def status(row: Row) -> str:
    """The row's status."""
    return clean(row.get("status") or "no status")


def reason(row: Row) -> str:
    """Why a row has no figures."""
    return clean(row.get("error") or "no reason was recorded")


def setting(row: Row, names: Names) -> str:
    """Measurement and the options in which rows of it differ."""
    kind, options = clean(row.get("measurement") or "no measurement"), names.setting(row)
    return f"{kind}: {options}" if options else kind


def _whose(row: Row, names: Names) -> tuple[str, str, str]:
    return names.subject(row), names.cache(row), setting(row, names)


def _facts(rows: Sequence[Row], headers: Sequence[Row], names: Names) -> list[tuple[str, str]]:
    counts = Counter(status(row) for row in rows)
    kinds = [*STATUSES, *sorted(set(counts) - set(STATUSES))]
    facts = [("Rows", f"{len(rows):,}: " + ", ".join(f"{counts[k]:,} {k}" for k in kinds))]
    sweeps = list(dict.fromkeys(_sweep(header) for header in headers))
    if sweeps:
        facts.append(("Sweep" if len(sweeps) == 1 else "Sweeps", "; ".join(sweeps)))
    dates = sorted(clean(row["finished"]) for row in rows if row.get("finished"))
    if dates:
        facts.append(("Finished", dates[0] + (f" to {dates[-1]}" if dates[-1] != dates[0] else "")))
    facts.append(("Models", "; ".join(_counted(names.subject(row) for row in rows)) or "none"))
    texts = _texts(rows)
    if texts:
        facts.append(("Texts", _listed(texts, 12)))
    for key, title in (("chunk", "Chunk"), ("window", "Window")):
        found = _counted(_option(row, key) for row in rows)
        if found:
            facts.append((f"{title} (tokens)", ", ".join(found)))
    return facts + _versions(rows)


def _versions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Devices; what all rows share in one line; what they do not, with how many have which."""
    shared, facts = [], []
    keys = dict.fromkeys(key for row in rows for key in part(row, "versions"))
    for key in (key for key in keys if key not in ("kind", "command")):
        counted = _counted(part(row, "versions").get(key) for row in rows)
        if len(counted) == 1 and key != "device":
            shared.append(f"{clean(key)} {next(iter(counted))}")
        elif counted:
            several = len(counted) > 1
            shown = [f"{v} ({count(n, 'row')})" if several else v for v, n in counted.items()]
            facts.append((clean(key).capitalize(), "; ".join(shown)))
    if shared:
        facts.append(("Versions", ", ".join(shared)))
    return facts


def _mixtures(rows: Sequence[Row]) -> list[str]:
    """Sentences on what a reader may compare that was not made alike."""
    found = []
    for key, what in (
        ("device", "devices"),
        ("torch", "versions of torch"),
        ("transformers", "versions of Transformers"),
        ("rotorquant_hf", "versions of rotorquant_hf"),
    ):
        values = _counted(part(row, "versions").get(key) for row in rows)
        if len(values) > 1:
            listed = "; ".join(f"{value} ({count(n, 'row')})" for value, n in values.items())
            found.append(
                f"These rows come from {len(values)} {what}: {listed}."
                + (" Plots keep the devices apart." if key == "device" else "")
            )
    return found


def _sweep(header: Row) -> str:
    name = clean(header.get("name") or "a sweep without a name")
    fingerprint = header.get("fingerprint")
    return f"{name} ({clean(fingerprint)[:12]})" if fingerprint else name


def _texts(rows: Sequence[Row]) -> Mapping[str, int]:
    """The documents that were read; where none is recorded, the texts that were asked for."""
    read = [part(row, "result").get("documents") for row in rows]
    asked = [part(row, "options").get(key) for row in rows for key in ("text", "dataset")]
    for found in (read, asked):
        lists = [x if isinstance(x, list | tuple) else [x] for x in found if x]
        if lists:
            return _counted(name for names in lists for name in names)
    return {}


def _option(row: Row, key: str) -> Any:
    """From the result, which has what was really used, or from the options."""
    found = part(row, "result").get(key)
    return part(row, "options").get(key) if found is None else found


def _counted(values: Iterable[Any]) -> Mapping[str, int]:
    """How often each value is there, None apart, in the order of their first appearance."""
    return Counter(plain(x) for x in values if x is not None)


def _listed(values: Mapping[str, int], most: int) -> str:
    shown = [shorten(value, 100) for value in list(values)[:most]]
    rest = len(values) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")
