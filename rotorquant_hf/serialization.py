"""Saving and loading a cache: one safetensors file, without loss.

The metadata has a JSON header with the settings and one entry per layer; the tensors are named
"<layer>.<name>". The rotations are not stored but drawn again from the seed; their first rows
are, so that a torch that draws differently is noticed and not decoded wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.files import FileKind
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.memory import tensors_of
from rotorquant_hf.quant.moments import QueryMoment

CACHE_FILE = FileKind(
    name="rotorquant-cache",
    version=4,
    missing="pass the path that save() was given",
    foreign="was not written by RotorQuantCache.save",
    again="save the cache again",
)

_STATES = "states."
"""Before the names of a hybrid layer's tensors that are not of its attention part."""


@dataclass(frozen=True)
class LayerEntry:
    """One layer of a file: class name, plain attributes, tensors by name."""

    type: str
    attributes: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def needs_config(self) -> bool:
        """Whether the layer can only be made from the model's config."""
        return self.type not in (RotorQuantLayer.__name__, "DynamicLayer")


def save(
    path: str | os.PathLike[str],
    settings: RotorQuantConfig,
    layers: Sequence[Any],
    model: dict[str, Any] | None = None,
) -> None:
    """Write the layers to `path`. See `RotorQuantCache.save`.

    Args:
        path, settings, layers: of the file.
        model: what tells their model from others, as `shape_of` its config; None if not known.
    """
    if not any(layer.is_initialized for layer in layers if hasattr(layer, "is_initialized")):
        raise ValueError("the cache is empty; run the model with it before saving")
    entries = [_entry_of(layer) for layer in layers]
    header = {
        "model": model,
        "settings": settings.to_dict(),
        "layers": [
            {"type": e.type, "attributes": e.attributes, "tensors": sorted(e.tensors)}
            for e in entries
        ],
    }
    tensors = {
        f"{index}.{name}": tensor
        for index, entry in enumerate(entries)
        for name, tensor in entry.tensors.items()
    }
    CACHE_FILE.write(path, header, tensors)


def read(
    path: str | os.PathLike[str], device: torch.device | str, model: dict[str, Any] | None = None
) -> tuple[RotorQuantConfig, list[LayerEntry]]:
    """Read settings and layers of a file, its tensors on `device`. See `RotorQuantCache.load`.

    Args:
        path, device: of the file.
        model: of the model that will read them, as in `save`.
    """
    with CACHE_FILE.read(path, device) as (header, tensors):
        saved = header["model"]
        if model is not None and saved is not None:
            for name in sorted(saved.keys() | model.keys()):
                if saved.get(name) != model.get(name):
                    raise ValueError(
                        f"{path} is of another model: its {name} is {saved.get(name)}, this "
                        f"model's is {model.get(name)}"
                    )
        return _parse(path, header, tensors)


def _parse(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[RotorQuantConfig, list[LayerEntry]]:
    settings = header["settings"] | {"exact_layers": tuple(header["settings"]["exact_layers"])}
    entries = []
    for index, entry in enumerate(header["layers"]):
        missing = [name for name in entry["tensors"] if f"{index}.{name}" not in tensors]
        if missing:
            raise ValueError(f"{path} lacks the tensor {index}.{missing[0]}; save the cache again")
        named = {name: tensors[f"{index}.{name}"] for name in entry["tensors"]}
        entries.append(LayerEntry(entry["type"], entry["attributes"], named))
    return RotorQuantConfig(**settings), entries


def restore(
    path: str | os.PathLike[str], layers: Sequence[Any], entries: Sequence[LayerEntry]
) -> None:
    """Put the entries of a file into newly made layers of the same types."""
    if len(layers) != len(entries):
        raise ValueError(
            f"{path} has {len(entries)} layers, the model has {len(layers)}; it is another model's"
        )
    for index, (layer, entry) in enumerate(zip(layers, entries, strict=True)):
        if type(layer).__name__ != entry.type:
            raise ValueError(
                f"{path} has a layer {index} of type {entry.type}, the model needs "
                f"{type(layer).__name__}; it is another model's, or was saved without its config, "
                "or by an earlier version"
            )
        if isinstance(layer, RotorQuantHybridLayer):
            attention, states = _divided(entry)
            _restore_packed(path, layer, attention)
            _restore_foreign(layer, states)
        elif isinstance(layer, RotorQuantLayer):
            _restore_packed(path, layer, entry)
        else:
            _restore_foreign(layer, entry)


def _entry_of(layer: Any) -> LayerEntry:
    if isinstance(layer, RotorQuantHybridLayer):
        attention, plain = _packed_entry(layer), _plain_attributes(layer)
        of_states = vars(LinearAttentionLayer(layer.number_of_states))
        states = {name: value for name, value in plain.items() if name in of_states}
        tensors = {_STATES + name: tensor for name, tensor in layer.state_tensors().items()}
        return LayerEntry(
            attention.type,
            attention.attributes | {"states": states},
            attention.tensors | tensors,
        )
    if isinstance(layer, RotorQuantLayer):
        return _packed_entry(layer)
    return LayerEntry(type(layer).__name__, _plain_attributes(layer), tensors_of(layer))


def _divided(entry: LayerEntry) -> tuple[LayerEntry, LayerEntry]:
    """What a hybrid layer's entry has of its attention part, and of its states."""
    attributes, tensors = dict(entry.attributes), dict(entry.tensors)
    states = {
        name.removeprefix(_STATES): tensors.pop(name)
        for name in entry.tensors
        if name.startswith(_STATES)
    }
    of_states = attributes.pop("states")
    return LayerEntry(entry.type, attributes, tensors), LayerEntry(entry.type, of_states, states)


def _packed_entry(layer: RotorQuantLayer) -> LayerEntry:
    kind = type(layer).__name__
    attributes: dict[str, Any] = {}
    if isinstance(layer, RotorQuantSlidingLayer):
        attributes |= {
            "sliding_window": layer.sliding_window,
            "cumulative_length": layer.cumulative_length,
        }
    if not layer.is_initialized:
        return LayerEntry(kind, attributes, {})
    tensors = {f"store.{name}": tensor for name, tensor in layer.store.state().items()}
    for name, pair in (("sinks", layer.sinks), ("window", layer.recent)):
        tensors[f"{name}.keys"], tensors[f"{name}.values"] = pair
    layer.count_queries()
    if layer.moment is not None:
        tensors["queries.mean"] = layer.moment.mean
        if layer.moment.pre_rope is not None:
            tensors["queries.pre_rope"] = layer.moment.pre_rope
        attributes["queries"] = layer.moment.count
    if layer.stand_ins is not None:
        tensors["stand_ins"] = layer.stand_ins.tokens
    if layer.store.calibrated:
        attributes["calibrated"] = True
    tensors |= _fingerprints(layer)
    return LayerEntry(kind, attributes, tensors)


def _fingerprints(layer: RotorQuantLayer) -> dict[str, Tensor]:
    """The first rows of the matrices that the seed draws."""
    return {
        f"drawn.{role}_{name}": row
        for role, side in (("key", layer.store.keys), ("value", layer.store.values))
        for name, row in side.quantizer.drawn().items()
    }


def _restore_packed(
    path: str | os.PathLike[str], layer: RotorQuantLayer, entry: LayerEntry
) -> None:
    if isinstance(layer, RotorQuantSlidingLayer):
        if layer.sliding_window != entry.attributes["sliding_window"]:
            raise ValueError(
                f"{path} has a sliding window of {entry.attributes['sliding_window']}, the model "
                f"one of {layer.sliding_window}; it is another model's"
            )
        layer.cumulative_length = entry.attributes["cumulative_length"]
    if not entry.tensors:
        return
    sinks, recent = (
        (entry.tensors[f"{name}.keys"], entry.tensors[f"{name}.values"])
        for name in ("sinks", "window")
    )
    layer.lazy_initialization(*recent)
    layer.sinks, layer.recent = sinks, recent
    for name, row in _fingerprints(layer).items():
        if not torch.allclose(row, entry.tensors[name].to(row.device), atol=1e-4):
            raise ValueError(
                f"{path} was saved with another {name.removeprefix('drawn.')} than torch "
                f"{torch.__version__} draws from seed {layer.config.seed}; load it with that torch"
            )
    if "queries.mean" in entry.tensors:
        layer.moment = QueryMoment(
            entry.tensors["queries.mean"],
            entry.attributes["queries"],
            entry.tensors.get("queries.pre_rope"),
        )
    if "stand_ins" in entry.tensors:
        layer.stand_ins = StandIns(entry.tensors["stand_ins"])
    prefix = "store."
    layer.store.load_state(
        {n.removeprefix(prefix): t for n, t in entry.tensors.items() if n.startswith(prefix)}
    )
    if entry.attributes.get("calibrated", False):
        layer.store.calibrated = True
        # For after a reset. All rows have the same.
        taken = [side.statistics for side in layer.store.sides]
        keys, values = (s.map(lambda x: x[:1].clone()) for s in taken if s is not None)
        layer.calibration = keys, values


def _plain_attributes(layer: Any) -> dict[str, Any]:
    """What a layer of Transformers keeps besides tensors, as JSON values."""
    plain: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, bool | int | float | str | None):
            plain[name] = value
        elif isinstance(value, torch.dtype):
            plain[name] = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, dict):
            kept = {k: v for k, v in value.items() if isinstance(v, bool | int | None)}
            plain[name] = {"items": [[k, v] for k, v in kept.items()]}
    return plain


def _restore_foreign(layer: Any, entry: LayerEntry) -> None:
    for name, value in entry.attributes.items():
        if isinstance(value, dict) and "dtype" in value:
            value = getattr(torch, value["dtype"])
        elif isinstance(value, dict):
            value = dict(value["items"])
        setattr(layer, name, value)
    for name, tensor in entry.tensors.items():
        attribute, _, key = name.partition(".")
        if key:
            getattr(layer, attribute)[int(key)] = tensor
        else:
            setattr(layer, attribute, tensor)
        if hasattr(layer, "device") or "dtype" in entry.attributes:
            layer.device = tensor.device
