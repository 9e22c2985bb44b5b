"""Vectors as kernels of the statistics read them, and channels that RoPE turns together.

R(p) of `Rope` in `quant/rope.py` multiplies the pair (a, b) by cos + i sin of its angle. Back go
the same angles, negative.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(b_x):
    """Zeros in the place of NaN and infinity, which on a GPU nobody looks for.

    They spoil their own vectors, not the statistics of the head.
    """
    return tl.where(tl.abs(b_x.to(tl.float32)) <= 3.4e38, b_x, 0.0)


@triton.jit
def pair_of(o_c, r, HALF: tl.constexpr):
    """Of channels of r pairs: the pair's number, its other channel, and whether they are first.

    The pair i has the channels (i, i + r) with HALF, or (2 i, 2 i + 1). Channels from 2 r on belong
    to none: what is loaded for them has to be masked.
    """
    if HALF:
        first = o_c < r
        return tl.where(first, o_c, o_c - r), tl.where(first, o_c + r, o_c - r), first
    else:
        first = o_c % 2 == 0
        return o_c // 2, tl.where(first, o_c + 1, o_c - 1), first


@triton.jit
def load_turned_back(p_row, stride, p_cos, p_sin, o_t, m_t, o_c, m_c, r, HALF: tl.constexpr):
    """Vectors as they were before RoPE turned them, (rows, channels) float32.

    Args:
        p_row: pointers to them, (rows,). stride: of their channels.
        p_cos, p_sin: of the angles, (tokens, r) contiguous.
        o_t: their rows in these, (rows,). m_t: whether a row is one.
        o_c, m_c: channels.
    """
    o_pair, o_other, first = pair_of(o_c, r, HALF)
    m_x, m_pair = m_t[:, None] & m_c[None, :], m_t[:, None] & (o_c < 2 * r)[None, :]
    b_x = tl.load(p_row[:, None] + o_c[None, :] * stride, mask=m_x, other=0).to(tl.float32)
    b_y = tl.load(p_row[:, None] + o_other[None, :] * stride, mask=m_pair, other=0).to(tl.float32)
    o_angle = o_t[:, None] * r + o_pair[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_pair, other=1)
    b_sin = tl.load(p_sin + o_angle, mask=m_pair, other=0)
    return b_x * b_cos + b_y * tl.where(first[None, :], b_sin, -b_sin)
