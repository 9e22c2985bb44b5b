"""This project's `RotorQuantCache`, and the same with the rotations of others.

`haar` and `hadamard` are the same quantiser with the rotation and scale of TurboQuant, and the
recent window and sinks of the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from transformers import Cache, PreTrainedConfig

from rotorquant_hf import PRESETS, RotorQuantCache, RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.quant.wide import WIDE_BITS

from ..errors import InputError
from .base import Elements, Kind


class RotorQuant(Kind):
    """Caches whose options are a `RotorQuantConfig`; `rotorquant` itself takes a `preset` too."""

    cache_class = RotorQuantCache
    short_names = {  # noqa: RUF012 (declared as a ClassVar)
        "residual_length": "window",
        "num_sink_tokens": "sinks",
        "block_length": "block",
        "key_quantizer": "keys",
        "key_scale": "key scale",
        "value_scale": "value scale",
        "equalize_keys": "equalised",
        "equalize_values": "equalised values",
        "center_keys": "centred",
        "statistics_length": "statistics",
        "query_aware": "query-aware",
        "rotor_layers": "layers",
        "exact_layers": "exact layers",
    }

    def parse(self, given: Mapping[str, Any], where: str) -> RotorQuantConfig:
        """As `Kind.parse`."""
        options, base = dict(given), self.defaults
        if self.name == "rotorquant" and "preset" in options:
            base = options.pop("preset")
            if not isinstance(base, str):
                raise InputError(f"{where}: preset is {base!r}; it takes a name")
        return RotorQuantConfig.from_options(base, **options)

    def make(self, options: RotorQuantConfig, config: PreTrainedConfig) -> Cache:
        """As `Kind.make`."""
        return RotorQuantCache(options, config=config)

    def label(self, options: RotorQuantConfig) -> str:
        """The preset or bits, and what differs from the defaults."""
        plain = self.name == "rotorquant"
        preset = next((name for name, config in PRESETS.items() if config == options), None)
        if preset and plain:
            return preset
        bits = "k{}v{}".format(*map(_shown, (options.key_bits, options.value_bits)))
        differences = self.differences(options, skip=("key_bits", "value_bits"))
        if options.by_layer:
            differences.insert(0, "by layer")
        return ", ".join([bits if plain else f"{self.name} {bits}", *differences])

    def code(self, options: RotorQuantConfig) -> tuple[str, str]:
        """As `Kind.code`: the preset that is nearest, and what differs from it."""

        def differing(preset: RotorQuantConfig) -> dict[str, Any]:
            values = dataclasses.asdict(options)
            return {name: x for name, x in values.items() if x != getattr(preset, name)}

        presets = {f'"{name}"': preset for name, preset in PRESETS.items()}
        if options.by_layer:
            presets = {"": RotorQuantConfig()}
        name, preset = min(presets.items(), key=lambda item: len(differing(item[1])))
        given = [f"{field}={value!r}" for field, value in differing(preset).items()]
        arguments = ", ".join([*([name] if name else []), *given, "config=model.config"])
        return "from rotorquant_hf import RotorQuantCache", f"RotorQuantCache({arguments})"

    def as_stored(self, options: RotorQuantConfig, cache: Cache) -> RotorQuantConfig:
        """As `Kind.as_stored`: layers that took 8-bit keys by themselves always have them."""
        wide = cast(RotorQuantCache, cache).wide_layers
        if not wide:
            return options
        given, layers = options.key_spec.bits, range(len(cache.layers))
        bits = tuple(WIDE_BITS if index in wide else given for index in layers)
        return dataclasses.replace(options, key_bits=bits)

    def period(self, options: RotorQuantConfig) -> int:
        """As `Kind.period`."""
        return options.block_length

    def tokens_until_change(self, cache: Cache) -> int:
        """As `Kind.tokens_until_change`."""
        return cast(RotorQuantCache, cache).tokens_until_packing()

    def elements(self, layer: Any) -> Elements:
        """As `Kind.elements`."""
        if not isinstance(layer, RotorQuantLayer):
            return super().elements(layer)
        return Elements(*layer.numbers())

    def quantised_states(self, layer: Any) -> dict[str, Any]:
        """Codes and scales in use: spare capacity is not among them."""
        if not isinstance(layer, RotorQuantLayer):
            return super().quantised_states(layer)
        if not layer.is_initialized or not len(layer.store):
            return {}
        spans = {"keys": layer.store.keys.span(), "values": layer.store.values.span()}
        return {part: dict(span.rows) for part, span in spans.items()}

    def span(self, layer: Any) -> tuple[int, int]:
        """Between the sinks and the recent window."""
        if not isinstance(layer, RotorQuantLayer):
            return super().span(layer)
        last = layer.get_seq_length() - layer.recent_length
        return last - len(layer.store), last

    def parts(self, cache: Cache) -> dict[str, int]:
        """As the cache reports them."""
        return cast(RotorQuantCache, cache).memory().parts


_TURBOQUANT = dataclasses.replace(
    PRESETS["turboquant"], num_sink_tokens=RotorQuantConfig().num_sink_tokens
)

ROTORQUANT = RotorQuant("rotorquant", "this project's RotorQuantCache", RotorQuantConfig())
HAAR = RotorQuant("haar", "the same quantiser with a Haar rotation, as TurboQuant", _TURBOQUANT)
HADAMARD = RotorQuant(
    "hadamard",
    "the same with a randomised Hadamard rotation",
    dataclasses.replace(_TURBOQUANT, rotation="hadamard"),
)


def _shown(bits: int | tuple[int, ...]) -> str:
    """Bits, or their mean over the layers."""
    return f"{sum(bits) / len(bits):.3g}" if isinstance(bits, tuple) else str(bits)
