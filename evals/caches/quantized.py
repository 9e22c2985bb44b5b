"""Transformers' `QuantizedCache`: quanto, HQQ and 8-bit floats."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig, QuantizedCache, cache_utils
from transformers.cache_utils import QuantizedLayer

from ..errors import InputError
from ..options import option
from .base import Elements, Kind

# In later versions of Transformers fp8 shares this base with the others.
_BaseQuantizedLayer = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)

_FIRST_CHUNK = (
    "this cache quantises the whole first chunk, so the figures depend on the option chunk"
)


@dataclass(frozen=True)
class QuantoOptions:
    """Options of `QuantizedCache("quanto")` and `("hqq")`, with Transformers' defaults."""

    nbits: int = option(4, "bits per element", min=1, max=8)
    axis_key: int = option(0, "axis along which keys are grouped")
    axis_value: int = option(0, "axis along which values are grouped")
    q_group_size: int = option(64, "elements that share a scale", min=1)
    residual_length: int = option(128, "recent tokens kept in full precision", min=1)


@dataclass(frozen=True)
class Quantized(Kind):
    """Caches that quantise their first pass at once and then every `residual_length` tokens.

    Attributes:
        choices: values that Transformers takes of an option; it refuses others only when a model
            is there.
    """

    notes: tuple[str, ...] = (_FIRST_CHUNK,)
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    cache_class = QuantizedCache
    short_names = {"residual_length": "window", "q_group_size": "groups"}  # noqa: RUF012

    def parse(self, given: Mapping[str, Any], where: str) -> Any:
        """As `Kind.parse`."""
        options = super().parse(given, where)
        for name, choices in self.choices.items():
            value = getattr(options, name)
            if value not in choices:
                shown = ", ".join(map(str, choices))
                raise InputError(f"{where}: {name} is {value}; choose one of {shown}")
        return options

    def make(self, options: Any, config: PreTrainedConfig) -> Cache:
        """As `Kind.make`."""
        return QuantizedCache(self.name, config, **dataclasses.asdict(options))

    def label(self, options: Any) -> str:
        """The name, the bits where there is a choice, and what differs from the defaults."""
        bits = f" {options.nbits} bits" if isinstance(options, QuantoOptions) else ""
        return ", ".join([f"{self.name}{bits}", *self.differences(options, skip=("nbits",))])

    def code(self, options: Any) -> tuple[str, str]:
        """As `Kind.code`."""
        given = [f"{name}={value!r}" for name, value in dataclasses.asdict(options).items()]
        arguments = ", ".join([f'"{self.name}"', "model.config", *given])
        return "from transformers import QuantizedCache", f"QuantizedCache({arguments})"

    def period(self, options: Any) -> int:
        """As `Kind.period`; fp8 quantises every token at once."""
        return getattr(options, "residual_length", 1)

    def tokens_until_change(self, cache: Cache) -> int:
        """As `Kind.tokens_until_change`: the window is quantised when it is full."""
        layers = [x for x in cache.layers if isinstance(x, QuantizedLayer) and x.is_initialized]
        return min((x.residual_length - _window(x) for x in layers), default=sys.maxsize)

    def elements(self, layer: Any) -> Elements:
        """As `Kind.elements`; the quantised ones as they were before they were packed."""
        if not isinstance(layer, _BaseQuantizedLayer):
            return super().elements(layer)
        quantised = sum(map(_unpacked, self.quantised_states(layer).values()))
        if not isinstance(layer, QuantizedLayer):  # fp8 keeps no token in full precision
            return Elements(quantised, quantised)
        recent = sum(x.numel() for x in (layer.keys, layer.values) if x is not None)
        return Elements(quantised + recent, quantised)

    def quantised_states(self, layer: Any) -> dict[str, Any]:
        """As `Kind.quantised_states`."""
        if not isinstance(layer, _BaseQuantizedLayer):
            return super().quantised_states(layer)
        return {part: getattr(layer, f"_quantized_{part}", None) for part in ("keys", "values")}


def _window(layer: QuantizedLayer) -> int:
    """Tokens in the recent window; an empty one is a tensor of one dimension."""
    keys = layer.keys
    return keys.shape[-2] if keys is not None and keys.dim() == 4 else 0


def _unpacked(states: Any) -> int:
    """Elements that quantised states stand for: a tensor of quanto's, or a pair.

    A pair is HQQ's tensor and its meta data, or the 8-bit floats and their scale.
    """
    if states is None:
        return 0
    if isinstance(states, Tensor):
        return states.numel()
    tensor, meta = states
    return math.prod(meta["shape"]) if isinstance(meta, dict) else tensor.numel()


QUANTO = Quantized(
    "quanto",
    "Transformers' QuantizedCache by quanto",
    QuantoOptions(),
    "optimum-quanto",
    choices={"nbits": (2, 4), "axis_key": (0, -1), "axis_value": (0, -1)},
)
HQQ = Quantized(
    "hqq",
    "Transformers' QuantizedCache by HQQ",
    QuantoOptions(),
    "hqq",
    choices={"nbits": (1, 2, 3, 4, 8), "axis_key": (0, 1), "axis_value": (0, 1)},
)
FP8 = Quantized("fp8", "Transformers' QuantizedCache in 8-bit floats")
