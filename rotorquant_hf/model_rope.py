"""How a model turns its keys and queries: RoPE's frequencies from its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rotorquant_hf.quant.rope import LAYOUTS, Rope

# Their frequencies depend on the length of the text.
_CHANGING = ("dynamic", "longrope")


def ropes_of(
    config: PreTrainedConfig, layer_types: Sequence[str], layout: str
) -> list[Rope | None]:
    """The turning of the keys of every layer, (1, 1, 1, r) on the CPU.

    None where there is none, or it is not the same for all texts, or the config does not tell. A
    cache looks whether its keys bear it out, and does without where they do not. Layers of a type
    share one object, so that it is brought to a device once for all of them.

    Args:
        config: the model's.
        layer_types: of the layers: "full_attention", "sliding_attention", ...
        layout: which channels are a pair; see `Rope`.
    """
    text: Any = config.get_text_config(decoder=True)
    if not getattr(text, "rope_parameters", None):
        return [None] * len(layer_types)
    # The same object for all layers, unless the config has some that differ from the others.
    configs = [text.per_layer_config[layer] for layer in range(len(layer_types))]
    kinds = [(id(own), kind) for own, kind in zip(configs, layer_types, strict=True)]
    some = dict(zip(kinds, configs, strict=True))
    ropes = {kind: _rope_of(own, kind[1], layout) for kind, own in some.items()}
    return [ropes[kind] for kind in kinds]


def _rope_of(text: Any, layer_type: str, layout: str) -> Rope | None:
    """That of a layer with this config."""
    parameters = text.rope_parameters
    # Latent attention turns a part of the key that is stored after the rest.
    if layout not in LAYOUTS or not parameters or hasattr(text, "qk_rope_head_dim"):
        return None
    by_type = layer_type in parameters
    own = parameters[layer_type] if by_type else parameters
    if not own or own.get("rope_theta") is None or _changes(own):
        return None
    frequencies = _frequencies(text, own, {"layer_type": layer_type} if by_type else {})
    return Rope(frequencies.view(1, 1, 1, -1), layout)


def changing_rope(config: PreTrainedConfig) -> str | None:
    """The type of a RoPE whose frequencies depend on the length of the text; None if none has.

    Args:
        config: the model's. One kind of layers may have it, or one layer.
    """
    text: Any = config.get_text_config(decoder=True)
    if not getattr(text, "rope_parameters", None):
        return None
    for layer in text.per_layer_config:
        parameters = layer.rope_parameters or {}
        for own in (parameters, *parameters.values()):
            if isinstance(own, dict) and _changes(own):
                return own["rope_type"]
    return None


def _changes(parameters: dict[str, Any]) -> bool:
    return parameters.get("rope_type") in _CHANGING


def _frequencies(text: Any, parameters: dict[str, Any], of: dict[str, str]) -> Tensor:
    kind = parameters.get("rope_type", "default")
    with torch.device("cpu"):  # whatever torch.set_default_device says
        if kind != "default":
            return ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"), **of)[0].float()
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        turned = int(heads * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
        return parameters["rope_theta"] ** -exponents
