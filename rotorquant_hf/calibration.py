"""Calibration: channel statistics and query directions of a model, taken once and kept in a file.

A cache takes these from the first tokens of its own text (`statistics_length`). With a calibration
it has them from the start: it quantises as soon as tokens are no longer recent, and the queries of
its own text need not be seen, so that every attention implementation will do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.files import FileKind
from rotorquant_hf.placement import Part
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.rope import Rope, is_turned_by

CALIBRATION_FILE = FileKind(
    name="rotorquant-calibration",
    version=5,
    missing="make it with calibrate(model, ids)",
    foreign="is not a calibration; make one with calibrate(model, ids)",
    again="calibrate again",
)

SETTINGS = ("equalize_keys", "equalize_values", "center_keys", "rope_layout", "query_aware")
"""The settings of a cache that its channel statistics depend on."""

_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

_SIDES = ("key", "value")

_NAME = re.compile(r"(\d+)\.(key|value)\.(\w+)")
"""Of a tensor: layer, side, name."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of the layers of one model, from `calibrate`.

    Attributes:
        model: what tells the model from others, by the names of its config. A model fine-tuned from
            it has the same, and may use the calibration.
        settings: the values of `SETTINGS`.
        tokens: how many tokens they were taken from.
        layers: for every layer that has them, those of its keys and of its values, for a batch of
            one row.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    tokens: int
    layers: dict[int, tuple[ChannelStatistics, ChannelStatistics]]

    def check(self, config: PreTrainedConfig, settings: RotorQuantConfig) -> None:
        """Raise ValueError unless it is of this model and fits a cache of these settings."""
        for name, value in shape_of(config).items():
            if self.model.get(name) != value:
                raise ValueError(
                    f"the calibration is of another model: its {name} is {self.model.get(name)}, "
                    f"this model's is {value}; make one with calibrate(model, ids)"
                )
        for name, value in self.settings.items():
            if getattr(settings, name) != value:
                raise ValueError(
                    f"{name} is {getattr(settings, name)!r}, but the calibration was made with "
                    f"{value!r}; make one with calibrate(model, ids, settings)"
                )

    def check_ropes(self, ropes: Sequence[Rope | None]) -> None:
        """Raise ValueError unless RoPE, given for every layer, turns keys as where it was made."""
        for index, rope in enumerate(ropes):
            if index in self.layers and not is_turned_by(self.layers[index][0].rope, rope):
                raise ValueError(
                    f"in layer {index} the calibration was made where RoPE turns keys otherwise "
                    "(another rope_theta, or scaling); make one with calibrate(model, ids)"
                )

    def of_part(self, part: Part) -> Calibration:
        """That of a part of the kv heads."""
        layers = {
            i: (keys.map(part.take), values.map(part.take))
            for i, (keys, values) in self.layers.items()
        }
        return replace(self, layers=layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file (atomically: an old file stays if this fails)."""
        header = {
            "model": self.model,
            "settings": self.settings,
            "tokens": self.tokens,
            "wide_keys": [index for index, (keys, _) in self.layers.items() if keys.needs_wide],
        }
        tensors = {
            f"{index}.{side}.{name}": tensor
            for index, pair in self.layers.items()
            for side, statistics in zip(_SIDES, pair, strict=True)
            for name, tensor in statistics.tensors().items()
        }
        CALIBRATION_FILE.write(path, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is damaged, or of another kind or version.
        """
        with CALIBRATION_FILE.read(path) as (header, tensors):
            settings = {name: header["settings"][name] for name in SETTINGS}
            layers = _layers_of(tensors, settings["rope_layout"], header["wide_keys"])
            unknown = [index for index in header["wide_keys"] if index not in layers]
            if unknown:
                raise ValueError(
                    f"{path} has wide_keys {unknown[0]!r}, which is no layer of it; calibrate again"
                )
            return cls(dict(header["model"].items()), settings, header["tokens"], layers)


def _layers_of(
    tensors: dict[str, Tensor],
    rope_layout: str,
    wide_keys: list[int],
) -> dict[int, tuple[ChannelStatistics, ChannelStatistics]]:
    named: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, side, name = _NAME.fullmatch(key).groups()  # type: ignore[union-attr]
        named.setdefault((int(index), side), {})[name] = tensor
    read = {
        (index, side): ChannelStatistics.of_tensors(
            found, rope_layout, side == "key" and index in wide_keys
        )
        for (index, side), found in named.items()
    }
    return {i: (read[i, "key"], read[i, "value"]) for i in sorted({i for i, _ in read})}


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What tells a model from others, by the names of its config."""
    text = config.get_text_config(decoder=True)
    found: dict[str, Any] = {}
    for name in _SHAPE:
        # Where layers differ in it (gemma4's head dims), the config refuses to give one for all.
        with suppress(AttributeError, RuntimeError, ValueError):
            found[name] = getattr(text, name)
    return {name: value for name, value in found.items() if value is not None}


def settings_of(settings: RotorQuantConfig) -> dict[str, Any]:
    """The settings that the statistics depend on."""
    return {name: getattr(settings, name) for name in SETTINGS}
