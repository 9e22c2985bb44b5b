"""Second moments of queries, as they are and as they were before RoPE: `QueryMoment.of`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.pairs import finite, load_turned_back
from rotorquant_hf.kernels.sizes import padded, pieces

_ROWS = 32  # queries of a step
# Programs that are worth the adding up of their sums, and steps that are worth a program.
_PROGRAMS, _MIN_STEPS = 256, 4


def query_moments(
    query: Tensor, heads: int, places: Tensor, sines: tuple[Tensor, Tensor] | None, half: bool
) -> tuple[Tensor, Tensor | None]:
    """The means of q q' over queries, before RoPE too, (batch, heads, d, d) float32.

    Args:
        query: (batch, query heads, n, d), at least one token; any strides.
        heads: kv heads, each read by a group of query heads.
        places: of the tokens to look at, int64.
        sines: cosines and sines of the angles that RoPE turned them by, each (batch or 1, 1, tokens
            looked at, r) float32, contiguous. None if these are not known: there is nothing before
            RoPE then.
        half: the channels of a pair, see `pair_of`.
    """
    batch, query_heads, _, d = query.shape
    tokens, group = len(places), query_heads // heads
    kinds = 1 if sines is None else 2
    tile = min(128, padded(d))
    tiles = pieces(d, tile) ** 2
    steps = pieces(group * tokens, _ROWS)
    programs = batch * heads * kinds * tiles
    splits = max(1, min(_PROGRAMS // programs, steps // _MIN_STEPS))
    sums = query.new_empty(splits, kinds, batch, heads, d, d, dtype=torch.float32)
    cos, sin = (query, query) if sines is None else sines  # not read
    launch = launch_of(
        moment_kernel,
        query.dtype,
        query.device,
        KINDS=kinds,
        HALF=half,
        IN_PARTS=not knobs.runtime.interpret,  # the interpreter multiplies no bfloat16
        TILE=tile,
        ROWS=_ROWS,
        num_warps=8 if tile > 64 else 4,
        # With more, Triton 3.6 lets `wgmma` read what copies have brought without a fence between.
        num_stages=1,
    )
    launch(
        (splits * programs, 1, 1),
        query,
        *query.stride(),
        places,
        cos,
        sin,
        cos.stride(0) if cos.shape[0] > 1 else 0,
        sums,
        tokens,
        group,
        heads,
        batch * heads,
        pieces(steps, splits) * _ROWS,
        d,
        cos.shape[-1],
    )
    moments = sums[0] if splits == 1 else sums.sum(dim=0)
    return moments[0], None if sines is None else moments[1]


@triton.jit(do_not_specialize=["stride_cb", "tokens", "group", "heads", "total", "share"])
def moment_kernel(
    p_q,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    p_places,
    p_cos,
    p_sin,
    stride_cb,
    p_sums,
    tokens,
    group,
    heads,
    total,
    share,
    d,
    r,
    KINDS: tl.constexpr,
    HALF: tl.constexpr,
    IN_PARTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: splits, of each the kinds, of each all kv heads, of each the tiles of the moment.

    Row i of a kv head is token i % tokens of query head i // tokens of its group. A split takes
    `share` of them. Kind 0 are the queries as they are, kind 1 those before RoPE.
    """
    i_program = tl.program_id(0)
    side = tl.cdiv(d, TILE)
    i_tile, i_rest = i_program % (side * side), i_program // (side * side)
    i_bh, i_out = i_rest % total, i_rest // total  # i_out: split and kind
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    o_a = i_tile // side * TILE + tl.arange(0, TILE)
    o_b = i_tile % side * TILE + tl.arange(0, TILE)
    m_a, m_b = o_a < d, o_b < d
    p_q += i_b * stride_qb + (i_h * group).to(tl.int64) * stride_qh
    begin = i_out // KINDS * share
    end = tl.minimum(begin + share, tokens * group)
    b_sum = tl.zeros([TILE, TILE], tl.float32)
    for i in range(begin, end, ROWS):
        o_i = i + tl.arange(0, ROWS)
        m_i = o_i < end
        o_t = o_i % tokens
        o_place = tl.load(p_places + o_t, mask=m_i, other=0)
        p_row = p_q + (o_i // tokens).to(tl.int64) * stride_qh + o_place * stride_qn
        if i_out % KINDS == 0:
            m_x, m_y = m_i[:, None] & m_a[None, :], m_i[:, None] & m_b[None, :]
            b_x = tl.load(p_row[:, None] + o_a[None, :] * stride_qd, mask=m_x, other=0)
            b_y = tl.load(p_row[:, None] + o_b[None, :] * stride_qd, mask=m_y, other=0)
            b_sum = _add_products(b_sum, finite(b_x), finite(b_y), IN_PARTS)
        else:
            p_c, p_s = p_cos + i_b * stride_cb, p_sin + i_b * stride_cb
            b_v = load_turned_back(p_row, stride_qd, p_c, p_s, o_t, m_i, o_a, m_a, r, HALF)
            b_w = load_turned_back(p_row, stride_qd, p_c, p_s, o_t, m_i, o_b, m_b, r, HALF)
            b_sum = _add_products(b_sum, finite(b_v), finite(b_w), IN_PARTS)
    b_sum *= 1.0 / (tokens * group)
    p_out = p_sums + (i_out.to(tl.int64) * total + i_bh) * d * d
    m_out = m_a[:, None] & m_b[None, :]
    tl.store(p_out + o_a[:, None] * d + o_b[None, :], b_sum, mask=m_out)


@triton.jit
def _add_products(b_sum, b_x, b_y, IN_PARTS: tl.constexpr):
    """b_sum + x' y.

    With IN_PARTS float32 numbers are taken apart into two of bfloat16 each, some 16 bits in all:
    tensor cores read 16-bit numbers from shared memory in the order that they came in, columns of
    float32 numbers one by one. Products of 16-bit numbers are exact.
    """
    if not IN_PARTS:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
        return tl.dot(tl.trans(b_x), b_y, b_sum, input_precision="ieee")
    elif b_x.dtype != tl.float32:
        return tl.dot(tl.trans(b_x), b_y, b_sum)
    else:
        b_x_high, b_y_high = b_x.to(tl.bfloat16), b_y.to(tl.bfloat16)
        b_x_low = (b_x - b_x_high.to(tl.float32)).to(tl.bfloat16)
        b_y_low = (b_y - b_y_high.to(tl.float32)).to(tl.bfloat16)
        b_sum = tl.dot(tl.trans(b_x_low), b_y_high, b_sum)
        b_sum = tl.dot(tl.trans(b_x_high), b_y_low, b_sum)
        return tl.dot(tl.trans(b_x_high), b_y_high, b_sum)
