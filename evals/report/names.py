"""What a row is called beside the others: nothing more than tells them apart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from .text import clean, plain, shorten

Row = Mapping[str, Any]

_MOST_DIFFERENCES = 5


def part(row: Row, name: str) -> Mapping[str, Any]:
    """A part of a row that should be a mapping; an empty one if it is not there."""
    found = row.get(name)
    return found if isinstance(found, Mapping) else {}


def measured(rows: Iterable[Row], measurement: str) -> list[Row]:
    """The rows of a measurement that have a result."""
    return [
        row
        for row in rows
        if row.get("measurement") == measurement
        and row.get("status") == "ok"
        and isinstance(row.get("result"), Mapping)
    ]


def points(row: Row) -> list[Mapping[str, Any]]:
    """The points of a row's result."""
    found = part(row, "result").get("points")
    return [point for point in found or [] if isinstance(point, Mapping)]


def warnings(row: Row) -> list[str]:
    """What the measurement says against its own figures."""
    found = part(row, "result").get("warnings") or []
    return [clean(x) for x in ([found] if isinstance(found, str) else found)]


def is_baseline(row: Row) -> bool:
    """Whether a row is of the uncompressed cache."""
    return part(row, "cache").get("kind") == "dynamic"


class Names:
    """Names of models, settings and caches that are unlike where the things are unlike.

    Args:
        rows: all rows of the report.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._subjects = _distinct(rows, _model_label, _model_facts)
        self._settings = _distinct(rows, lambda row: clean(row.get("measurement")), _setting_facts)
        self._caches = _distinct(rows, _cache_label, _cache_facts)
        seeds: dict[Hashable, set[str]] = defaultdict(set)
        for row in rows:
            seeds[self._place(row)].add(_key(row.get("seed")))
        self._seeds = {place for place, found in seeds.items() if len(found) > 1}

    def subject(self, row: Row) -> str:
        """The model, and its dtype or device where rows of that model differ in it."""
        label = _model_label(row)
        return _joined(label, self._subjects[label, _key(_model_facts(row))])

    def setting(self, row: Row) -> str:
        """The options in which rows of that measurement differ; empty if in none."""
        facts = self._settings[clean(row.get("measurement")), _key(_setting_facts(row))]
        return ", ".join(facts)

    def panel(self, row: Row) -> str:
        """Model and setting: rows that share them can be compared."""
        return _joined(self.subject(row), [self.setting(row)] if self.setting(row) else [])

    def cache(self, row: Row) -> str:
        """The cache's label, and the seed where there are several."""
        label = _cache_label(row)
        facts = self._caches[label, _key(_cache_facts(row))]
        name = f"{label} ({', '.join(facts)})" if facts else label
        return f"{name}, seed {plain(row.get('seed'))}" if self._place(row) in self._seeds else name

    def panels(self, rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
        """Names and rows by model and setting, in the order in which these first appear."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in rows:  # by the facts: names are shortened
            facts = [_model_label(row), _model_facts(row), row.get("measurement")]
            found[_key([*facts, _setting_facts(row)])].append(row)
        return [(self.panel(members[0]), members) for members in found.values()]

    @staticmethod
    def _place(row: Row) -> Hashable:
        facts = [_model_label(row), _model_facts(row), _cache_label(row), _cache_facts(row)]
        return _key([*facts, row.get("measurement"), _setting_facts(row)])


def _model_label(row: Row) -> str:
    model = part(row, "model")
    return clean(model.get("label") or model.get("model") or row.get("model") or "no model")


def _model_facts(row: Row) -> Mapping[str, Any]:
    machine = part(row, "versions").get("device")
    return {**part(row, "model"), **({} if machine is None else {"on": machine})}


def _cache_label(row: Row) -> str:
    cache = part(row, "cache")
    return clean(cache.get("label") or cache.get("kind") or row.get("cache") or "no cache")


def _cache_facts(row: Row) -> Mapping[str, Any]:
    cache = part(row, "cache")
    return {"kind": cache.get("kind"), **part(cache, "options")}


def _setting_facts(row: Row) -> Mapping[str, Any]:
    return part(row, "options")


def _distinct(rows: Sequence[Row], label_of: Any, facts_of: Any) -> dict[Any, list[str]]:
    """By label and facts: the facts in which things of that label differ, as texts."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        facts = facts_of(row)
        groups[label_of(row)].setdefault(_key(facts), facts)
    found = {}
    for label, members in groups.items():
        names = list(dict.fromkeys(name for facts in members.values() for name in facts))
        unlike = [n for n in names if len({_key(facts.get(n)) for facts in members.values()}) > 1]
        for key, facts in members.items():
            texts = [f"{clean(n)} {shorten(plain(facts.get(n)), 60)}" for n in unlike]
            found[label, key] = texts[:_MOST_DIFFERENCES]
    return found


def _joined(label: str, facts: Sequence[str]) -> str:
    return f"{label}: {', '.join(facts)}" if facts else label


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
