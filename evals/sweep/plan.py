"""From the YAML of a sweep to its rows: models x caches x measurements, all values decided.

    name: quick
    seed: 0
    models: [examples/books-7m, {model: examples/books-7m, outliers: 10}]
    caches: [dynamic, k4v4, {cache: rotorquant, key_bits: [2, 3], residual_length: [32, 128]}]
    measurements:
      - {measure: perplexity, text: examples/sampled, max_tokens: 4096}
      - {measure: memory, context: [512, 1024], caches: [dynamic, k3v3]}

A list where one value is meant spans a grid. `models` and `caches` of a measurement replace those
of the sweep.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..caches.registry import KINDS, CacheSpec
from ..errors import InputError, first_line, require
from ..measurements.registry import MEASUREMENTS
from ..options import build
from ..places import shipped
from ..subjects import gguf
from ..subjects.models import ModelOptions
from ..subjects.texts import TextOptions

_SAMPLE = 1 << 16  # bytes of a file of weights, in four places


@dataclass(frozen=True)
class Row:
    """One row to be measured.

    Attributes:
        model, cache: of what.
        measure, options: what.
        seed: of the generators.
    """

    model: ModelOptions
    cache: CacheSpec
    measure: str
    options: Any
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "model": asdict(self.model) | {"label": self.model.label},
            "cache": self.cache.to_dict(),
            "measurement": self.measure,
            "options": _plain(asdict(self.options)),
            "seed": self.seed,
        }

    @property
    def id(self) -> str:
        """The same for the same values, and no others."""
        return digest(self.to_dict())


@dataclass(frozen=True)
class Job:
    """Rows that are measured together: one, or those whose caches are compared in one run."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """A sweep with all values decided.

    Attributes:
        name: of the sweep.
        jobs: in the order in which they run: model by model, measurement by measurement.
        sources: digests of the local texts and models, which may change under their names.
        config: what the plan was made of: the contents of the YAML, with what replaced them.
    """

    name: str
    jobs: tuple[Job, ...]
    sources: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for job in self.jobs for row in job.rows]

    def to_dict(self) -> dict[str, Any]:
        """Name and rows as plain values."""
        rows = [row.to_dict() for row in self.rows]
        return {"name": self.name, "sources": self.sources, "rows": rows}

    @property
    def fingerprint(self) -> str:
        """The same for the same sweep, and no other."""
        return digest(self.to_dict())


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain values."""
    text = json.dumps(_plain(value), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value


def read_plan(path: Path, replaced: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a YAML file.

    Args:
        path: the file.
        replaced: `models` or `text`, instead of the file's, from the command line.

    Raises:
        InputError: if the file is missing, or has an unknown key or a bad value; the message names
            it.
    """
    path = Path(shipped(str(path)))
    require(path.is_file(), f"no file {path}" + (": it is a folder" * path.is_dir()))
    try:
        spec = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML plan: {_fault(error)}") from error
    return plan_of(spec, str(path), path.stem, replaced or {})


def _fault(error: Exception) -> str:
    """Where a file stops being YAML, and why, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return first_line(error)
    mark = error.problem_mark or error.context_mark
    line = f"line {mark.line + 1}: " if mark else ""
    return line + " ".join((error.problem or error.context or "it cannot be read").split())


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of two equal keys without a word; here they are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: if a key occurs twice.
        """
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value!r} occurs again"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def plan_of(spec: Any, where: str, name: str, replaced: Mapping[str, Any]) -> Plan:
    """The plan of the contents of such a file."""
    keys = ("name", "seed", "models", "caches", "measurements")
    _check_keys(spec, keys, where)
    seed = spec.get("seed", 0)
    require(type(seed) is int and seed >= 0, f"{where}: seed is {seed!r}; choose 0 or more")
    title = spec.get("name", name)
    require(isinstance(title, str), f"{where}: name is {title!r}; it takes a text")
    measurements = _list(spec.get("measurements"), f"{where}: measurements")
    jobs: list[Job] = []
    for entry in measurements:
        jobs += _jobs(entry, spec, seed, where, replaced)
    order = {model: i for i, model in enumerate(dict.fromkeys(job.rows[0].model for job in jobs))}
    jobs.sort(key=lambda job: order[job.rows[0].model])  # a model is loaded once
    rows = [row for job in jobs for row in job.rows]
    ids = [row.id for row in rows]
    require(len(set(ids)) == len(ids), f"{where}: a row occurs twice: {_twice(jobs)}")
    sources = {name: _weights_digest(shipped(name)) for name in {row.model.model for row in rows}}
    for options in {row.options for row in rows if isinstance(row.options, TextOptions)}:
        if options.text is not None:
            text = [document.text for document in options.documents()]
            sources[" ".join(options.text)] = digest(text)
    found = {name: source for name, source in sources.items() if source}
    return Plan(title, tuple(jobs), found, {**spec, **replaced, "sources": found})


def _weights_digest(model: str) -> str | None:
    """Of a local model: its files' sizes and samples of what is in them; None of one on the Hub."""
    path = Path(model)
    if gguf.is_gguf(model):
        gguf.check(model)
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    else:
        require(
            not path.is_absolute()
            and path.parts[:1] not in (("..",), ("~",))
            and model[:2] != "./",
            f"no model in {model}: name a folder with a model, a GGUF file, or a name on the Hub",
        )
        return None
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 3, 2 * size // 3, max(0, size - _SAMPLE)):
                file.seek(start)
                found.update(file.read(_SAMPLE))
    return found.hexdigest()[:16]


def _twice(jobs: list[Job]) -> str:
    seen: set[str] = set()
    for row in (row for job in jobs for row in job.rows):
        if row.id in seen:
            return f"{row.measure} of {row.cache.label} on {row.model.label}"
        seen.add(row.id)
    return "none"


def _jobs(
    entry: Any, spec: Mapping[str, Any], seed: int, where: str, replaced: Mapping[str, Any]
) -> Iterator[Job]:
    where = f"{where}: measurements"
    if isinstance(entry, str):
        entry = {"measure": entry}
    require(isinstance(entry, dict), f"{where}: {entry!r} is not a mapping with a key 'measure'")
    measure = entry.get("measure")
    require(
        isinstance(measure, str) and measure in MEASUREMENTS,
        f"{where}: unknown measurement {measure!r}; choose one of {', '.join(MEASUREMENTS)}",
    )
    measurement = MEASUREMENTS[measure]
    values = {k: v for k, v in entry.items() if k not in ("measure", "models", "caches")}
    if "text" in replaced and issubclass(measurement.options, TextOptions):
        values = {k: v for k, v in values.items() if k not in ("dataset", "dataset_config")}
        values["text"] = replaced["text"]
    options: Any = build(measurement.options, values, f"{where}: {measure}")
    if isinstance(options, TextOptions):
        _check_text(options, f"{where}: {measure}")
    source = entry.get("models", spec.get("models"))
    models = _models(replaced.get("models", source), f"{where}: {measure}: models")
    caches = _caches(entry.get("caches", spec.get("caches")), f"{where}: {measure}: caches")
    for model in models:
        rows = [Row(model, cache, measure, options, seed) for cache in caches]
        if measurement.together:
            yield Job(tuple(rows))
        else:
            yield from (Job((row,)) for row in rows)


def _check_text(options: TextOptions, where: str) -> None:
    """Local text is looked at before anything runs; a data set would have to be fetched."""
    if options.dataset is None or options.text is not None:
        try:
            options.documents()
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _models(values: Any, where: str) -> list[ModelOptions]:
    found = []
    for value in _list(values, where):
        value = {"model": value} if isinstance(value, str) else value
        require(
            isinstance(value, dict), f"{where}: {value!r} is not a model: give a name or mapping"
        )
        found += [
            build(ModelOptions, chosen, where) for chosen in _grid(value, ModelOptions, where)
        ]
    return found


def _caches(values: Any, where: str) -> list[CacheSpec]:
    found = []
    for value in _list(values, where):
        if isinstance(value, str):
            found.append(CacheSpec.of(value, where=where))
            continue
        require(
            isinstance(value, dict) and isinstance(value.get("cache"), str),
            f"{where}: {value!r} is not a cache: give a name, or a mapping with a key 'cache'",
        )
        options = {k: v for k, v in value.items() if k != "cache"}
        kind = KINDS.get(value["cache"], KINDS["rotorquant"])  # or the name of a preset of it
        chosen = list(_grid(options, type(kind.defaults), where))
        require(
            len(chosen) == 1 or "label" not in options,
            f"{where}: label is {options.get('label')!r}, but the lists make {len(chosen)} caches: "
            "leave it out",
        )
        found += [CacheSpec.of(value["cache"], entry, where) for entry in chosen]
    return found


def _grid(values: Mapping[str, Any], cls: type, where: str) -> Iterator[dict[str, Any]]:
    """Every choice of one value from each list; where a list is the value, from lists of lists."""
    hints = typing.get_type_hints(cls)
    axes = []
    for name, value in values.items():
        several = isinstance(value, list)
        if typing.get_origin(hints.get(name)) is tuple:
            several = several and any(isinstance(x, list) for x in value)
        require(not several or value != [], f"{where}: {name} is empty; give a value")
        axes.append([(name, x) for x in value] if several else [(name, value)])
    return (dict(chosen) for chosen in itertools.product(*axes))


def _list(values: Any, where: str) -> list[Any]:
    require(values is not None, f"{where} is missing")
    require(isinstance(values, list) and bool(values), f"{where} is {values!r}; give a list")
    return values


def _check_keys(spec: Any, keys: tuple[str, ...], where: str) -> None:
    require(
        isinstance(spec, dict),
        f"{where} is not a YAML plan: it takes a mapping with the keys {', '.join(keys)}",
    )
    for key in spec:
        require(key in keys, f"{where}: unknown key {key!r}; choose from {', '.join(keys)}")


def summary(plan: Plan, done: Mapping[str, Any]) -> str:
    """The plan as a table: what is measured on what, and which rows are measured already."""
    lines = [f"{plan.name}: {len(plan.rows)} rows, fingerprint {plan.fingerprint}"]
    for row in plan.rows:
        state = done.get(row.id, "to do")
        changed = {
            field.name: getattr(row.options, field.name)
            for field in dataclasses.fields(row.options)
            if getattr(row.options, field.name) != field.default
        }
        notes = " ".join(f"{name}={_shown(value)}" for name, value in changed.items())
        lines.append(
            f"{state:<8} {row.measure:<11} {row.model.label:<24} {row.cache.label:<34} {notes}"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
