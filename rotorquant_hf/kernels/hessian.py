# mypy: allow-untyped-defs
"""What errors of keys cost those who read them: `ChannelStatistics.read_by`, one head a program.

The references are `Rope.spread_moment`, `QueryMoment.shrunk`, `product_shift`, and
`LowRankHessian.of`, which computes in float64. Here float32 is enough: moment and scales are in
units that leave nothing too large or too small, and bases are made orthonormal column by column
(modified Gram and Schmidt). That has the error of float32 times the condition of what is
orthonormalised, where Cholesky's has it times its square; and the condition is at most that of the
Hessian, d (1 + RIDGE) / RIDGE (but in the first step, which starts at random).

The Hessian does not fit into registers. It lies in scratch memory, as do the basis and its
products, which a product of matrices takes in other pieces than it gives.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.pairs import pair_of
from rotorquant_hf.kernels.sizes import padded
from rotorquant_hf.quant.hessian import ITERATIONS, RANK, RIDGE, start_of_iteration


class Turning(NamedTuple):
    """How RoPE turns the queries that will read the keys.

    Attributes:
        frequencies: of every row, (batch, 1, 1, r) float32, contiguous. Where all of a row are 0,
            nothing turns, and the moment of the turned queries counts; `before` in other rows.
        before: the moment of the queries before RoPE, (batch, heads, d, d) float32, contiguous.
        by_cos, by_sin: `Rope.mean_products`, (batch or 1, 1, r, r) complex64, contiguous.
        by_turn: `Rope.mean_turns`, (batch or 1, 1, 1, r) complex64, contiguous.
        half: the channels of a pair, see `pair_of`.
    """

    frequencies: Tensor
    before: Tensor
    by_cos: Tensor
    by_sin: Tensor
    by_turn: Tensor
    half: bool


def hessian_factors(
    scale: Tensor, mean: Tensor | None, moment: Tensor, count: int, turning: Turning | None
) -> tuple[Tensor, Tensor]:
    """The factors of the Hessians, (batch, heads, d, RANK) float16, and the shifts of inner
    products, (batch, heads) float32.

    Args:
        scale: of the channels, (batch, heads, 1, d or 1) float32, contiguous.
        mean: of the keys, (batch, heads, 1, d) float32, contiguous; None if it is not subtracted.
        moment: of queries, (batch, heads, d, d) float32, contiguous; d at least RANK.
        count: queries that it was taken from.
        turning: how RoPE turns such queries; None: not at all.
    """
    batch, heads, d = moment.shape[:3]
    width = padded(d)
    factor = moment.new_empty(batch, heads, d, RANK, dtype=torch.float16)
    shift = moment.new_empty(batch, heads)
    hessian = moment.new_empty(batch * heads, d, d)
    basis = moment.new_empty(batch * heads, 2, d, RANK)
    warps = 4 if width < 128 else 8
    read, many, half, pairs = (moment,) * 5, 0, False, 0  # not read
    if turning is not None:
        by = (torch.view_as_real(x) for x in (turning.by_cos, turning.by_sin, turning.by_turn))
        read = turning.before, turning.frequencies, *by
        many, half = int(turning.by_turn.shape[0] > 1), turning.half
        pairs = turning.frequencies.shape[-1]
    launch = launch_of(
        hessian_kernel,
        torch.float32,
        moment.device,
        TURNS=turning is not None,
        HALF=half,
        RIDGE=RIDGE,
        ITERATIONS=ITERATIONS,
        RANK=RANK,
        PREPARED=max(1, 256 * warps // width),  # rows: eight elements a thread, of much each
        ROWS=32,
        CHUNK=min(64, width),
        PAD_D=width,
        PAD_R=padded(pairs),
        num_warps=warps,
        enable_fp_fusion=False,  # see `launch_of`
        num_stages=2,
    )
    launch(
        (batch * heads, 1, 1),
        moment,
        *read,
        many,
        scale,
        int(scale.shape[3] != 1),
        scale if mean is None else mean,
        int(mean is not None),
        _start(d, moment.device),
        hessian,
        basis,
        factor,
        shift,
        count,
        heads,
        d,
        pairs,
    )
    return factor, shift


@lru_cache(maxsize=32)
def _start(d: int, device: torch.device) -> Tensor:
    """`start_of_iteration`, (d, RANK) float32."""
    with torch.inference_mode(False):
        return start_of_iteration(d, RANK, device).float()


@triton.jit(do_not_specialize=["many", "centred", "count", "heads"])
def hessian_kernel(
    p_moment,
    p_before,
    p_frequencies,
    p_by_cos,
    p_by_sin,
    p_by_turn,
    many,
    p_scale,
    stride_s,
    p_mean,
    centred,
    p_start,
    p_hessian,
    p_basis,
    p_factor,
    p_shift,
    count,
    heads,
    d,
    r,
    TURNS: tl.constexpr,
    HALF: tl.constexpr,
    RIDGE: tl.constexpr,
    ITERATIONS: tl.constexpr,
    RANK: tl.constexpr,
    PREPARED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_R: tl.constexpr,
):
    """Grid: all heads. `many`: whether rows of the batch have means of turns each. `centred`:
    whether keys lose their mean, 1 or 0.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // heads
    i_turn = tl.where(many != 0, i_b, 0)
    p_moment += i_bh * d * d
    p_before += i_bh * d * d
    p_by_cos += i_turn * r * r * 2
    p_by_sin += i_turn * r * r * 2
    p_by_turn += i_turn * r * 2
    p_hessian += i_bh * d * d
    p_basis += i_bh * 2 * d * RANK
    p_product = p_basis + d * RANK
    o_c, o_r = tl.arange(0, PAD_D), tl.arange(0, RANK)
    m_c = o_c < d

    turns = False
    if TURNS:
        o_w = tl.arange(0, PAD_R)
        b_w = tl.load(p_frequencies + i_b * r + o_w, mask=o_w < r, other=0)
        turns = tl.max(tl.abs(b_w), axis=0) > 0

    # Units: the largest scale, the mean of the moment's diagonal, the mean of the scaled one's.
    b_scale = tl.load(p_scale + i_bh * tl.where(stride_s == 1, d, 1) + o_c * stride_s, m_c, 0.0)
    top = tl.max(b_scale, axis=0)
    b_scale /= top
    b_diagonal = tl.load(p_moment + o_c * (d + 1), mask=m_c, other=0)
    # How far errors shift inner products: `product_shift`.
    b_mean = tl.load(p_mean + i_bh * d + o_c, mask=o_c < d * centred, other=0) / top
    b_mean /= tl.where(m_c, b_scale, 1.0)
    coded = tl.maximum(1 - tl.sum(b_mean * b_mean, axis=0), 0.0)
    read = tl.sum(b_diagonal * b_scale * b_scale, axis=0) / d * top * top
    tl.store(p_shift + i_bh, coded * read)
    if turns:
        b_diagonal = _spread(p_before, p_by_cos, p_by_sin, p_by_turn, o_c, o_c, m_c, d, r, HALF)
    level = tl.sum(b_diagonal, axis=0) / d
    unit = tl.where(level > 0, level, 1.0)
    # Of d queries or fewer the directions in which none looked are unknown, not unimportant.
    added = tl.where(level > 0, d / tl.maximum(count, 1).to(tl.float32), 0.0)
    mean = tl.sum((b_diagonal / unit + added) * b_scale * b_scale * m_c.to(tl.float32), axis=0) / d
    mean = tl.where(mean > 0, mean, 1.0)

    for i in range(0, d, PREPARED):
        o_i = i + tl.arange(0, PREPARED)
        m_i = o_i < d
        m_h = m_i[:, None] & m_c[None, :]
        if turns:
            o_i2, o_c2 = o_i[:, None], o_c[None, :]
            b_h = _spread(p_before, p_by_cos, p_by_sin, p_by_turn, o_i2, o_c2, m_h, d, r, HALF)
        else:
            b_h = tl.load(p_moment + o_i[:, None] * d + o_c[None, :], mask=m_h, other=0)
        m_same = o_i[:, None] == o_c[None, :]
        b_h = b_h / unit + tl.where(m_same, added, 0.0)
        b_row = tl.load(p_scale + i_bh * tl.where(stride_s == 1, d, 1) + o_i * stride_s, m_i, 0.0)
        b_h *= (b_row / top)[:, None] * b_scale[None, :] / mean
        b_h += tl.where(m_same, RIDGE, 0.0)
        tl.store(p_hessian + o_i[:, None] * d + o_c[None, :], b_h, mask=m_h)

    # Subspace iteration. The product of the last basis serves its own Hessian.
    o_basis = o_c[:, None] * RANK + o_r[None, :]
    m_basis = m_c[:, None]
    b_basis = tl.load(p_start + o_basis, mask=m_basis, other=0)  # [PAD_D, RANK]
    for n in range(ITERATIONS + 1):
        tl.store(p_basis + o_basis, b_basis, mask=m_basis)
        tl.debug_barrier()  # other threads read it, and the Hessian
        for i in range(0, d, ROWS):
            o_i = i + tl.arange(0, ROWS)
            b_rows = tl.zeros([ROWS, RANK], tl.float32)
            for k in range(0, d, CHUNK):
                o_k = k + tl.arange(0, CHUNK)
                m_k = o_k < d
                m_h = (o_i < d)[:, None] & m_k[None, :]
                b_h = tl.load(p_hessian + o_i[:, None] * d + o_k[None, :], mask=m_h, other=0)
                p_k = p_basis + o_k[:, None] * RANK + o_r[None, :]
                b_k = tl.load(p_k, mask=m_k[:, None], other=0)
                b_rows = tl.dot(b_h, b_k, b_rows, input_precision="tf32x3")
            p_i = p_product + o_i[:, None] * RANK + o_r[None, :]
            tl.store(p_i, b_rows, mask=(o_i < d)[:, None])
        tl.debug_barrier()
        if n < ITERATIONS:
            b_basis = tl.load(p_product + o_basis, mask=m_basis, other=0)
            b_basis = _orthonormal(b_basis, o_r)

    # F = Q L, where Q' H Q = L L'.
    b_small = tl.zeros([RANK, RANK], tl.float32)
    for k in range(0, d, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        o_part, m_part = o_k[:, None] * RANK + o_r[None, :], (o_k < d)[:, None]
        b_k = tl.load(p_basis + o_part, mask=m_part, other=0)
        b_product = tl.load(p_product + o_part, mask=m_part, other=0)
        b_small = tl.dot(tl.trans(b_k), b_product, b_small, input_precision="tf32x3")
    b_factor = tl.dot(b_basis, _lower(b_small, o_r), input_precision="tf32x3")  # [PAD_D, RANK]
    # What the other directions have, counts in all, and so is taken out of these.
    b_strength = tl.sum(b_factor * b_factor, axis=0)  # [RANK]
    rest = RIDGE + 0.0
    if d > RANK:
        rest = (d * (1 + RIDGE) - tl.sum(b_strength, axis=0)) / (d - RANK)
    b_factor *= tl.sqrt(tl.maximum(1 - rest / b_strength, 0.0))[None, :]
    tl.store(p_factor + i_bh * d * RANK + o_basis, b_factor.to(tl.float16), mask=m_basis)


@triton.jit
def _spread(p_before, p_by_cos, p_by_sin, p_by_turn, o_i, o_j, mask, d, r, HALF: tl.constexpr):
    """Entries (i, j) of `Rope.spread_moment`; i and j of any shapes that go together.

    Row i and its pair's other are real and imaginary part of a complex row, the columns' pairs are
    turned within it: see `quant/rope.py`.
    """
    o_k, o_ii, first_i = pair_of(o_i, r, HALF)
    o_l, o_jj, first_j = pair_of(o_j, r, HALF)
    turned_i, turned_j = o_i < 2 * r, o_j < 2 * r
    # C of the row's first and second channel, the column's first and second.
    o_a, o_b = tl.where(first_i, o_i, o_ii), tl.where(first_i, o_ii, o_i)
    o_c, o_d = tl.where(first_j, o_j, o_jj), tl.where(first_j, o_jj, o_j)
    both = mask & turned_i & turned_j
    ac = tl.load(p_before + o_a * d + o_c, mask=both, other=0)
    ad = tl.load(p_before + o_a * d + o_d, mask=both, other=0)
    bc = tl.load(p_before + o_b * d + o_c, mask=both, other=0)
    bd = tl.load(p_before + o_b * d + o_d, mask=both, other=0)
    o_turn = (o_k * r + o_l) * 2
    cr = tl.load(p_by_cos + o_turn, mask=both, other=0)
    ci = tl.load(p_by_cos + o_turn + 1, mask=both, other=0)
    sr = tl.load(p_by_sin + o_turn, mask=both, other=0)
    si = tl.load(p_by_sin + o_turn + 1, mask=both, other=0)
    # (c + is)(x + iy) of the columns: the first by cos less the second by sin, or in turn.
    x_cos, y_cos = tl.where(first_j, ac, ad), tl.where(first_j, bc, bd)
    x_sin, y_sin = tl.where(first_j, -ad, ac), tl.where(first_j, -bd, bc)
    real = (cr * x_cos - ci * y_cos) + (sr * x_sin - si * y_sin)
    imaginary = (cr * y_cos + ci * x_cos) + (sr * y_sin + si * x_sin)
    out = tl.where(first_i, real, imaginary)
    # One of row and column turns: by the mean turn of its pair. Neither does: it stays.
    one = mask & (turned_i != turned_j)
    o_still = tl.where(turned_i, o_j, o_i)
    o_first, o_second = tl.where(turned_i, o_a, o_c), tl.where(turned_i, o_b, o_d)
    x = tl.load(p_before + o_first * d + o_still, mask=one, other=0)
    y = tl.load(p_before + o_second * d + o_still, mask=one, other=0)
    o_turn = tl.where(turned_i, o_k, o_l) * 2
    cos = tl.load(p_by_turn + o_turn, mask=one, other=0)
    sin = tl.load(p_by_turn + o_turn + 1, mask=one, other=0)
    is_first = tl.where(turned_i, first_i, first_j)
    out = tl.where(one, tl.where(is_first, cos * x - sin * y, cos * y + sin * x), out)
    neither = mask & (o_i >= 2 * r) & (o_j >= 2 * r)
    return out + tl.load(p_before + o_i * d + o_j, mask=neither, other=0)


@triton.jit
def _orthonormal(b_x, o_r):
    """An orthonormal basis of the columns, (rows, RANK), one after the other."""
    for j in range(b_x.shape[1]):
        b_column = tl.sum(tl.where((o_r == j)[None, :], b_x, 0.0), axis=1)  # [rows]
        b_along = tl.sum(b_x * b_column[:, None], axis=0)  # [RANK], with its own square
        square = tl.sum(tl.where(o_r == j, b_along, 0.0), axis=0)
        # The later columns lose what lies along this one, which becomes 1 long.
        b_share = tl.where(o_r > j, b_along / square, 0.0)
        b_share = tl.where(o_r == j, 1.0 - 1.0 / tl.sqrt(square), b_share)
        b_x -= b_column[:, None] * b_share[None, :]
    return b_x


@triton.jit
def _lower(b_a, o_r):
    """The lower factor L of a = L L', (RANK, RANK)."""
    b_lower = tl.zeros(b_a.shape, tl.float32)
    for j in range(b_a.shape[1]):
        b_column = tl.sum(tl.where((o_r == j)[None, :], b_a, 0.0), axis=1)
        pivot = tl.sum(tl.where(o_r == j, b_column, 0.0), axis=0)
        b_column = tl.where(o_r >= j, b_column / tl.sqrt(pivot), 0.0)
        # As columns of the transposed: the same numbers, along the other axis.
        b_row = tl.sum(tl.where((o_r == j)[:, None], b_a, 0.0), axis=0)
        b_row = tl.where(o_r >= j, b_row / tl.sqrt(pivot), 0.0)
        b_lower = tl.where((o_r == j)[None, :], b_column[:, None], b_lower)
        b_a -= b_column[:, None] * b_row[None, :]
    return b_lower
