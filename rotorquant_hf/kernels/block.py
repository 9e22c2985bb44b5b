"""What a block of keys or values is like, channel by channel, in shares of its tokens.

With `channels` in the place of `Measured.of`, and of the mean before RoPE in
`ChannelStatistics.of_block`. A split of tokens has its peak, the largest entry, and in units of
it the sums of its vectors, of their squares, and of the vectors before RoPE: squares of 1e-30 or
1e30 would leave float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.pairs import finite, load_turned_back
from rotorquant_hf.kernels.sizes import padded, pieces

_ELEMENTS = 8192  # of a split: what four warps hold in their registers


class BlockSums(NamedTuple):
    """Of the splits of a block's tokens.

    Attributes:
        sums: (batch * heads, splits, 3, d) float32: of the vectors, of their squares, and of the
            vectors before RoPE, which are not there if they are not known.
        peaks: (batch * heads, splits) float32. tokens: how many were looked at.
    """

    sums: Tensor
    peaks: Tensor
    tokens: int


def block_sums(
    x: Tensor, places: Tensor, sines: tuple[Tensor, Tensor] | None, half: bool
) -> BlockSums:
    """Those of vectors (batch, heads, n, d), at least one token, of any strides.

    Args:
        places, sines, half: as in `query_moments`.
    """
    (batch, heads, _, d), tokens = x.shape, len(places)
    width = padded(d)
    rows = max(8, _ELEMENTS // width)
    splits = pieces(tokens, rows)
    sums = x.new_empty(batch * heads, splits, 3, d, dtype=torch.float32)
    peaks = x.new_empty(batch * heads, splits, dtype=torch.float32)
    cos, sin = (x, x) if sines is None else sines  # not read
    launch = launch_of(
        block_kernel,
        x.dtype,
        x.device,
        TURNED=sines is not None,
        HALF=half,
        ROWS=rows,
        PAD_D=width,
        num_warps=4,
        enable_fp_fusion=False,  # see `launch_of`
    )
    launch(
        (batch * heads * splits, 1, 1),
        x,
        *x.stride(),
        places,
        cos,
        sin,
        cos.stride(0) if cos.shape[0] > 1 else 0,
        sums,
        peaks,
        tokens,
        heads,
        splits,
        d,
        cos.shape[-1],
    )
    return BlockSums(sums, peaks, tokens)


@triton.jit(do_not_specialize=["stride_cb", "tokens", "heads", "splits"])
def block_kernel(
    p_x,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    p_places,
    p_cos,
    p_sin,
    stride_cb,
    p_sums,
    p_peaks,
    tokens,
    heads,
    splits,
    d,
    r,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAD_D: tl.constexpr,
):
    """Grid: all heads, of each its splits."""
    i_program = tl.program_id(0)
    i_bh, i_split = i_program // splits, i_program % splits
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_t, o_c = i_split * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD_D)
    m_t, m_c = o_t < tokens, o_c < d
    o_place = tl.load(p_places + o_t, mask=m_t, other=0)
    p_row = p_x + i_b * stride_xb + i_h.to(tl.int64) * stride_xh + o_place * stride_xn  # [ROWS]
    m_x = m_t[:, None] & m_c[None, :]
    b_x = tl.load(p_row[:, None] + o_c[None, :] * stride_xd, mask=m_x, other=0).to(tl.float32)
    b_x = finite(b_x)
    peak = tl.max(tl.max(tl.abs(b_x), axis=1), axis=0)
    tl.store(p_peaks + i_program, peak)
    peak = tl.where(peak > 0, peak, 1.0)
    b_unit = b_x / peak
    p_out = p_sums + i_program.to(tl.int64) * 3 * d + o_c
    tl.store(p_out, tl.sum(b_unit, axis=0), mask=m_c)
    tl.store(p_out + d, tl.sum(b_unit * b_unit, axis=0), mask=m_c)
    if TURNED:
        p_c, p_s = p_cos + i_b * stride_cb, p_sin + i_b * stride_cb
        b_before = load_turned_back(p_row, stride_xd, p_c, p_s, o_t, m_t, o_c, m_c, r, HALF)
        tl.store(p_out + 2 * d, tl.sum(finite(b_before) / peak, axis=0), mask=m_c)
