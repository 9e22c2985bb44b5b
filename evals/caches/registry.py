"""Caches by name, with all their options; and the kind of a cache that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from transformers import Cache, PreTrainedConfig

from rotorquant_hf import PRESETS, RotorQuantConfig

from ..errors import InputError, NotAvailableError, first_line
from ..requirements import install, missing
from . import KINDS
from .base import Kind

BASELINE = "dynamic"


@dataclass(frozen=True)
class CacheSpec:
    """One cache with all its options.

    Attributes:
        kind: a name of `KINDS`.
        options: all its options, defaults included: a `RotorQuantConfig`, say.
        label: a short name for tables and plots.
    """

    kind: str
    options: Any
    label: str = field(compare=False)

    @classmethod
    def of(
        cls, name: str, options: Mapping[str, Any] | None = None, where: str = "cache"
    ) -> CacheSpec:
        """The cache of a name of `KINDS`, with some options given.

        A name of `PRESETS` stands for `rotorquant` with that preset.

        Raises:
            InputError: for an unknown name or option, or a value out of range.
        """
        given = dict(options or {})
        where, label = f"{where}: {name}", given.pop("label", None)
        if label is not None and not isinstance(label, str):
            raise InputError(f"{where}: label is {label!r}; it takes a text")
        if name in PRESETS:
            if "preset" in given:
                raise InputError(f"{where}: preset is {given['preset']!r} too; give one of them")
            given, name = {"preset": name, **given}, "rotorquant"
        if name not in KINDS:
            raise InputError(
                f"{where}: unknown cache; choose one of {', '.join(KINDS)}, or a preset of "
                f"rotorquant: {', '.join(PRESETS)}"
            )
        try:
            chosen = KINDS[name].parse(given, where)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        return cls(name, chosen, label or KINDS[name].label(chosen))

    @classmethod
    def named(cls, text: str, where: str = "cache") -> CacheSpec:
        """The cache of a name with settings: `k3v3:residual_length=32,exact_layers=[0]`."""
        return cls.of(*split_name(text, where), where)

    @property
    def code(self) -> tuple[str, str]:
        """Python that makes it for a `model`: the line that imports its class, and the call."""
        return KINDS[self.kind].code(self.options)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the uncompressed cache that others are compared with."""
        return self.kind == BASELINE

    def as_stored(self, cache: Cache) -> CacheSpec:
        """That of a cache which stores whatever it gets as this filled one has stored its text."""
        return replace(self, options=KINDS[self.kind].as_stored(self.options, cache))

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats on its figures."""
        return KINDS[self.kind].notes

    @property
    def period(self) -> int:
        """Tokens after which it quantises again while decoding."""
        return KINDS[self.kind].period(self.options)

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install."""
        package = KINDS[self.kind].package
        return (package,) if package else ()

    def to_dict(self) -> dict[str, Any]:
        """Kind, label and all options as plain values."""
        return {"kind": self.kind, "label": self.label, "options": _plain(self.options)}

    def make(self, config: PreTrainedConfig) -> Cache:
        """A new, empty cache for a model of this config.

        Raises:
            NotAvailableError: if a package is missing, or Transformers has no such cache or
                refuses the model.
            InputError: for options that do not fit the model.
        """
        kind = KINDS[self.kind]
        try:
            return kind.make(self.options, config)
        except InputError:
            raise
        except ImportError as error:
            absent = missing(self.packages)
            why = (
                f"is not installed: {install(absent)}" if absent else f"fails: {first_line(error)}"
            )
            raise NotAvailableError(f"{self.kind} {why}") from error
        except (KeyError, ValueError) as error:
            if isinstance(self.options, RotorQuantConfig):
                raise InputError(f"{self.label}: {error}") from error
            raise NotAvailableError(
                f"Transformers makes no {self.kind} cache for this model: {error}"
            ) from error


def split_name(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """A name and the settings behind its colon, whose values are YAML.

    Raises:
        InputError: for settings that are not `OPTION=VALUE,...`.
    """
    name, colon, settings = text.partition(":")
    try:
        options = yaml.safe_load("{" + settings.replace("=", ": ") + "}")
    except yaml.YAMLError:
        options = None
    bare = [key for key in options or () if f"{key}=" not in settings]
    if options is None or bare or (colon and not options):
        raise InputError(f"{where}: {text!r} is not NAME:OPTION=VALUE,OPTION=VALUE,...")
    return name, options


def kind_of(cache: Cache) -> Kind:
    """The kind that knows the contents of a cache, by the nearest class; else the baseline's."""
    known = {kind.cache_class: kind for kind in reversed(KINDS.values())}  # the first of a class
    return next(known[cls] for cls in type(cache).__mro__ if cls in known)


def option_texts() -> dict[str, str]:
    """Every option of every cache, and what it means; of one that several take, the first's.

    An option that `rotorquant` does not take says whose it is.
    """
    owners: dict[type, list[str]] = {}
    for kind in KINDS.values():
        owners.setdefault(type(kind.defaults), []).append(kind.name)
    found: dict[str, str] = {}
    for options, names in owners.items():
        suffix = "" if "rotorquant" in names else f" ({', '.join(names)})"
        for entry in dataclasses.fields(options):
            found.setdefault(entry.name, entry.metadata.get("help", "") + suffix)
    return found


def _plain(options: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
    }
