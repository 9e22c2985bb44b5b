"""Quantisers by name, each built once per process and device."""

from __future__ import annotations

import functools

import torch

from rotorquant_hf.quant.mse import RotorQuantMSE
from rotorquant_hf.quant.prod import RotorQuantProd
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec

QUANTIZERS: dict[str, type[Quantizer]] = {"mse": RotorQuantMSE, "prod": RotorQuantProd}
"""Classes by the name that `RotorQuantConfig.key_quantizer` takes. A new one is added here."""


# Shared, as rotations take time to draw and memory to hold: a model has the same ones in every
# layer.
@functools.lru_cache(maxsize=64)
def shared_quantizer(spec: QuantizerSpec, d: int, device: torch.device) -> Quantizer:
    """The quantiser of `spec` for vectors of R^d, its tables on `device`.

    Raises:
        ValueError: naming the value that is not possible.
    """
    return QUANTIZERS[spec.name].from_spec(spec, d, device)
