"""The kernel after attention: partial results of the splits to the output.

Split i of a row holds a reference m_i (base-2 logarithm), a mass l_i and a sum o_i, in units of
2^m_i. Those of packed tokens are in the rotated, equalised space of the values, those of
tokens in full precision in the model's:

    out = (T^-1(sum_packed 2^m_i o_i) w + (sum_packed 2^m_i l_i) mean + sum_full 2^m_i o_i)
          / (sum_all 2^m_i l_i + 2^sink_logit).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.lookup import table_unit
from rotorquant_hf.kernels.sizes import padded, pieces
from rotorquant_hf.quant.packed import PackedSpan

_ROWS = 16


def combine(
    sums: Tensor,
    stats: Tensor,
    values: PackedSpan,
    out: Tensor,
    packed_splits: int,
    sink_logits: Tensor | None,
) -> None:
    """Write attention's output.

    Args:
        sums: (batch * kv heads, splits, rows, d) float32. stats: (2, batch * kv heads, splits,
            rows) float32: references and masses. The first `packed_splits` are of packed tokens.
        values: their rotation and statistics.
        out: (batch, query heads, n, d), of any dtype and strides.
        sink_logits: (query heads,), or None.
    """
    total, splits, rows, d = sums.shape
    batch, query_heads, _, _ = out.shape
    heads = total // batch
    scale, mean = values.statistics.scale, values.statistics.mean
    combine_kernel[(pieces(rows, _ROWS), total)](
        sums,
        stats,
        stats.stride(0),
        scale,
        int(scale.shape[3] != 1),
        scale if mean is None else mean,
        values.quantizer.stage_one.rotation.matrix(),
        scale if sink_logits is None else sink_logits,
        out,
        *out.stride(),
        heads,
        query_heads // heads,
        rows,
        d,
        splits,
        packed_splits,
        table_unit(values.quantizer.stage_one.bits) / math.sqrt(d),
        MEAN=mean is not None,
        SINKS=sink_logits is not None,
        **combine_options(d),
    )


def combine_options(d: int) -> dict[str, Any]:
    """How `combine_kernel` is compiled for head dim d."""
    wide = d > 256
    return {
        "ROWS": _ROWS,
        "PAD_D": padded(d),
        "CHUNK": 16 if wide else 32,
        "num_warps": 8 if wide else 4,
    }


@triton.jit(do_not_specialize=["rows", "splits", "packed_splits"])
def combine_kernel(
    p_sums,
    p_stats,
    stride_stats,
    p_channel_scale,
    stride_channel_scale,
    p_mean,
    p_rotation,
    p_sink_logits,
    p_out,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    heads,
    group,
    rows,
    d,
    splits,
    packed_splits,
    centroid_unit,
    MEAN: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    PAD_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (tiles of query rows, batch * kv heads)."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, PAD_D)
    m_r, m_d = o_r < rows, o_d < d
    m_rd = m_r[:, None] & m_d[None, :]
    p_stat = p_stats + i_bh * splits * rows + o_r
    o_h = i_bh % heads * group + o_r % group

    # The learned sink starts the sum: it has mass and no value.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if SINKS:
        top = tl.load(p_sink_logits + o_h, mask=m_r, other=0).to(tl.float32) * 1.4426950408889634
        mass += 1.0
    packed_mass = tl.zeros([ROWS], tl.float32)
    # First all masses, so that the sums can be added up in their final unit, 2^top.
    for i in range(splits):
        m_i = tl.load(p_stat + i * rows, mask=m_r, other=float("-inf"))  # [ROWS]
        l_i = tl.load(p_stat + stride_stats + i * rows, mask=m_r, other=0)
        # As in `attend._rescale`: no -inf - -inf in rows that have seen no token.
        new = tl.maximum(top, m_i)
        base = tl.where(new == float("-inf"), 0.0, new)
        keep, gain = tl.exp2(top - base), tl.exp2(m_i - base)
        mass = mass * keep + l_i * gain
        packed_mass = packed_mass * keep + tl.where(i < packed_splits, l_i * gain, 0.0)
        top = new
    base = tl.where(top == float("-inf"), 0.0, top)
    # Rows that see no token are zeros.
    inverse = tl.where(mass > 0, 1 / tl.where(mass > 0, mass, 1.0), 0.0)

    # The packed sums, some channels at a time, through T^-1: once per row, not per token.
    b_out = tl.zeros([ROWS, PAD_D], tl.float32)
    for k in range(0, d, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        m_k = o_k < d
        p_sum = p_sums + (i_bh * splits * rows + o_r[:, None]) * d + o_k[None, :]
        b_sum = tl.zeros([ROWS, CHUNK], tl.float32)  # in rotated space
        for i in range(packed_splits):
            m_i = tl.load(p_stat + i * rows, mask=m_r, other=float("-inf"))
            b_i = tl.load(p_sum + i * rows * d, mask=m_r[:, None] & m_k[None, :], other=0)
            b_sum += b_i * tl.exp2(m_i - base)[:, None]
        p_t = p_rotation + o_k[:, None] * d + o_d[None, :]  # row k of T, as T^-1 is T^T
        b_t = tl.load(p_t, mask=m_d[None, :] & m_k[:, None], other=0)  # [CHUNK, PAD_D]
        b_out = tl.dot(b_sum, b_t, b_out, input_precision="tf32x3")
    p_w = (
        p_channel_scale
        + i_bh * tl.where(stride_channel_scale == 1, d, 1)
        + o_d * stride_channel_scale
    )
    b_out *= centroid_unit * tl.load(p_w, mask=m_d, other=0)[None, :]
    if MEAN:
        b_mean = tl.load(p_mean + i_bh * d + o_d, mask=m_d, other=0)
        b_out += packed_mass[:, None] * b_mean[None, :]
    # The full-precision sums are in the model's space already.
    for i in range(packed_splits, splits):
        m_i = tl.load(p_stat + i * rows, mask=m_r, other=float("-inf"))
        p_sum = p_sums + ((i_bh * splits + i) * rows + o_r[:, None]) * d + o_d[None, :]
        b_out += tl.load(p_sum, mask=m_rd, other=0) * tl.exp2(m_i - base)[:, None]
    b_out *= inverse[:, None]
    p_row = p_out + i_bh // heads * stride_ob + o_h * stride_oh
    p_row += (o_r // group).to(tl.int64) * stride_on
    tl.store(
        p_row[:, None] + o_d[None, :] * stride_od,
        b_out.to(p_out.dtype.element_ty),
        mask=m_rd,
    )
