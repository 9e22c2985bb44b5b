"""What the harness asks of a cache: how it is made and named, and what it holds.

A new cache is a subclass of `Kind` in a file of its own, and an entry in `caches/__init__.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from transformers import Cache, PreTrainedConfig

from ..options import build
from .tensors import by_storage, is_code, tensors_in


class Elements(NamedTuple):
    """Key and value elements that a cache, or one of its layers, stands for.

    Attributes:
        held: all of them.
        quantised: those of them that are stored quantised.
    """

    held: int
    quantised: int


@dataclass(frozen=True)
class NoOptions:
    """A cache that takes no options."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    What this class says of contents is true of a cache that keeps plain tensors in full precision.
    A compressed one overrides `elements` and `quantised_states`, and `tokens_until_change` and
    `period` if it quantises several tokens at once.

    Attributes:
        name: by which it is chosen.
        text: what it is, in a line.
        defaults: an instance of the class of its options.
        package: to be installed for it, if any.
        notes: caveats on its figures, for every row of `perplexity`.
    """

    name: str
    text: str
    defaults: Any = NoOptions()
    package: str | None = None
    notes: tuple[str, ...] = ()

    cache_class: ClassVar[type[Cache]] = Cache
    """Whose contents this kind knows, subclasses included."""
    short_names: ClassVar[Mapping[str, str]] = {}
    """What options are called in labels, where not by their name."""

    def parse(self, given: Mapping[str, Any], where: str) -> Any:
        """The options, some of them given.

        Args:
            given: by name.
            where: what they belong to, for messages.

        Raises:
            InputError, TypeError, ValueError: for an unknown option, or a value out of range.
        """
        return build(type(self.defaults), given, where)

    def make(self, options: Any, config: PreTrainedConfig) -> Cache:
        """A new, empty cache for a model of this config.

        Raises:
            ImportError: if `package` is missing.
            NotAvailableError: if the cache cannot be had here, or not for this model.
            KeyError, ValueError: for options that do not fit the model.
        """
        raise NotImplementedError

    def label(self, options: Any) -> str:
        """A short name for tables and plots. It is part of the ids of recorded rows."""
        return ", ".join([self.name, *self.differences(options)])

    def code(self, options: Any) -> tuple[str, str]:
        """Python that makes it for a `model`: the line that imports its class, and the call."""
        name = self.cache_class.__name__
        return f"from {self.cache_class.__module__} import {name}", f"{name}(config=model.config)"

    def as_stored(self, options: Any, cache: Cache) -> Any:
        """The options of a cache that stores whatever it gets as a filled one has stored its text.

        Others than its own where these leave it to the text how many bits are taken.
        """
        return options

    def period(self, options: Any) -> int:
        """Tokens after which it quantises again while decoding."""
        return 1

    def tokens_until_change(self, cache: Cache) -> int:
        """Tokens that it takes until it quantises some; `sys.maxsize` if it never will."""
        return sys.maxsize

    def elements(self, layer: Any) -> Elements:
        """How many elements a layer stands for."""
        floats = [x for x in tensors_in(layer) if x.is_floating_point()]
        return Elements(sum(x.numel() for x in floats), 0)

    def quantised_states(self, layer: Any) -> dict[str, Any]:
        """What a layer stores quantised, codes with their scales: of its keys and of its values.

        Of an unknown layer all that holds one byte an entry, tables apart: so that a cache which
        says that it quantises shows what it stores.
        """
        tensors = tensors_in(layer, modules=False)
        return {"states": [x for x in tensors if x.dtype.itemsize == 1 and is_code(x)]}

    def codes(self, layer: Any) -> dict[str, list[Any]]:
        """The tensors that hold a layer's codes, by part; parts that have none are left out."""
        found = {
            part: [x for x in tensors_in(states) if is_code(x) and x.numel()]
            for part, states in self.quantised_states(layer).items()
        }
        return {part: tensors for part, tensors in found.items() if tensors}

    def span(self, layer: Any) -> tuple[int, int]:
        """The first token that a layer stores quantised, and the one after the last."""
        held, quantised = self.elements(layer)
        return 0, layer.get_seq_length() * quantised // held

    def parts(self, cache: Cache) -> dict[str, int]:
        """Bytes by part, all that the layers hold; each storage once."""
        states = [self.quantised_states(layer) for layer in cache.layers]
        quantised = {id(x) for x in tensors_in(states)}
        sizes = {"codes": 0, "scales": 0, "exact": 0}
        for x in by_storage(tensors_in(cache.layers)):
            part = "exact" if id(x) not in quantised else "codes" if is_code(x) else "scales"
            sizes[part] += x.untyped_storage().nbytes()
        return sizes

    def differences(self, options: Any, skip: tuple[str, ...] = ()) -> list[str]:
        """The options that are not the defaults, in words."""
        found = []
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if field.name in skip or value == getattr(self.defaults, field.name):
                continue
            name = self.short_names.get(field.name, field.name.replace("_", " "))
            shown = {True: "on", False: "off"}.get(value, value) if type(value) is bool else value
            found.append(f"{name} {shown}")
        return found
