"""Every cache that the harness measures, under one registry.

`dynamic` is the baseline, uncompressed. `rotorquant` takes every option of `RotorQuantConfig`, and
`preset`. `haar` and `hadamard` are the same quantiser with the rotation and scale of TurboQuant,
and the window and sinks of the default. `quanto`, `hqq` and `fp8` are Transformers'
`QuantizedCache`. The name of a preset (`k3v3`) stands for `rotorquant` with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache

from rotorquant_hf import PRESETS, RotorQuantCache, RotorQuantConfig

from ..errors import InputError, NotAvailableError
from ..options import build, option

BASELINE = "dynamic"


@dataclass(frozen=True)
class QuantoOptions:
    """Options of `QuantizedCache("quanto")`, with Transformers' defaults."""

    nbits: int = option(4, "bits per number", least=1, most=8)
    axis_key: int = option(0, "axis along which keys are grouped")
    axis_value: int = option(0, "axis along which values are grouped")
    q_group_size: int = option(64, "numbers that share a scale", least=1)
    residual_length: int = option(128, "most recent tokens that stay exact", least=1)


@dataclass(frozen=True)
class NoOptions:
    """A cache that takes no options."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache: what it is, and what its options start from."""

    text: str
    defaults: Any
    package: str | None = None


_TURBOQUANT = dataclasses.replace(
    PRESETS["turboquant"], num_sink_tokens=RotorQuantConfig().num_sink_tokens
)

KINDS: dict[str, Kind] = {
    BASELINE: Kind("Transformers' DynamicCache, uncompressed: the baseline", NoOptions()),
    "rotorquant": Kind("this project's RotorQuantCache", RotorQuantConfig()),
    "haar": Kind("the same quantiser with a Haar rotation, as TurboQuant", _TURBOQUANT),
    "hadamard": Kind(
        "the same with a randomised Hadamard rotation",
        dataclasses.replace(_TURBOQUANT, rotation="hadamard"),
    ),
    "quanto": Kind("Transformers' QuantizedCache by quanto", QuantoOptions(), "optimum-quanto"),
    "hqq": Kind("Transformers' QuantizedCache by HQQ", QuantoOptions(), "hqq"),
    "fp8": Kind("Transformers' QuantizedCache in 8-bit floats", NoOptions()),
}

_SHORT = {
    "residual_length": "window",
    "num_sink_tokens": "sinks",
    "block_length": "block",
    "key_quantizer": "keys",
    "key_scale": "key scale",
    "value_scale": "value scale",
    "equalize_keys": "equalised",
    "equalize_values": "equalised values",
    "center_keys": "centred",
    "rotor_layers": "layers",
    "exact_layers": "exact layers",
    "q_group_size": "groups",
}


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
        """The cache of a name of `KINDS` or `PRESETS`, with some options given.

        Raises:
            InputError: for a name or option that there is not, or a value out of range.
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
                f"{where}: there is no such cache; choose one of {', '.join(KINDS)}, or a preset "
                f"of rotorquant: {', '.join(PRESETS)}"
            )
        defaults = KINDS[name].defaults
        try:
            if isinstance(defaults, RotorQuantConfig):
                base = defaults
                if name == "rotorquant" and "preset" in given:
                    base = given.pop("preset")
                    if not isinstance(base, str):
                        raise InputError(f"{where}: preset is {base!r}; it takes a name")
                chosen = RotorQuantConfig.from_options(base, **given)
            else:
                chosen = build(type(defaults), given, where)
                _check_quantized(name, chosen, where)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        return cls(name, chosen, label or _label(name, chosen))

    @property
    def is_baseline(self) -> bool:
        """Whether this is the uncompressed cache that others are compared with."""
        return self.kind == BASELINE

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
        """
        try:
            return _MAKERS[self.kind](self.options, config)
        except ImportError as error:
            package = KINDS[self.kind].package
            raise NotAvailableError(
                f"{self.kind} is not installed: pip install {package} ({error})"
            ) from error
        except (KeyError, ValueError) as error:
            if isinstance(self.options, RotorQuantConfig):
                raise InputError(f"{self.label}: {error}") from error
            raise NotAvailableError(
                f"Transformers makes no {self.kind} cache for this model: {error}"
            ) from error


_NBITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}
_AXES = {"quanto": (0, -1), "hqq": (0, 1)}


def _check_quantized(name: str, options: Any, where: str) -> None:
    """What Transformers would say only when a model is there."""
    if not isinstance(options, QuantoOptions):
        return
    for field_name, value, choices in (
        ("nbits", options.nbits, _NBITS[name]),
        ("axis_key", options.axis_key, _AXES[name]),
        ("axis_value", options.axis_value, _AXES[name]),
    ):
        if value not in choices:
            shown = ", ".join(map(str, choices))
            raise InputError(f"{where}: {field_name} is {value}; choose one of {shown}")


def _rotorquant(options: RotorQuantConfig, config: PreTrainedConfig) -> Cache:
    return RotorQuantCache(options, config=config)


def _quantized(backend: str) -> Callable[[Any, PreTrainedConfig], Cache]:
    return lambda options, config: QuantizedCache(backend, config, **dataclasses.asdict(options))


_MAKERS: dict[str, Callable[[Any, PreTrainedConfig], Cache]] = {
    BASELINE: lambda options, config: DynamicCache(config=config),
    "rotorquant": _rotorquant,
    "haar": _rotorquant,
    "hadamard": _rotorquant,
    "quanto": _quantized("quanto"),
    "hqq": _quantized("hqq"),
    "fp8": _quantized("fp8"),
}


def _plain(options: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
    }


def _label(kind: str, options: Any) -> str:
    """The preset or bits, and what differs from the defaults."""
    if not isinstance(options, RotorQuantConfig):
        base = KINDS[kind].defaults
        name = f"{kind} {options.nbits} bits" if isinstance(options, QuantoOptions) else kind
        return ", ".join([name, *_differences(options, base, skip=("nbits",))])
    preset = next((name for name, config in PRESETS.items() if config == options), None)
    if preset and kind == "rotorquant":
        return preset
    bits = f"k{options.key_bits}v{options.value_bits}"
    name = bits if kind == "rotorquant" else f"{kind} {bits}"
    skip = ("key_bits", "value_bits")
    return ", ".join([name, *_differences(options, KINDS[kind].defaults, skip)])


def _differences(options: Any, base: Any, skip: tuple[str, ...]) -> list[str]:
    found = []
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in skip or value == getattr(base, entry.name):
            continue
        name = _SHORT.get(entry.name, entry.name.replace("_", " "))
        shown = {True: "on", False: "off"}.get(value, value) if type(value) is bool else value
        found.append(f"{name} {shown}")
    return found
