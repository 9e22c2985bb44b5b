# mypy: allow-untyped-defs
"""The centroids of rotated unit vectors: the nearest, or those of query-aware rounding.

The plain-torch references are `RotorQuantMSE.code` and `round_with_feedback`. The vectors are rows
of a program's registers, their columns in the order of `append`. A sweep over the columns is d
steps, each of them a short one for all rows: it carries s, RANK numbers of a row, along.

The sweep takes its columns from scratch memory. From the registers, where a matrix product has
left them, they would come with the columns of a row in several warps, and every step would be a sum
across warps, which waits for all of them; as loaded, a row lies in one warp (or, where there are
more warps than the rows fill, in each of several).
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-126)
CHUNK = tl.constexpr(16)  # columns that are taken out of the registers at a time


@triton.jit
def centroids_of(
    b_unit, scratch, codebook, factor, gains, level, i_segment, i_b, i_h, SHAPE: tl.constexpr
):
    """Indices and centroids of rotated unit vectors (tokens, columns), and their scales (tokens,).

    With SHAPE.rank > 0 the sweep's, where the error along the queries is smaller than that of the
    nearest. Centroids are 0 in the columns that only fill up a slot. `scratch` has room for as many
    numbers as `b_unit` has, for this program alone.
    """
    BITS: tl.constexpr = SHAPE.bits
    RULE: tl.constexpr = SHAPE.rule
    o_n = tl.arange(0, b_unit.shape[1])
    m_n = (o_n % SHAPE.pad < SHAPE.slot)[None, :]
    b_index, b_c = nearest(b_unit, codebook[0], codebook[1], BITS)
    b_c = tl.where(m_n, b_c, 0.0)
    if SHAPE.rank == 0:
        b_scale = _scale(b_unit, b_c, RULE)
    else:
        b_swept, b_along, b_c_along, b_swept_along = _sweep(
            b_unit, scratch, codebook, factor, gains, i_segment, i_b, i_h, SHAPE
        )
        b_swept = tl.where(m_n, b_swept, 0.0)
        b_level = tl.load(head_of_segment(level, i_segment, i_b, i_h))
        b_scale, b_error = _weighed(b_unit, b_c, b_along, b_c_along, b_level, RULE)
        b_swept_scale, b_swept_error = _weighed(
            b_unit, b_swept, b_along, b_swept_along, b_level, RULE
        )
        m_better = b_swept_error < b_error
        b_scale = tl.where(m_better, b_swept_scale, b_scale)
        b_c = tl.where(m_better[:, None], b_swept, b_c)
        b_index, _ = nearest(b_c, codebook[0], codebook[1], BITS)
    return b_index, b_c, b_scale


@triton.jit
def _sweep(b_unit, scratch, codebook, factor, gains, i_segment, i_b, i_h, SHAPE: tl.constexpr):
    """`round_with_feedback` of vectors y: their centroids c (tokens, columns).

    Then F' y, F' of the nearest centroids, and F' c, (tokens, RANK) each.
    """
    BITS: tl.constexpr = SHAPE.bits
    RANK: tl.constexpr = SHAPE.rank
    TOKENS: tl.constexpr = b_unit.shape[0]
    COLUMNS: tl.constexpr = b_unit.shape[1]
    p_row = scratch + tl.arange(0, TOKENS)[:, None] * COLUMNS
    p_tile = p_row + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_tile, b_unit)
    tl.debug_barrier()  # other threads read them
    b_s = tl.zeros((TOKENS, RANK), tl.float32)
    b_along = tl.zeros((TOKENS, RANK), tl.float32)
    b_nearest_along = tl.zeros((TOKENS, RANK), tl.float32)
    o_column, o_r = tl.arange(0, CHUNK), tl.arange(0, RANK)
    p_f = head_of_segment(factor, i_segment, i_b, i_h)
    p_p = head_of_segment(gains, i_segment, i_b, i_h)
    for k in range(COLUMNS // CHUNK):
        p_chunk = p_row + k * CHUNK + o_column[None, :]
        b_chunk = tl.load(p_chunk)  # [TOKENS, CHUNK]
        b_chosen = tl.zeros((TOKENS, CHUNK), tl.float32)
        for i in range(CHUNK):
            n = k * CHUNK + i
            o_d = element(n, SHAPE)
            m_r = n % SHAPE.pad + 0 * o_r < SHAPE.slot  # no feedback from columns without element
            b_f = tl.load(p_f + o_d * factor[4] + o_r * factor[5], m_r, 0.0)
            b_p = tl.load(p_p + o_d * gains[4] + o_r * gains[5], m_r, 0.0)
            m_column = (o_column == i)[None, :]
            b_y = tl.sum(tl.where(m_column, b_chunk, 0.0), axis=1)  # [TOKENS]
            b_w = b_y + tl.sum(b_s * b_p[None, :], axis=1)
            _, b_c = nearest(b_w, codebook[0], codebook[1], BITS)
            b_s += (b_y - b_c)[:, None] * b_f[None, :]
            b_along += b_y[:, None] * b_f[None, :]
            _, b_near = nearest(b_y, codebook[0], codebook[1], BITS)
            b_nearest_along += b_near[:, None] * b_f[None, :]
            b_chosen = tl.where(m_column, b_c[:, None], b_chosen)
        tl.debug_barrier()  # a row may lie in several warps, of which one writes
        tl.store(p_chunk, b_chosen)
    tl.debug_barrier()
    return tl.load(p_tile), b_along, b_nearest_along, b_along - b_s


@triton.jit
def _weighed(b_unit, b_c, b_unit_along, b_c_along, b_level, RULE: tl.constexpr):
    """Scale and error under the Hessian, (tokens,), of centroids for unit vectors."""
    if RULE == "least_squares":
        b_cy = b_level * tl.sum(b_c * b_unit, axis=1) + tl.sum(b_c_along * b_unit_along, axis=1)
        b_cc = b_level * tl.sum(b_c * b_c, axis=1) + tl.sum(b_c_along * b_c_along, axis=1)
        b_scale = tl.maximum(b_cy / b_cc, 0.0)
    else:
        b_scale = _scale(b_unit, b_c, RULE)
    b_e = b_unit - b_scale[:, None] * b_c
    b_along = b_unit_along - b_scale[:, None] * b_c_along
    return b_scale, b_level * tl.sum(b_e * b_e, axis=1) + tl.sum(b_along * b_along, axis=1)


@triton.jit
def nearest(b_unit, p_boundaries, p_centroids, BITS: tl.constexpr):
    """How many boundaries lie below each coordinate, and the centroid of that index."""
    b_index = tl.zeros(b_unit.shape, tl.int32)
    if BITS <= 4:  # from registers: gathers go through shared memory
        b_c = tl.zeros(b_unit.shape, tl.float32) + tl.load(p_centroids)
        for i in tl.static_range(1, 2**BITS):
            m_above = b_unit > tl.load(p_boundaries + i - 1)
            b_index = tl.where(m_above, i, b_index)
            b_c = tl.where(m_above, tl.load(p_centroids + i), b_c)
    else:  # binary search: a boundary per bit
        for i in tl.static_range(BITS):
            b_upper = b_index + (1 << (BITS - 1 - i))
            b_index = tl.where(b_unit > tl.load(p_boundaries + b_upper - 1), b_upper, b_index)
        b_c = tl.load(p_centroids + b_index)
    return b_index, b_c


@triton.jit
def _scale(b_unit, b_c, RULE: tl.constexpr):
    """The scale (tokens,) of rotated unit vectors with their centroids, as in `quant/mse.py`."""
    if RULE == "norm":
        return tl.full((b_unit.shape[0],), 1.0, tl.float32)
    elif RULE == "matched":
        return 1.0 / tl.sqrt(tl.sum(b_c * b_c, axis=1))
    elif RULE == "least_squares":
        return tl.sum(b_unit * b_c, axis=1) / tl.sum(b_c * b_c, axis=1)
    else:
        return 1.0 / tl.maximum(tl.sum(b_unit * b_c, axis=1), TINY)


@triton.jit
def head(tensor, i_b, i_h):
    """Pointer to one head of a (pointer, *strides) of (batch, heads, ...)."""
    return tensor[0] + i_b * tensor[1] + i_h * tensor[2]


@triton.jit
def head_of_segment(tensor, i_segment, i_b, i_h):
    """Pointer to one head of a (pointer, *strides) of (segments, batch, heads, ...)."""
    return tensor[0] + i_segment * tensor[1] + i_b * tensor[2] + i_h * tensor[3]


@triton.jit
def element(o_n, SHAPE: tl.constexpr):
    """The element in each column; a neighbour's in the columns that only fill up a slot."""
    return o_n // SHAPE.pad * SHAPE.slot + o_n % SHAPE.pad
