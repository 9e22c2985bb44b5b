"""The order in which keys and queries are multiplied as integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.lookup import integer_column, slots


@triton.jit
def _columns_kernel(p_out, D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    o_e = tl.arange(0, PAD)
    tl.store(p_out + o_e, integer_column(o_e, D // slots(BITS), BITS), mask=o_e < D)


def integer_columns(d: int, bits: int, device: str = "cpu") -> Tensor:
    """The column of each element, (d,) int64."""
    out = torch.empty(d, dtype=torch.int32, device=device)
    _columns_kernel[(1,)](out, d, triton.next_power_of_2(d), bits)
    return out.long()
