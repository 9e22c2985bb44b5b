"""One layer of a saved cache: what a file keeps of it, and making it again.

A file may be damaged in ways that its checksum does not show, or made to do harm. So what it has is
compared with what such a layer can have, by name, shape and dtype, before anything of it is used:
kernels do not look whether the rows that they read are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.memory import tensors_of
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import is_turned_by
from rotorquant_hf.quant.rotations import can_be_rotated
from rotorquant_hf.store.side import PackedSide

_STORE = "store."
"""Before the names of the packed tokens' tensors."""

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

    @property
    def has_yet_to_quantise(self) -> bool:
        """Whether it is of a compressed layer that has quantised nothing."""
        return self.type == RotorQuantLayer.__name__ and f"{_STORE}key_weight" not in self.tensors

    @classmethod
    def of(cls, layer: Any) -> LayerEntry:
        """That of a layer, compressed or not."""
        if isinstance(layer, RotorQuantHybridLayer):
            attention, plain = _packed_entry(layer), _plain_attributes(layer)
            of_states = vars(LinearAttentionLayer(layer.number_of_states))
            states = {name: value for name, value in plain.items() if name in of_states}
            tensors = {_STATES + name: tensor for name, tensor in layer.state_tensors().items()}
            return cls(
                attention.type,
                attention.attributes | {"states": states},
                attention.tensors | tensors,
            )
        if isinstance(layer, RotorQuantLayer):
            return _packed_entry(layer)
        return cls(type(layer).__name__, _plain_attributes(layer), tensors_of(layer))

    def restored(self, layer: Any) -> Any:
        """The layer of this entry.

        Args:
            layer: a new one, as the model's config makes it, to be filled; or to be replaced, where
                the saved one's heads could not be coded.

        Raises:
            ValueError: if the entry is of another model, or is not what such a layer has. Whatever
                else may be raised says the latter, too.
        """
        heads = [self.tensors[name] for name in ("keys", "values") if name in self.tensors]
        are_coded = all(can_be_rotated(x.shape[-1]) for x in heads)
        if isinstance(layer, RotorQuantLayer) and not are_coded:
            layer = layer.uncompressed()
        if type(layer).__name__ != self.type:
            raise ValueError(
                f"is of type {self.type}, the model needs {type(layer).__name__}; it is another "
                "model's, or was saved without its config, or by an earlier version"
            )
        if isinstance(layer, RotorQuantHybridLayer):
            attention, states = self._divided()
            _restore_packed(layer, attention)
            _restore_foreign(layer, states)
        elif isinstance(layer, RotorQuantLayer):
            _restore_packed(layer, self)
        else:
            _restore_foreign(layer, self)
            _check_plain_states(layer)
        return layer

    def _divided(self) -> tuple[LayerEntry, LayerEntry]:
        """What a hybrid layer's entry has of its attention part, and of its states."""
        attributes, tensors = dict(self.attributes), dict(self.tensors)
        states = {
            name.removeprefix(_STATES): tensors.pop(name)
            for name in self.tensors
            if name.startswith(_STATES)
        }
        of_states = attributes.pop("states")
        return LayerEntry(self.type, attributes, tensors), LayerEntry(self.type, of_states, states)


# --- compressed layers ---


def _packed_entry(layer: RotorQuantLayer) -> LayerEntry:
    kind = type(layer).__name__
    attributes: dict[str, Any] = {}
    if isinstance(layer, RotorQuantSlidingLayer):
        attributes |= {
            "sliding_window": layer.sliding_window,
            "cumulative_length": layer.cumulative_length,
            "record_past": layer.record_past,
        }
    if not layer.is_initialized:
        return LayerEntry(kind, attributes, {})
    tensors = {f"{_STORE}{name}": tensor for name, tensor in layer.store.state().items()}
    for name, pair in (("sinks", layer.sinks), ("window", layer.recent)):
        tensors[f"{name}.keys"], tensors[f"{name}.values"] = pair
    layer.count_queries()
    if layer.moment is not None:
        tensors["queries.mean"] = layer.moment.mean
        if layer.moment.pre_rope is not None:
            tensors["queries.pre_rope"] = layer.moment.pre_rope
        attributes["queries"] = layer.moment.count
        attributes["score_scale"] = layer.moment.scale
    if layer.stand_ins is not None:
        tensors["stand_ins"] = layer.stand_ins.tokens
    if layer.store.calibrated:
        attributes["calibrated"] = True
    if layer.store.keys_need_wide:
        attributes["wide_keys"] = True
    tensors |= _fingerprints(layer)
    return LayerEntry(kind, attributes, tensors)


def _fingerprints(layer: RotorQuantLayer) -> dict[str, Tensor]:
    """The first rows of the matrices that the seed draws."""
    return {
        f"drawn.{role}_{name}": row
        for role, side in _sides(layer).items()
        for name, row in side.quantizer.drawn().items()
    }


def _sides(layer: RotorQuantLayer) -> dict[str, PackedSide]:
    return {"key": layer.store.keys, "value": layer.store.values}


def _restore_packed(layer: RotorQuantLayer, entry: LayerEntry) -> None:
    attributes, tensors = entry.attributes, entry.tensors
    if isinstance(layer, RotorQuantSlidingLayer):
        _check_window(attributes["sliding_window"], layer.sliding_window)
        layer.cumulative_length = _count("cumulative_length", attributes["cumulative_length"])
        layer.record_past = _flag("record_past", attributes.get("record_past", False))
    if not tensors:
        return
    sinks, recent = (
        (_tensor(tensors, f"{name}.keys"), _tensor(tensors, f"{name}.values"))
        for name in ("sinks", "window")
    )
    layer.lazy_initialization(*recent)
    wide_keys = _flag("wide_keys", attributes.get("wide_keys", False))
    _check_tensors(layer, tensors, wide_keys)
    layer.sinks, layer.recent = sinks, recent
    for name, row in _fingerprints(layer).items():
        if not torch.allclose(row, tensors[name].to(row.device), atol=1e-4):
            raise ValueError(
                f"was saved with another {name.removeprefix('drawn.')} than torch "
                f"{torch.__version__} draws from seed {layer.config.seed}; load it with that torch"
            )
    if "queries.mean" in tensors:
        layer.moment = QueryMoment(
            tensors["queries.mean"],
            _count("queries", attributes["queries"]),
            tensors.get("queries.pre_rope"),
            _factor("score_scale", attributes.get("score_scale")),
        )
    if "stand_ins" in tensors:
        layer.stand_ins = StandIns(tensors["stand_ins"])
    layer.store.load_state(
        {n.removeprefix(_STORE): t for n, t in tensors.items() if n.startswith(_STORE)}, wide_keys
    )
    statistics, rope = layer.store.keys.statistics, layer.rope
    if statistics is not None and rope is not None and not is_turned_by(statistics.rope, rope):
        raise ValueError(
            "was saved where RoPE turns keys otherwise (another rope_theta, or scaling); pass the "
            "config of the model that it was saved with"
        )
    if attributes.get("calibrated", False):
        layer.store.calibrated = True
        # For after a reset. All rows have the same.
        taken = [side.statistics for side in layer.store.sides]
        keys, values = (s.map(lambda x: x[:1].clone()) for s in taken if s is not None)
        layer.calibration = keys, values


def _check_tensors(layer: RotorQuantLayer, tensors: dict[str, Tensor], wide_keys: bool) -> None:
    """Raise ValueError unless these are the tensors of a layer with recent tokens such as theirs.

    The layer knows its head dims already, and holds nothing.
    """
    batch, heads, recent, _ = tensors["window.keys"].shape
    sinks = tensors["sinks.keys"].shape[2]
    if sinks > layer.config.num_sink_tokens:
        raise ValueError(f"has {sinks} sinks, and its settings {layer.config.num_sink_tokens}")
    row_of_codes = next(iter(layer.store.keys.quantizer.row_kinds(layer.device)))
    codes = tensors.get(f"{_STORE}key_{row_of_codes}")
    packed = 0 if codes is None else codes.shape[2]

    known = {"queries.mean", "queries.pre_rope", "stand_ins"}
    for role, side in _sides(layer).items():
        dtype = tensors[f"window.{role}s"].dtype
        for name, n in (("sinks", sinks), ("window", recent)):
            _tensor(tensors, f"{name}.{role}s", (batch, heads, n, side.d), dtype)
            known.add(f"{name}.{role}s")
    held = sinks + packed + recent
    if isinstance(layer, RotorQuantSlidingLayer) and layer.cumulative_length < held:
        raise ValueError(f"has {held} tokens of {layer.cumulative_length}")
    known |= _check_store(layer, tensors, (batch, heads, packed), wide_keys)

    d = layer.store.d_key
    for name in ("queries.mean", "queries.pre_rope"):
        if name in tensors:
            _tensor(tensors, name, (batch, heads, d, d), torch.float32)
    if "stand_ins" in tensors:
        places = _tensor(tensors, "stand_ins", (batch, sinks), torch.int64)
        if sinks and not 0 <= int(places.min()) <= int(places.max()) < held:
            raise ValueError("has stand-ins for sinks that are none of its tokens")
    for name, row in _fingerprints(layer).items():
        _tensor(tensors, name, tuple(row.shape), row.dtype)
        known.add(name)
    for name in sorted(tensors.keys() - known):
        raise ValueError(f"has a tensor {name}, which no such layer has")


def _check_store(
    layer: RotorQuantLayer,
    tensors: dict[str, Tensor],
    axes: tuple[int, int, int],
    wide_keys: bool,
) -> set[str]:
    """The same of the store's tensors, for batch, heads and packed tokens; their names.

    Rows and statistics are those of both sides, or of neither.
    """
    if not any(name.startswith(_STORE) for name in tensors):
        return set()
    batch, heads, packed = axes
    known = set()
    for role, side in _sides(layer).items():
        prefix = f"{_STORE}{role}_"
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        if "weight" not in own:
            raise ValueError(f"lacks the tensor {prefix}weight")
        wide = wide_keys and role == "key"
        statistics = ChannelStatistics.of_tensors(own, layer.config.rope_layout, wide)
        statistics.check(batch, heads, side.d)
        rows = side.quantizer_for(statistics).row_kinds(layer.device)
        known |= {prefix + name for name in (*rows, *statistics.tensors())}
        if packed or rows.keys() & own.keys():
            for name, kind in rows.items():
                _tensor(tensors, prefix + name, (batch, heads, packed, *kind.shape), kind.dtype)
    return known


def _tensor(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor; without a shape, one of keys or values.

    Raises:
        ValueError: if there is none, or it is another.
    """
    if name not in tensors:
        raise ValueError(f"lacks the tensor {name}")
    x = tensors[name]
    if shape is None:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"has {name} {tuple(x.shape)}, {x.dtype}, not four axes of floats")
    elif (tuple(x.shape), x.dtype) != (shape, dtype):
        raise ValueError(f"has {name} {tuple(x.shape)}, {x.dtype}; {shape}, {dtype} is right")
    return x


def _check_window(saved: Any, here: Any) -> None:
    if saved != here:
        raise ValueError(
            f"has a sliding window of {saved}, the model one of {here}; it is another model's"
        )


def _factor(name: str, value: Any) -> float | None:
    if value is not None and (type(value) is not float or not math.isfinite(value)):
        raise ValueError(f"has {name} {value!r}, not a number")
    return value


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"has {name} {value!r}, neither true nor false")
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"has {name} {value!r}, not a number of tokens")
    return value


# --- Transformers' own layers ---


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
            if not isinstance(value, torch.dtype):
                raise ValueError(f"has {name} {value!r}, not a dtype")
        elif isinstance(value, dict):
            known = getattr(layer, name).keys()
            value = dict(value["items"]) | _by_key(entry.tensors, name)
            plain = all(isinstance(x, bool | int | Tensor | None) for x in value.values())
            if value.keys() != known or not plain:
                raise ValueError(f"has {name} {value}; values of {sorted(known)} are right")
        _set(layer, name, value)
    for name, tensor in entry.tensors.items():
        if "." not in name:
            _set(layer, name, tensor)
        elif name.partition(".")[0] not in entry.attributes:
            raise ValueError(f"has a tensor {name}, which no such layer has")
        if hasattr(layer, "device") or getattr(layer, "is_initialized", False):
            layer.device = tensor.device


def _by_key(tensors: dict[str, Tensor], name: str) -> dict[int, Tensor]:
    """Those that are kept as "<name>.<key>"."""
    found = {full.partition("."): x for full, x in tensors.items()}
    return {int(key): x for (attribute, dot, key), x in found.items() if dot and attribute == name}


def _set(layer: Any, name: str, value: Any) -> None:
    """Set an attribute of a layer that its class leaves to its instances."""
    if name.startswith("__") or callable(getattr(layer, name, None)):
        raise ValueError(f"has an attribute {name}, which no such layer has")
    before = getattr(layer, name, None)
    if before is not None and type(value) is not type(before):
        raise ValueError(f"has {name} {value!r}, not a {type(before).__name__}")
    if name == "sliding_window":
        _check_window(value, before)
    setattr(layer, name, value)


def _check_plain_states(layer: Any) -> None:
    """Raise ValueError unless keys and values are there, and fit each other."""
    if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
        return
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.shape[:3] != values.shape[:3]:
        shapes = [None if x is None else tuple(x.shape) for x in (keys, values)]
        raise ValueError(f"has keys {shapes[0]} and values {shapes[1]}, which do not fit")
