"""The kernel before attention: prepares queries for packed keys.

A score is <q, k_hat> = <T(q w), c> s + <q, mean>, with the weights w and means of the keys'
`ChannelStatistics`, and for `RotorQuantProd` + <S T(q w), sign> |r| sqrt(pi/2) / m. What depends
on the query alone is done once, here:

    rotated = T(q w),  projected = S T(q w),  offset = <q, mean>.

The first two are stored as unit-sized float16 rows with a float32 factor each, so inputs of any
magnitude stay within the range of float16 (or as float32 with factor 1, for float32 attention).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.kernels.sizes import padded, pieces
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.quant.quantizer import Quantizer

_ROWS = 16


class PreparedQueries(NamedTuple):
    """Queries (batch * kv heads, rows, ...); row i g + j is query i of the group's head j of g.

    Attributes:
        rotated: (batch * kv heads, rows, d) float16 or float32. projected: the same with m, or
            a placeholder where keys have no signs.
        factors: (3, batch * kv heads, rows) float32: of `rotated`, of `projected`, and the offset.
    """

    rotated: Tensor
    projected: Tensor
    factors: Tensor


class PrepareQueries:
    """Rotates and projects queries of one kind for attention over packed keys.

    Args:
        keys: of which quantiser and statistics are read.
        batch, query_heads, n: of the queries.
        dtype: of the results.
    """

    def __init__(
        self, keys: PackedSpan, batch: int, query_heads: int, n: int, dtype: torch.dtype
    ) -> None:
        scale, mean = keys.statistics.scale, keys.statistics.mean
        rotation = keys.quantizer.stage_one.rotation.matrix()
        heads, d, m = scale.shape[1], keys.quantizer.d, keys.quantizer.num_signs
        group = query_heads // heads
        rows = n * group
        self._shape, self._d, self._m, self._dtype = (batch * heads, rows), d, m, dtype
        self._grid = (pieces(rows, _ROWS) * batch * heads, 1, 1)
        self._launch = Launch(
            prepare_kernel,
            p_channel_scale=scale,
            stride_channel_scale=int(scale.shape[3] != 1),
            p_mean=scale if mean is None else mean,
            p_rotation=rotation,
            p_projection=_projection(keys.quantizer) if m else rotation,
            stride_f=batch * heads * rows,
            heads=heads,
            group=group,
            rows=rows,
            d=d,
            m=m,
            MEAN=mean is not None,
            HALF=dtype == torch.float16,
            **prepare_options(d, m),
        )

    def __call__(self, query: Tensor) -> PreparedQueries:
        """Prepare queries (batch, query heads, n, d)."""
        shape, dtype = self._shape, self._dtype
        rotated = query.new_empty(*shape, self._d, dtype=dtype)
        projected = query.new_empty(*shape, self._m, dtype=dtype) if self._m else rotated
        factors = query.new_empty(3, *shape, dtype=torch.float32)
        self._launch(self._grid, query, *query.stride(), rotated, projected, factors)
        return PreparedQueries(rotated, projected, factors)


def prepare_options(d: int, m: int) -> dict[str, Any]:
    """How `prepare_kernel` is compiled for head dim d and m projections, 0 for none."""
    return {
        "PROD": m > 0,
        "ROWS": _ROWS,
        "PAD_D": padded(d),
        "PAD_M": padded(m),
        "CHUNK": 16 if m or d > 128 else 32,
        "num_warps": 8 if m or d > 256 else 4,
        # Of a wide rotation one chunk at a time: two take more shared memory than an sm_89 has.
        "num_stages": 1 if d > 256 else 3,
    }


@functools.lru_cache(maxsize=64)
def _projection(quantizer: Quantizer) -> Tensor:
    """S T of a quantiser that stores signs, (m, d) float32."""
    assert quantizer.sign_matrix is not None
    rotation = quantizer.stage_one.rotation.matrix()
    return (quantizer.sign_matrix.double() @ rotation.double()).float()


@triton.jit(do_not_specialize=["rows", "stride_f"])
def prepare_kernel(
    p_q,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    p_rotated,
    p_projected,
    p_factors,
    # from here on what stays from step to step
    p_channel_scale,
    stride_channel_scale,
    p_mean,
    p_rotation,
    p_projection,
    stride_f,
    heads,
    group,
    rows,
    d,
    m,
    MEAN: tl.constexpr,
    PROD: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: batch * kv heads, of each all tiles of query rows."""
    i_program, tiles = tl.program_id(0), tl.cdiv(rows, ROWS)
    i_bh = (i_program // tiles).to(tl.int64)
    o_r = i_program % tiles * ROWS + tl.arange(0, ROWS)
    o_d, o_m = tl.arange(0, PAD_D), tl.arange(0, PAD_M)
    m_r, m_d, m_m = o_r < rows, o_d < d, o_m < m

    p_row = p_q + i_bh // heads * stride_qb
    p_row += (i_bh % heads * group + o_r % group) * stride_qh
    p_row += (o_r // group).to(tl.int64) * stride_qn
    # Scales are (heads, d), or (heads, 1) of which the one is read for every channel.
    p_w = p_channel_scale + i_bh * tl.where(stride_channel_scale == 1, d, 1)
    offset = tl.zeros([ROWS], tl.float32)  # <q, mean>
    b_y = tl.zeros([ROWS, PAD_D], tl.float32)  # T(q w)
    b_g = tl.zeros([ROWS, PAD_M], tl.float32)  # S T(q w)
    # Some channels at a time: T and S are too large for registers.
    for k in range(0, d, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        m_k = o_k < d
        m_q = m_r[:, None] & m_k[None, :]
        b_q = tl.load(p_row[:, None] + o_k[None, :] * stride_qd, mask=m_q, other=0)
        b_q = b_q.to(tl.float32)  # [ROWS, CHUNK]
        if MEAN:
            b_mean = tl.load(p_mean + i_bh * d + o_k, mask=m_k, other=0)
            offset += tl.sum(b_q * b_mean[None, :], axis=1)
        b_q *= tl.load(p_w + o_k * stride_channel_scale, mask=m_k, other=0)[None, :]
        # Row k of T^T is column k of T.
        p_t = p_rotation + o_d[None, :] * d + o_k[:, None]
        b_t = tl.load(p_t, mask=m_d[None, :] & m_k[:, None], other=0)  # [CHUNK, PAD_D]
        b_y = tl.dot(b_q, b_t, b_y, input_precision="tf32x3")
        if PROD:
            p_s = p_projection + o_m[None, :] * d + o_k[:, None]
            b_s = tl.load(p_s, mask=m_m[None, :] & m_k[:, None], other=0)  # [CHUNK, PAD_M]
            b_g = tl.dot(b_q, b_s, b_g, input_precision="tf32x3")

    p_factor = p_factors + i_bh * rows + o_r
    tl.store(p_factor + 2 * stride_f, offset, mask=m_r)
    b_unit, factor = _unit_rows(b_y, HALF)
    p_out = p_rotated + (i_bh * rows + o_r[:, None]) * d + o_d[None, :]
    b_unit = b_unit.to(p_rotated.dtype.element_ty)
    tl.store(p_out, b_unit, mask=m_r[:, None] & m_d[None, :])
    tl.store(p_factor, factor, mask=m_r)
    if PROD:
        b_unit, factor = _unit_rows(b_g, HALF)
        p_out = p_projected + (i_bh * rows + o_r[:, None]) * m + o_m[None, :]
        b_unit = b_unit.to(p_projected.dtype.element_ty)
        tl.store(p_out, b_unit, mask=m_r[:, None] & m_m[None, :])
        tl.store(p_factor + stride_f, factor, mask=m_r)


@triton.jit
def _unit_rows(b_y, HALF: tl.constexpr):
    """Rows divided by their largest magnitude, and that magnitude; unchanged and 1 unless HALF."""
    factor = tl.full([b_y.shape[0]], 1.0, tl.float32)
    if HALF:
        peak = tl.max(tl.abs(b_y), axis=1)
        factor = tl.where(peak > 0, peak, 1.0)
    return b_y / factor[:, None], factor
