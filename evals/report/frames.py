"""Rows as data frames: labels that tell them apart, results, points, and the flat CSV file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from .text import clean, number, plain, shorten

Row = Mapping[str, Any]

LABELS = ["panel", "model", "cache", "baseline", "dtype"]
"""What the index of `results` says of each row; `panel` is the model and the setting."""

_MAX_DIFFERENCES = 5


def part(row: Row, name: str) -> Mapping[str, Any]:
    """A part of a row that should be a mapping; an empty one if it is not there."""
    found = row.get(name)
    return found if isinstance(found, Mapping) else {}


def texts(value: Any) -> list[str]:
    """Warnings, notes or names: a text, several, or none."""
    values = [value] if isinstance(value, str) else value
    return [clean(x) for x in values] if isinstance(values, list | tuple) else []


def frame(rows: Sequence[Row]) -> DataFrame:
    """A line a row, with the shortest labels that distinguish the rows.

    Columns: those of `LABELS`, `measurement`, `setting` (the options in which rows of that
    measurement differ), `status`, `ok`, `error`, `warnings`, `seconds`, `finished`, and `row`.
    """
    found = DataFrame({"row": Series(list(rows), dtype=object)})
    each = found["row"].map
    found["status"] = each(lambda row: clean(row.get("status") or "no status"))
    found["ok"] = each(lambda r: r.get("status") == "ok" and isinstance(r.get("result"), Mapping))
    found["error"] = each(_error)
    found["warnings"] = each(lambda row: texts(part(row, "result").get("warnings")))
    found["seconds"] = each(lambda row: number(row.get("seconds"))).astype(float)
    found["finished"] = each(lambda row: clean(row.get("finished") or "–"))
    found["measurement"] = each(lambda row: clean(row.get("measurement") or "no measurement"))
    found["baseline"] = each(lambda row: part(row, "cache").get("kind") == "dynamic")
    found["dtype"] = each(lambda row: clean(part(row, "model").get("dtype") or "unknown dtype"))
    found["setting"] = _differences(found["measurement"], each(lambda row: part(row, "options")))
    for name, facts in (("model", _model_facts), ("cache", _cache_facts)):
        label = each(lambda row, name=name: _label(row, name))
        found[name] = label + _differences(label, each(facts)).map(lambda x: x and f" ({x})")
    found["panel"] = found["model"] + found["setting"].map(lambda x: x and f": {x}")
    if len(found):
        seed = each(lambda row: plain(row.get("seed")))
        places = [found[name] for name in ("measurement", "panel", "cache")]
        several = seed.groupby(places).transform("nunique") > 1
        found["cache"] += (", seed " + seed).where(several, "")
    return found


def _error(row: Row) -> str:
    """Why a row has no result, or some of its points have none."""
    points = part(row, "result").get("points")
    known = [x for x in points if isinstance(x, Mapping)] if isinstance(points, list) else []
    found = [row.get("error"), *(point.get("error") for point in known)]
    return "; ".join(dict.fromkeys(clean(error) for error in found if error))


def _label(row: Row, name: str) -> str:
    found = part(row, name)
    return clean(
        found.get("label")
        or found.get("model")
        or found.get("kind")
        or row.get(name)
        or f"no {name}"
    )


def _model_facts(row: Row) -> Row:
    return {**part(row, "model"), "on": part(row, "versions").get("device")}


def _cache_facts(row: Row) -> Row:
    cache = part(row, "cache")
    return {"kind": cache.get("kind"), **part(cache, "options")}


def _differences(names: Series, facts: Series) -> Series:
    """The facts in which things of one name differ, as texts; empty where they are alike."""
    shown = [{clean(key): plain(x) for key, x in each.items()} for each in facts]
    table = DataFrame(shown, index=names.index).fillna("none")
    found: Any = Series("", index=names.index)
    for _, group in table.groupby(names):
        unlike = group.columns[group.nunique() > 1][:_MAX_DIFFERENCES]
        for i, row in group[unlike].iterrows():
            found[i] = ", ".join(f"{key} {shorten(text, 60)}" for key, text in row.items())
    return found


def results(rows: DataFrame, measurement: str) -> DataFrame:
    """The results of a measurement: a column a field, and an index of `LABELS`."""
    chosen = rows[rows["ok"] & (rows["measurement"] == measurement)]
    index = pd.MultiIndex.from_frame(chosen[LABELS])
    found = DataFrame([part(row, "result") for row in chosen["row"]], dtype=object)
    return found.set_axis(index)


def points(found: DataFrame) -> DataFrame:
    """The points of results, a line a point, with the same index."""
    if "points" not in found:
        return found.iloc[:0]
    each = found["points"].explode()
    each = each[each.map(lambda point: isinstance(point, Mapping))]
    return DataFrame(list(each), dtype=object).set_axis(each.index)


def figures(found: DataFrame, fields: list[str]) -> DataFrame:
    """Columns of `LABELS`, and some fields as numbers: NaN where there is none."""
    numbers = found.reindex(columns=fields).map(number).astype(float)
    return numbers.reset_index().astype({"baseline": bool})


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row, or one a point where a result has points; columns named by their path."""
    records = [record for row in rows for record in _records(row)]
    table = DataFrame(records, dtype=object)  # whole numbers stay whole where others are missing
    text = table.to_csv(index=False, lineterminator="\n")
    return text.encode("utf-8", "replace").decode()


def _records(row: Row) -> Iterator[dict[str, Any]]:
    """The records of a row: its scalars, repeated for each point of its result."""
    cache, model, result = part(row, "cache"), part(row, "model"), dict(part(row, "result"))
    head: dict[str, Any] = {
        "model": model.get("label") or model.get("model") or row.get("model"),
        "cache": cache.get("label") or cache.get("kind") or row.get("cache"),
        "cache_kind": cache.get("kind"),
    }
    head |= {key: row.get(key) for key in ("measurement", "status", "error", "seed", "seconds")}
    known = {"kind", "options", "result", "versions", *head}
    found = list(_take_points(result)) or [{}]
    head |= _flat({key: value for key, value in row.items() if key not in known}, "")
    head |= _flat(part(cache, "options"), "cache.") | _flat(part(row, "options"), "option.")
    head |= _flat(result, "result.") | _flat(part(row, "versions"), "versions.")
    head |= _flat({key: value for key, value in model.items() if key != "label"}, "model.")
    yield from (head | _flat(point, "point.") for point in found)


def _take_points(result: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Take the points out of a result: dicts in a list, scores by task, lengths by prompt."""
    for name, value in list(result.items()):
        if isinstance(value, list | tuple) and value and all(isinstance(x, Mapping) for x in value):
            yield from result.pop(name)
        elif name == "scores" and isinstance(value, Mapping):
            for task, metrics in result.pop(name).items():
                values = metrics if isinstance(metrics, Mapping) else {"score": metrics}
                yield {"task": task, **values}
        elif name == "lengths" and isinstance(value, list | tuple):
            yield from ({"prompt": i, "length": x} for i, x in enumerate(result.pop(name)))


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Scalars by path; pairs of an interval as low and high, other lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}.")
        elif str(key).endswith("ci95"):
            pair = value if isinstance(value, list | tuple) and len(value) == 2 else ("", "")
            found |= {f"{path}_low": pair[0], f"{path}_high": pair[1]}
        elif isinstance(value, list | tuple):
            found[path] = json.dumps(value, ensure_ascii=False, default=str)
        else:
            found[path] = value
    return found
