"""The lossless mode: packed tokens whose codes hold the vectors exactly.

    with lossless():
        cache = RotorQuantCache(config=model.config, residual_length=8, statistics_length=0)

All but the codes is the project's: store, channel statistics, layers, attention over codes in
torch, files. So what differs from `DynamicCache` then is a fault of logic, and no rounding.

A vector is stored as a fixed-point number: 32 bits an element, four codes of 8 bits, and one scale,
a power of two. What is read back is off by no more than `ULP` of an element and `STEP` of the
largest element of its vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self
from unittest import mock

import torch
from torch import Tensor

from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.packing import pack
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec, Term
from rotorquant_hf.quant.registry import QUANTIZERS, shared_quantizer

ULP = 2.0**-24
STEP = 2.0**-31

_POINT = 30  # bits after the point: in units of their scale elements are in (-2, 2)
_SHIFTS = {"highest": 24, "high": 16, "low": 8, "lowest": 0}


class Lossless(Quantizer):
    """The vectors themselves, in the rows of a quantiser. Neither rotates nor rounds.

    The highest code counts from -128, the others from 0, as the bytes of a number do.
    """

    def __init__(self, d: int, bits: int, device: torch.device) -> None:
        super().__init__()
        self.d, self.bits, self.device = d, bits, device

    @classmethod
    def from_spec(cls, spec: QuantizerSpec, d: int, device: torch.device) -> Self:
        """As in `Quantizer`; takes any number of bits, and needs 32."""
        return cls(d, spec.bits, device)

    def encode(self, u: Tensor, hessian: LowRankHessian | None = None) -> dict[str, Tensor]:
        """As in `Quantizer`."""
        peak = u.abs().amax(dim=-1, keepdim=True).double()
        scale = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 1)
        number = (u.double() / scale * 2**_POINT).round().long() + (1 << 31)
        rows = {name: pack(number >> shift & 255, 8) for name, shift in _SHIFTS.items()}
        return rows | {"scale": scale.squeeze(-1).float()}

    def terms(self) -> tuple[Term, ...]:
        """As in `Quantizer`: the highest bytes first, so that their sum rounds once."""
        eye, codes = torch.eye(self.d, device=self.device), torch.arange(256.0, device=self.device)
        return tuple(
            Term.of(
                name,
                "scale",
                CodeTable.of((codes - 128 * (shift == 24)) * 2.0 ** (shift - _POINT), 8, self.d),
                eye,
            )
            for name, shift in _SHIFTS.items()
        )


@contextmanager
def lossless() -> Iterator[None]:
    """Caches that are used within store keys and values exactly, whatever their bits."""
    shared_quantizer.cache_clear()
    try:
        with mock.patch.dict(QUANTIZERS, mse=Lossless):
            yield
    finally:
        shared_quantizer.cache_clear()
