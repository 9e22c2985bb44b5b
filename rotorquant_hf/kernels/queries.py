"""The kernel before attention: prepares queries for packed keys.

A score is <q, k_hat> = <T(q w), c> s + <q, mean>, with the weights w and means of the keys'
`ChannelStatistics`, and for `RotorQuantProd` + <S T(q w), sign> |r| sqrt(pi/2) / m. What depends
on the query alone is done once, here:

    rotated = T(q w),  projected = S T(q w),  offset = <q, mean>.

The first two are stored as float16 rows in units of the largest |q w| of the row, a float32
factor, so inputs of any magnitude stay within the range of float16: in that unit |T(q w)| is at
most sqrt(d), and |S T(q w)| a few times sqrt(d m). (Or as float32 with factor 1, for float32
attention.) Where centroids are multiplied as integers, so is `rotated`: of 16 bits, in two digits
of 8. Their unit is the length |q w|, which no element of T(q w) exceeds, over 32,639. Rounding to
it moves a score by less than rounding to float16 does.

Rows are those of all kv heads, one after the other: they share T and S.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.kernels.lookup import integer_column, slots
from rotorquant_hf.kernels.sizes import padded, pieces
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.quant.quantizer import Quantizer

# The largest integer of two digits from -127 to 127.
_LARGEST = tl.constexpr(127 * 256 + 127)


class PreparedQueries(NamedTuple):
    """Queries (batch * kv heads, rows, ...); row i g + j is query i of the group's head j of g.

    Attributes:
        rotated: (batch * kv heads, rows, d) float16 or float32; or (2, batch * kv heads, rows, d)
            int8, 256 times the first and the second being T(q w), each row in the order of
            `integer_column`. projected: as the former with m, or a placeholder where keys have no
            signs.
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
        dtype: of the results. integers: whether those of `rotated` are.
    """

    def __init__(
        self,
        keys: PackedSpan,
        batch: int,
        query_heads: int,
        n: int,
        dtype: torch.dtype,
        integers: bool = False,
    ) -> None:
        scale, mean = keys.statistics.scale, keys.statistics.mean
        rotation = keys.quantizer.stage_one.rotation.matrix()
        heads, d, m = scale.shape[1], keys.quantizer.d, keys.quantizer.num_signs
        group = query_heads // heads
        rows = n * group
        total = batch * heads * rows
        self._shape, self._d, self._m, self._dtype = (batch * heads, rows), d, m, dtype
        self._integers = integers
        options = prepare_options(d, m)
        columns = pieces(max(options["PAD_D"], options["PAD_M"]), options["COLUMNS"])
        self._grid = (pieces(total, options["ROWS"]) * columns, 1, 1)
        self._launch = Launch(
            prepare_kernel,
            p_channel_scale=scale,
            stride_channel_scale=int(scale.shape[3] != 1),
            p_mean=scale if mean is None else mean,
            p_rotation=rotation,
            p_projection=_projection(keys.quantizer) if m else rotation,
            total=total,
            heads=heads,
            group=group,
            rows=rows,
            d=d,
            m=m,
            MEAN=mean is not None,
            HALF=dtype == torch.float16,
            BITS=keys.quantizer.stage_one.bits if integers else 0,
            **options,
        )

    def __call__(self, query: Tensor) -> PreparedQueries:
        """Prepare queries (batch, query heads, n, d)."""
        shape, dtype = self._shape, self._dtype
        if self._integers:
            rotated = query.new_empty(2, *shape, self._d, dtype=torch.int8)
        else:
            rotated = query.new_empty(*shape, self._d, dtype=dtype)
        projected = query.new_empty(*shape, self._m, dtype=dtype) if self._m else rotated
        factors = query.new_empty(3, *shape, dtype=torch.float32)
        self._launch(self._grid, query, *query.stride(), rotated, projected, factors)
        return PreparedQueries(rotated, projected, factors)


def prepare_options(d: int, m: int) -> dict[str, Any]:
    """How `prepare_kernel` is compiled for head dim d and m projections, 0 for none."""
    return {
        "PROD": m > 0,
        "ROWS": 16,
        "PAD_D": padded(d),
        "PAD_M": padded(m),
        "COLUMNS": 32,
        "CHUNK": min(128, padded(d)),
        "num_warps": 4,
        "num_stages": 1,  # chunks are few
    }


@functools.lru_cache(maxsize=64)
def _projection(quantizer: Quantizer) -> Tensor:
    """S T of a quantiser that stores signs, (m, d) float32."""
    assert quantizer.sign_matrix is not None
    rotation = quantizer.stage_one.rotation.matrix()
    return (quantizer.sign_matrix.double() @ rotation.double()).float()


@triton.jit(do_not_specialize=["rows", "total"])
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
    total,
    heads,
    group,
    rows,
    d,
    m,
    MEAN: tl.constexpr,
    PROD: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,  # of the keys, where `rotated` is of integers; else 0
    ROWS: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: tiles of the rows of all kv heads, of each all pieces of COLUMNS results.

    A piece takes all channels of the queries. `total` is the number of rows.
    """
    COUNT: tl.constexpr = (max(PAD_D, PAD_M) + COLUMNS - 1) // COLUMNS
    i_program = tl.program_id(0)
    o_row = i_program // COUNT * ROWS + tl.arange(0, ROWS)
    o_c = i_program % COUNT * COLUMNS + tl.arange(0, COLUMNS)
    m_r = o_row < total
    o_bh, o_r = (o_row // rows).to(tl.int64), o_row % rows
    p_row = p_q + o_bh // heads * stride_qb
    p_row += (o_bh % heads * group + o_r % group) * stride_qh
    p_row += (o_r // group).to(tl.int64) * stride_qn
    # Scales are (heads, d), or (heads, 1) of which the one is read for every channel.
    p_w = p_channel_scale + o_bh * tl.where(stride_channel_scale == 1, d, 1)
    offset = tl.zeros([ROWS], tl.float32)  # <q, mean>
    peak = tl.zeros([ROWS], tl.float32)  # the largest |q w|
    square = tl.zeros([ROWS], tl.float32)  # |q w|^2 in units of peak^2
    b_y = tl.zeros([ROWS, COLUMNS], tl.float32)  # T(q w)
    b_g = tl.zeros([ROWS, COLUMNS], tl.float32)  # S T(q w)
    for k in range(0, d, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        m_k = o_k < d
        m_q = m_r[:, None] & m_k[None, :]
        b_q = tl.load(p_row[:, None] + o_k[None, :] * stride_qd, mask=m_q, other=0)
        b_q = b_q.to(tl.float32)  # [ROWS, CHUNK]
        if MEAN:
            b_mean = tl.load(p_mean + o_bh[:, None] * d + o_k[None, :], mask=m_q, other=0)
            offset += tl.sum(b_q * b_mean, axis=1)
        b_q *= tl.load(p_w[:, None] + o_k[None, :] * stride_channel_scale, mask=m_q, other=0)
        before, peak = peak, tl.maximum(peak, tl.max(tl.abs(b_q), axis=1))
        if BITS > 0:
            unit = tl.where(peak > 0, peak, 1.0)
            b_x, kept = b_q / unit[:, None], before / unit
            square = square * kept * kept + tl.sum(b_x * b_x, axis=1)
        # Row k of T^T is column k of T.
        p_t = p_rotation + o_c[None, :] * d + o_k[:, None]
        b_t = tl.load(p_t, mask=(o_c < d)[None, :] & m_k[:, None], other=0)  # [CHUNK, COLUMNS]
        b_y = tl.dot(b_q, b_t, b_y, input_precision="tf32x3")
        if PROD:
            p_s = p_projection + o_c[None, :] * d + o_k[:, None]
            b_s = tl.load(p_s, mask=(o_c < m)[None, :] & m_k[:, None], other=0)
            b_g = tl.dot(b_q, b_s, b_g, input_precision="tf32x3")

    factor = tl.full([ROWS], 1.0, tl.float32)
    if HALF:
        factor = tl.where(peak > 0, peak, 1.0)
    root = tl.sqrt(square)  # NaN if the query has one, which integers do not know
    p_factor = p_factors + o_row
    m_first = o_row < tl.where(i_program % COUNT == 0, total, 0)  # one piece stores what all have
    tl.store(p_factor, factor * root / _LARGEST if BITS > 0 else factor, mask=m_first)
    tl.store(p_factor + 2 * total, offset, mask=m_first)
    p_out = p_rotated + o_row.to(tl.int64)[:, None] * d
    m_out = m_r[:, None] & (o_c < d)[None, :]
    if BITS > 0:
        # In two steps: for the smallest queries one factor would exceed float32.
        b_y = b_y / factor[:, None] / tl.maximum(root, 1.0)[:, None] * _LARGEST
        b_i = (b_y + 32768.5).to(tl.int32) - 32768  # to the nearest: what is cut off is positive
        b_high = (b_i + 128) >> 8
        p_out += integer_column(o_c, d // slots(BITS), BITS)[None, :]
        tl.store(p_out, b_high.to(tl.int8), mask=m_out)
        tl.store(p_out + total.to(tl.int64) * d, (b_i - (b_high << 8)).to(tl.int8), mask=m_out)
    else:
        b_y = (b_y / factor[:, None]).to(p_rotated.dtype.element_ty)
        tl.store(p_out + o_c[None, :], b_y, mask=m_out)
    if PROD:
        tl.store(p_factor + total, factor, mask=m_first)
        p_out = p_projected + o_row.to(tl.int64)[:, None] * m + o_c[None, :]
        b_g = (b_g / factor[:, None]).to(p_projected.dtype.element_ty)
        tl.store(p_out, b_g, mask=m_r[:, None] & (o_c < m)[None, :])
