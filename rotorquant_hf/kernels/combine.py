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

from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.kernels.lookup import table_unit
from rotorquant_hf.kernels.sizes import padded, pieces
from rotorquant_hf.quant.packed import PackedSpan

MAX_EXACT_SPLITS = 4
# Rows up to which they are few, those of a decode step at batch 4 of a model with 32 heads, and
# from which on they are many.
_FEW_ROWS, _MANY_ROWS = 128, 512


class Combine:
    """Writes attention's output for rows of one kind.

    Args:
        values: packed ones, of which rotation and statistics are read.
        batch, query_heads, n: rows of the output.
        sinks: whether there are sink logits.
    """

    def __init__(
        self, values: PackedSpan, batch: int, query_heads: int, n: int, sinks: bool
    ) -> None:
        scale, mean = values.statistics.scale, values.statistics.mean
        d, heads = values.quantizer.d, scale.shape[1]
        group = query_heads // heads
        rows = n * group
        total = batch * heads * rows
        options = combine_options(d, total)
        columns = pieces(options["PAD_D"], options["COLUMNS"])
        self._grid = (pieces(total, options["ROWS"]) * columns, 1, 1)
        self._unread = scale  # where the kernel takes a pointer that it does not read
        self._launch = Launch(
            combine_kernel,
            p_channel_scale=scale,
            stride_channel_scale=int(scale.shape[3] != 1),
            p_mean=scale if mean is None else mean,
            p_rotation=values.quantizer.stage_one.rotation.matrix(),
            heads=heads,
            group=group,
            rows=rows,
            total=total,
            d=d,
            centroid_unit=table_unit(values.quantizer.stage_one.bits) / math.sqrt(d),
            MEAN=mean is not None,
            SINKS=sinks,
            **options,
        )

    def __call__(
        self,
        sums: Tensor,
        stats: Tensor,
        out: Tensor,
        sink_logits: Tensor | None,
        exact_splits: int,
    ) -> None:
        """Combine the splits.

        Args:
            sums: (batch * kv heads, splits, rows, d) float32. stats: (2, batch * kv heads, splits,
                rows) float32: references and masses.
            out: (batch, query heads, n, d), of any dtype and strides.
            sink_logits: (query heads,), or None.
            exact_splits: how many of the splits, the last ones, are of tokens in full precision;
                at most MAX_EXACT_SPLITS.
        """
        logits = self._unread if sink_logits is None else sink_logits
        self._launch(
            self._grid,
            sums,
            stats,
            stats.stride(0),
            logits,
            out,
            *out.stride(),
            sums.shape[1],
            exact_splits,
        )


def combine_options(d: int, rows: int) -> dict[str, Any]:
    """How `combine_kernel` is compiled for head dim d and `rows` query rows of all kv heads.

    Every program reads its part of the rotation, d x COLUMNS, and the partial results of its rows.
    Where rows are few, latency counts: many programs, of one row and a narrow part each, load many
    splits at a time. Where they are many, what programs read does: they share the rotation among
    eight rows, which tensor cores multiply. In between a program has one row and all of it.
    """
    width = padded(d)
    if rows <= _FEW_ROWS or width > 256:
        return {
            "ROWS": 1,
            "PAD_D": width,
            "COLUMNS": min(width, max(16, 2048 // width)),
            "SPLITS": min(128, 16384 // width),
            "STATS": 256,
            "EXACT": MAX_EXACT_SPLITS,
            "TENSOR_CORES": False,
            "num_warps": 4 if width <= 256 else 8,
        }
    if rows < _MANY_ROWS:
        return {
            "ROWS": 1,
            "PAD_D": width,
            "COLUMNS": min(width, 16384 // width),
            "SPLITS": 2048 // width,
            "STATS": 16,
            "EXACT": MAX_EXACT_SPLITS,
            "TENSOR_CORES": False,
            "num_warps": 4,
        }
    return {
        "ROWS": 8,
        "PAD_D": width,
        "COLUMNS": min(width, max(16, 4096 // width)),
        "SPLITS": 1024 // width,
        "STATS": 16,
        "EXACT": MAX_EXACT_SPLITS,
        "TENSOR_CORES": True,
        "num_warps": 2,
    }


@triton.jit(do_not_specialize=["rows", "total", "splits", "exact_splits", "stride_stats"])
def combine_kernel(
    p_sums,
    p_stats,
    stride_stats,
    p_sink_logits,
    p_out,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    splits,
    exact_splits,
    # from here on what stays from step to step
    p_channel_scale,
    stride_channel_scale,
    p_mean,
    p_rotation,
    heads,
    group,
    rows,
    total,
    d,
    centroid_unit,
    MEAN: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    PAD_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    STATS: tl.constexpr,
    EXACT: tl.constexpr,  # exact_splits at most
    TENSOR_CORES: tl.constexpr,
):
    """Grid: tiles of the query rows of all kv heads, of each all pieces of COLUMNS of the output.

    `total` is the number of rows.

    The loads of many splits are under way at once: one after the other their latency would be
    most of the time of a decode step's attention at batch 1.
    """
    COUNT: tl.constexpr = (PAD_D + COLUMNS - 1) // COLUMNS
    packed_splits = splits - exact_splits
    i_program = tl.program_id(0)
    o_row = i_program // COUNT * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, PAD_D)  # of the sums
    o_c = i_program % COUNT * COLUMNS + tl.arange(0, COLUMNS)  # of the output
    m_r, m_d, m_c = o_row < total, o_d < d, o_c < d
    m_rc = m_r[:, None] & m_c[None, :]
    o_bh, o_r = (o_row // rows).to(tl.int64), o_row % rows
    o_h = o_bh % heads * group + o_r % group
    o_first = o_bh * splits * rows + o_r  # of a row, its first split
    p_stat = p_stats + o_first[None, :]
    p_sum = p_sums + o_first[:, None] * d

    # Row k of T, as T^-1 is T^T. Asked for first: nothing below waits for it until the end. (Where
    # there are many rows, its registers are worth more than its latency.)
    p_t = p_rotation + o_d[:, None] * d + o_c[None, :]
    m_t = m_d[:, None] & m_c[None, :]
    if not TENSOR_CORES:
        b_t = tl.load(p_t, mask=m_t, other=0)  # [PAD_D, COLUMNS]

    # First all masses, so that the sums can be added up in their final unit, 2^top. The learned
    # sink starts them: it has mass and no value.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if SINKS:
        top = tl.load(p_sink_logits + o_h, mask=m_r, other=0).to(tl.float32) * 1.4426950408889634
        mass += 1.0
    packed_mass = tl.zeros([ROWS], tl.float32)
    for i in range(0, splits, STATS):
        o_i = i + tl.arange(0, STATS)
        m_i = (o_i < splits)[:, None] & m_r[None, :]
        b_m = tl.load(p_stat + o_i[:, None] * rows, mask=m_i, other=float("-inf"))  # [STATS, ROWS]
        b_l = tl.load(p_stat + stride_stats + o_i[:, None] * rows, mask=m_i, other=0)
        # As in `attend._rescale`: no -inf - -inf in rows that have seen no token.
        new = tl.maximum(top, tl.max(b_m, axis=0))
        base = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2(top - base)
        b_l *= tl.exp2(b_m - base[None, :])
        mass = mass * keep + tl.sum(b_l, axis=0)
        b_l = tl.where((o_i < packed_splits)[:, None], b_l, 0.0)
        packed_mass = packed_mass * keep + tl.sum(b_l, axis=0)
        top = new
    base = tl.where(top == float("-inf"), 0.0, top)
    # Rows that see no token are zeros.
    inverse = tl.where(mass > 0, 1 / tl.where(mass > 0, mass, 1.0), 0.0)

    # The packed sums, then T^-1: once per row, not per token.
    b_sum = tl.zeros([ROWS, PAD_D], tl.float32)  # in rotated space
    for i in range(0, packed_splits, SPLITS):
        o_i = i + tl.arange(0, SPLITS)
        m_i = (o_i < packed_splits)[:, None] & m_r[None, :]
        b_m = tl.load(p_stat + o_i[:, None] * rows, mask=m_i, other=float("-inf"))
        p_i = p_sum[None, :, :] + o_i[:, None, None] * rows * d + o_d[None, None, :]
        b_i = tl.load(p_i, mask=m_i[:, :, None] & m_d[None, None, :], other=0)
        b_sum += tl.sum(b_i * tl.exp2(b_m - base[None, :])[:, :, None], axis=0)
    if TENSOR_CORES:
        b_t = tl.load(p_t, mask=m_t, other=0)
        # Transposed, because a product has rows by the sixteen and columns by the eight.
        b_out = tl.dot(tl.trans(b_t), tl.trans(b_sum), input_precision="tf32x3")
        b_out = tl.trans(b_out)  # [ROWS, COLUMNS]
    else:
        b_out = tl.sum(b_sum[:, :, None] * b_t[None, :, :], axis=1)  # [ROWS, COLUMNS]
    p_w = p_channel_scale + o_bh[:, None] * tl.where(stride_channel_scale == 1, d, 1)
    p_w += o_c[None, :] * stride_channel_scale
    b_out *= centroid_unit * tl.load(p_w, mask=m_rc, other=0)
    if MEAN:
        b_mean = tl.load(p_mean + o_bh[:, None] * d + o_c[None, :], mask=m_rc, other=0)
        b_out += packed_mass[:, None] * b_mean
    # The full-precision sums, of the last splits, are in the model's space already.
    for k in tl.static_range(EXACT):
        i = packed_splits + k
        m_i = o_row < tl.where(i < splits, total, 0)
        b_m = tl.load(p_stats + o_first + i * rows, mask=m_i, other=float("-inf"))
        m_i = m_i[:, None] & m_c[None, :]
        b_i = tl.load(p_sum + i * rows * d + o_c[None, :], mask=m_i, other=0)
        b_out += b_i * tl.exp2(b_m - base)[:, None]
    b_out *= inverse[:, None]
    p_row = p_out + o_bh // heads * stride_ob + o_h * stride_oh
    p_row += (o_r // group).to(tl.int64) * stride_on
    tl.store(
        p_row[:, None] + o_c[None, :] * stride_od,
        b_out.to(p_out.dtype.element_ty),
        mask=m_rc,
    )
