"""Settings of the compressed cache, and the presets."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rotorquant_hf.quant.lloyd_max import MAX_BITS, MIN_BITS
from rotorquant_hf.quant.mse import SCALES
from rotorquant_hf.quant.prod import PROJECTIONS
from rotorquant_hf.quant.quantizer import QuantizerSpec
from rotorquant_hf.quant.registry import QUANTIZERS
from rotorquant_hf.quant.rotations import ROTATIONS

ROPE_LAYOUTS = ("half", "interleaved", "none")

# Values get other rotations than keys, as in the reference.
_VALUE_SEED_OFFSET = 100

# Far beyond what is of use. A file says what is to be drawn, and could ask for days of it.
_MAX_SEED, _MAX_ROTOR_LAYERS, _MAX_QJL_DIM = 2**32 - 1, 64, 4096


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RotorQuantConfig:
    """All settings of a `RotorQuantCache`. Immutable and hashable.

    `describe()` prints every field with its default and meaning (the `help` of its metadata).

    Raises:
        ValueError: for a value out of range, naming it and the possible ones.
    """

    key_bits: int | tuple[int, ...] = _help(
        4,
        "bits per element of a key, 1 to 8 ('prod': 2 to 8); layers whose scores they would spoil, "
        "by the queries seen, take 8; a tuple has them layer by layer, final (see allocate_bits)",
    )
    value_bits: int | tuple[int, ...] = _help(4, "the same of a value, 1 to 8")
    key_quantizer: str = _help(
        "mse",
        "'mse' (least squared error) or 'prod' (unbiased scores: one bit is spent on QJL signs)",
    )
    rotation: str = _help("cascade", "'cascade', 'rotors' (the reference), 'haar' or 'hadamard'")
    rotor_layers: int | None = _help(None, "layers of 'cascade' or 'rotors'; None: their default")
    key_scale: str = _help(
        "least_squares", "'norm', 'matched', 'least_squares' or 'unbiased': the scale of a key"
    )
    value_scale: str = _help("unbiased", "the same for a value")
    equalize_keys: float = _help(
        0.5, "keys are divided per channel by their rms to this power, 0 to 1, before coding"
    )
    equalize_values: float = _help(0.5, "the same for values")
    center_keys: bool | str = _help(
        True,
        "subtract from keys their channel means: True (all of them), False, or 'auto' (those of "
        "channels that hold little but a large constant, as key biases make them)",
    )
    rope_layout: str = _help(
        "half",
        "which two channels RoPE turns together: 'half' (i, i + d/2), 'interleaved' (2i, 2i + 1) "
        "or 'none'; the two share one equalisation scale",
    )
    qjl_dim: int | None = _help(None, "projections of 'prod' keys; None: the head dim")
    qjl_projection: str = _help("orthogonal", "rows of the projection: 'orthogonal', 'gaussian'")
    statistics_length: int = _help(
        256,
        "tokens that the channel statistics are taken from at least: nothing is quantised before "
        "(of a sliding window at most its tokens); 0: the first block that is quantised",
    )
    query_aware: bool = _help(
        True,
        "round keys for a small error along the queries of the prompt, which attention 'sdpa' and "
        "'rotorquant' show; False: every element to the nearest",
    )
    residual_length: int = _help(128, "latest tokens, kept in full precision")
    block_length: int = _help(32, "recent tokens are quantised in blocks of this many")
    num_sink_tokens: int = _help(4, "first tokens, kept in full precision")
    exact_layers: tuple[int, ...] = _help(
        (), "layers left uncompressed; negative counts from the last (needs the model's config)"
    )
    seed: int = _help(42, "seed of the rotations and projections")
    check_finite: bool = _help(
        False, "look for NaN and infinity on a GPU too (the host then waits for it every step)"
    )

    def __post_init__(self) -> None:
        _check_choice("key_quantizer", self.key_quantizer, tuple(QUANTIZERS))
        self._check_bits("key_bits", QUANTIZERS[self.key_quantizer].min_bits)
        self._check_bits("value_bits", MIN_BITS)
        _check_choice("rotation", self.rotation, ROTATIONS)
        _check_choice("key_scale", self.key_scale, SCALES)
        _check_choice("value_scale", self.value_scale, SCALES)
        _check_choice("rope_layout", self.rope_layout, ROPE_LAYOUTS)
        _check_choice("qjl_projection", self.qjl_projection, PROJECTIONS)
        _check_int("residual_length", self.residual_length, 0)
        _check_int("block_length", self.block_length, 1)
        _check_int("num_sink_tokens", self.num_sink_tokens, 0)
        _check_int("statistics_length", self.statistics_length, 0)
        _check_int("seed", self.seed, 0, _MAX_SEED)
        for name, most in (("rotor_layers", _MAX_ROTOR_LAYERS), ("qjl_dim", _MAX_QJL_DIM)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1, most)
        if self.rotor_layers is not None and self.rotation not in ("cascade", "rotors"):
            raise ValueError(
                f"rotor_layers is {self.rotor_layers}, but the rotation {self.rotation!r} has no "
                "layers; leave rotor_layers out"
            )
        for name, unset in (("qjl_dim", None), ("qjl_projection", "orthogonal")):
            if getattr(self, name) != unset and self.key_quantizer != "prod":
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but keys of the quantiser "
                    f"{self.key_quantizer!r} have no QJL signs; leave {name} out, or choose "
                    "key_quantizer='prod'"
                )
        for name in ("equalize_keys", "equalize_values"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; choose a power from 0 (off) to 1")
        if not isinstance(self.center_keys, bool) and self.center_keys != "auto":
            raise ValueError(f"center_keys is {self.center_keys!r}; choose True, False or 'auto'")
        for name in ("check_finite", "query_aware"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose True or False")
        layers = self.exact_layers
        if not isinstance(layers, tuple | list) or not all(type(i) is int for i in layers):
            raise ValueError(f"exact_layers is {layers!r}; pass layer indices such as (0, -1)")
        object.__setattr__(self, "exact_layers", tuple(layers))

    def _check_bits(self, name: str, low: int) -> None:
        bits = getattr(self, name)
        if not isinstance(bits, tuple | list):
            _check_int(name, bits, low, MAX_BITS)
            return
        if not bits:
            raise ValueError(f"{name} is empty; give a number, or one for every layer")
        for each in bits:
            _check_int(f"{name} of a layer", each, low, MAX_BITS)
        object.__setattr__(self, name, tuple(bits))

    @property
    def by_layer(self) -> dict[str, tuple[int, ...]]:
        """Of `key_bits` and `value_bits` those that go layer by layer, by name."""
        given = {name: getattr(self, name) for name in ("key_bits", "value_bits")}
        return {name: bits for name, bits in given.items() if isinstance(bits, tuple)}

    def of_layer(self, index: int) -> RotorQuantConfig:
        """The settings of one layer: where bits go layer by layer, with its own alone.

        Raises:
            ValueError: if there are none for this layer.
        """
        by_layer = self.by_layer
        for name, bits in by_layer.items():
            if index >= len(bits):
                raise ValueError(
                    f"{name} has {len(bits)} numbers, but the model has a layer {index}; give one "
                    "for every layer"
                )
        if not by_layer:
            return self
        own: dict[str, Any] = {name: bits[index : index + 1] for name, bits in by_layer.items()}
        return dataclasses.replace(self, **own)

    @property
    def widens_keys(self) -> bool:
        """Whether a layer's keys get 8 bits if they turn out to need them (`quant.wide`): not where
        their bits were chosen layer by layer.
        """
        return "key_bits" not in self.by_layer

    @property
    def tokens_before_packing(self) -> int:
        """Tokens of a text until its first ones are quantised, in a layer of full attention."""
        due = max(self.residual_length + self.block_length, self.statistics_length)
        return self.num_sink_tokens + due

    def num_to_quantise(self, recent: int, wanted: int = 0) -> int:
        """How many of `recent` tokens in full precision are quantised now: whole blocks.

        0 while there are fewer than `wanted` of them.
        """
        if recent < wanted:
            return 0
        return max(0, recent - self.residual_length) // self.block_length * self.block_length

    @property
    def key_spec(self) -> QuantizerSpec:
        """The quantiser of keys."""
        return QuantizerSpec(
            name=self.key_quantizer,
            bits=_one_number("key_bits", self.key_bits),
            seed=self.seed,
            rotation=self.rotation,
            rotor_layers=self.rotor_layers,
            scale=self.key_scale,
            qjl_dim=self.qjl_dim,
            qjl_projection=self.qjl_projection,
        )

    @property
    def value_spec(self) -> QuantizerSpec:
        """The quantiser of values."""
        return QuantizerSpec(
            name="mse",
            bits=_one_number("value_bits", self.value_bits),
            seed=self.seed + _VALUE_SEED_OFFSET,
            rotation=self.rotation,
            rotor_layers=self.rotor_layers,
            scale=self.value_scale,
        )

    @classmethod
    def from_options(
        cls, base: RotorQuantConfig | str | None = None, **options: Any
    ) -> RotorQuantConfig:
        """Settings from a preset name or other settings, with some of them replaced.

        Args:
            base: a name of `PRESETS`, settings, or None for the defaults.
            **options: fields to replace.

        Raises:
            ValueError: for an unknown preset or option, naming the known ones.
        """
        if base is None:
            base = cls()
        elif isinstance(base, str):
            if base not in PRESETS:
                raise ValueError(
                    f"preset is {base!r}{_meant(base, PRESETS)}; choose one of "
                    f"{', '.join(PRESETS)}, or set key_bits and value_bits"
                )
            base = PRESETS[base]
        elif not isinstance(base, cls):
            raise TypeError(
                f"settings are of type {type(base).__name__}; pass a preset name or a "
                "RotorQuantConfig (a model's config goes into the keyword config=)"
            )
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            meant = "".join(_meant(name, names) for name in unknown)
            raise ValueError(
                f"unknown option {', '.join(unknown)}{meant}; there are {', '.join(names)}"
            )
        return dataclasses.replace(base, **options)

    @classmethod
    def describe(cls) -> str:
        """Every option with its default and meaning, a line each."""
        return "\n".join(
            f"{f.name} = {f.default!r}: {f.metadata['help']}" for f in dataclasses.fields(cls)
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values (for JSON)."""
        return dataclasses.asdict(self)


def _meant(name: str, known: Iterable[str]) -> str:
    """A question after the known name that is most like another, if there is one."""
    found = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        reach = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} is {value!r}; choose a whole number {reach}")


def _one_number(name: str, bits: int | tuple[int, ...]) -> int:
    if isinstance(bits, int):
        return bits
    if len(bits) > 1:
        raise ValueError(
            f"{name} is {bits}, layer by layer; a single layer takes one number: see "
            "RotorQuantConfig.of_layer"
        )
    return bits[0]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


PRESETS: dict[str, RotorQuantConfig] = {
    "k8v8": RotorQuantConfig(key_bits=8, value_bits=8),
    "k4v4": RotorQuantConfig(),
    "k4v3": RotorQuantConfig(key_bits=4, value_bits=3),
    "k3v3": RotorQuantConfig(key_bits=3, value_bits=3),
    "k3v2": RotorQuantConfig(key_bits=3, value_bits=2),
    "k2v2": RotorQuantConfig(key_bits=2, value_bits=2),
    "rotorquant-reference": RotorQuantConfig(
        key_bits=3,
        value_bits=3,
        key_quantizer="prod",
        qjl_projection="gaussian",
        rotation="rotors",
        rotor_layers=1,
        key_scale="norm",
        value_scale="norm",
        equalize_keys=0.0,
        equalize_values=0.0,
        center_keys=False,
        statistics_length=0,
        query_aware=False,
        num_sink_tokens=0,
    ),
    "turboquant": RotorQuantConfig(
        key_bits=3,
        value_bits=3,
        rotation="haar",
        key_scale="norm",
        value_scale="norm",
        equalize_keys=0.0,
        equalize_values=0.0,
        center_keys=False,
        statistics_length=0,
        query_aware=False,
        num_sink_tokens=0,
    ),
}
"""Settings by name. k4v3 means 4-bit keys and 3-bit values; the last two are published methods."""
