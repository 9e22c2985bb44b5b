"""Saving and loading a cache: one safetensors file, without loss.

The metadata has a JSON header with the settings and one entry per layer; the tensors are named
"<layer>.<name>". The rotations are not stored but drawn again from the seed; their first rows
are, so that a torch that draws differently is noticed and not decoded wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.files import UNEXPECTED, FileKind
from rotorquant_hf.layer_entries import LayerEntry
from rotorquant_hf.layers.hybrid import states_have_read
from rotorquant_hf.placement import Part

CACHE_FILE = FileKind(
    name="rotorquant-cache",
    version=4,
    missing="pass the path that save() was given",
    foreign="was not written by RotorQuantCache.save (a calibration goes into calibration=)",
    again="save the cache again",
)


def save(
    path: str | os.PathLike[str],
    settings: RotorQuantConfig,
    layers: Sequence[Any],
    model: dict[str, Any] | None = None,
    part: Part | None = None,
) -> None:
    """Write the layers to `path`. See `RotorQuantCache.save`.

    Args:
        path, settings, layers: of the file.
        model: what tells their model from others, as `shape_of` its config; None if not known.
        part: the part of the model's kv heads that they hold; None if not known.
    """
    if not any(map(_holds_text, layers)):
        raise ValueError("the cache is empty; run the model with it before saving")
    entries = [LayerEntry.of(layer) for layer in layers]
    header = {
        "model": model,
        "part": None if part is None else [part.index, part.count],
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


def _holds_text(layer: Any) -> bool:
    if states_have_read(layer):
        return True
    return hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0


def read(
    path: str | os.PathLike[str],
    device: torch.device | str,
    model: dict[str, Any] | None = None,
    part: Part | None = None,
) -> tuple[RotorQuantConfig, list[LayerEntry]]:
    """Read settings and layers of a file, its tensors on `device`. See `RotorQuantCache.load`.

    Args:
        path, device: of the file.
        model, part: of the model that will read them, as in `save`.
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
        _check_part(path, header.get("part"), part)
        settings, entries = _parse(path, header, tensors)
    if model is None and saved is not None and any(x.has_yet_to_quantise for x in entries):
        raise ValueError(
            f"{path} is of a cache that knew its model's config, and has yet to quantise tokens by "
            "it; pass config=model.config"
        )
    return settings, entries


def _check_part(path: str | os.PathLike[str], saved: list[int] | None, here: Part | None) -> None:
    held = None if saved is None else Part(*saved)
    if held is None or held == here or (here is None and held.count == 1):
        return
    if here is None:
        raise ValueError(f"{path} has {held}; pass config=model.config")
    raise ValueError(
        f"{path} has {held}, and this process holds {here}; with tensor parallelism (tp_plan) "
        "every process saves to a path of its own, and as many processes load what they saved"
    )


def _parse(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[RotorQuantConfig, list[LayerEntry]]:
    try:
        settings = RotorQuantConfig(**header["settings"])
    except ValueError as error:
        raise ValueError(f"{path} has impossible settings: {error}") from error
    entries = []
    for index, entry in enumerate(header["layers"]):
        missing = [name for name in entry["tensors"] if f"{index}.{name}" not in tensors]
        if missing:
            raise ValueError(f"{path} lacks the tensor {index}.{missing[0]}; save the cache again")
        named = {name: tensors[f"{index}.{name}"] for name in entry["tensors"]}
        entries.append(LayerEntry(entry["type"], entry["attributes"], named))
    return settings, entries


def restore(path: str | os.PathLike[str], layers: list[Any], entries: Sequence[LayerEntry]) -> None:
    """Put the entries of a file into a list of newly made layers, or others in their places."""
    if len(layers) != len(entries):
        raise ValueError(
            f"{path} has {len(entries)} layers, the model has {len(layers)}; it is another model's"
        )
    for index, entry in enumerate(entries):
        try:
            layers[index] = entry.restored(layers[index])
        except ValueError as error:
            raise ValueError(f"layer {index} of {path} {error}") from error
        except UNEXPECTED as error:
            raise ValueError(
                f"layer {index} of {path} is not what such a layer has ({error!r}); "
                f"{CACHE_FILE.again}"
            ) from error
