"""All rows as flat records, for a CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .names import Row, part

_FIRST = ("model", "cache", "cache_kind", "measurement", "status", "error", "seed", "seconds")
_GROUPS = ("", "cache", "option", "result", "point", "model", "versions")
_KNOWN = {"kind", "model", "cache", "options", "result", "versions", "measurement"}


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row, or one a point where a result has points; columns named by their path."""
    found = [record for row in rows for record in records(row)]
    names = dict.fromkeys([*_FIRST, *(name for record in found for name in record)])
    columns = sorted(names, key=_group)  # stable: within a group as they first appear
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue().encode("utf-8", "replace").decode()


def _group(column: str) -> int:
    prefix, dot, _ = column.partition(".")
    return _GROUPS.index(prefix) if dot and prefix in _GROUPS else 0


def records(row: Row) -> Iterator[dict[str, Any]]:
    """The records of a row: its scalars, repeated for each point of its result."""
    model, cache = part(row, "model"), part(row, "cache")
    head: dict[str, Any] = {
        "model": model.get("label") or model.get("model") or row.get("model"),
        "cache": cache.get("label") or cache.get("kind") or row.get("cache"),
        "cache_kind": cache.get("kind"),
        "measurement": row.get("measurement"),
    }
    head |= {key: row.get(key) for key in ("status", "error", "seed", "seconds")}
    head |= {key: _scalar(value) for key, value in row.items() if key not in {*_KNOWN, *head}}
    for prefix, values in (
        ("model", {key: value for key, value in model.items() if key != "label"}),
        ("cache", part(cache, "options")),
        ("option", part(row, "options")),
        ("versions", part(row, "versions")),
    ):
        head |= _flattened(values, f"{prefix}.")
    result = dict(part(row, "result"))
    points = list(_points(result))
    head |= _flattened(result, "result.")
    head = {key: "" if value is None else value for key, value in head.items()}
    for point in points or [{}]:
        yield head | _flattened(point, "point.")


def _points(result: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Take the points out of a result: dicts in a list, scores by task, lengths by prompt."""
    for name, value in list(result.items()):
        if isinstance(value, list | tuple) and value and all(isinstance(x, Mapping) for x in value):
            yield from result.pop(name)
        elif name == "scores" and isinstance(value, Mapping):
            for task, metrics in result.pop(name).items():
                values = metrics if isinstance(metrics, Mapping) else {"score": metrics}
                yield {"task": task, **values}
        elif name == "lengths" and isinstance(value, list | tuple):
            for i, length in enumerate(result.pop(name)):
                yield {"prompt": i, "length": length}


def _flattened(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Scalars by path; pairs of numbers as low and high, other lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flattened(value, f"{path}.")
        elif str(key).endswith("ci95"):
            low, high = value if isinstance(value, list | tuple) and len(value) == 2 else ("", "")
            found |= {f"{path}_low": low, f"{path}_high": high}
        else:
            found[path] = _scalar(value)
    return found


def _scalar(value: Any) -> Any:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else value
