"""What the sweep of query-aware rounding reads of Hessians: one of a segment and head a program.

The references are `ChannelStatistics.hessians_from`, which turns the factor F to the segment, and
`Feedback.of`, which rotates it and solves for the gains

    p_i = A_i^-1 f_i,   A_i = level I + sum_{j >= i} f_j f_j'

in float64. Here the rows come one after the other, from the last on, and the inverse is kept as
S S', which takes in a row without a difference of large numbers (Potter's square root of a
covariance; Bierman, Factorization Methods for Discrete Sequential Estimation, 1977, chapter II.3):

    v = S' f,   a = 1 / (1 + v'v),   p = a S v,   S <- S - a / (1 + sqrt a) (S v) v'

so that float32 is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.pairs import pair_of
from rotorquant_hf.kernels.sizes import padded
from rotorquant_hf.quant.hessian import RANK, RIDGE
from rotorquant_hf.quant.rounding import Feedback


def feedback_of(
    factor: Tensor,
    scale: Tensor,
    rotation: Tensor,
    sines: tuple[Tensor, Tensor] | None,
    half: bool,
) -> Feedback:
    """What the sweep reads, of all segments.

    Args:
        factor: F of the Hessians at position 0, (batch, heads, d, RANK) float16, contiguous.
        scale: of the channels, (batch, heads, 1, d or 1) float32, contiguous.
        rotation: (d, d) float32, contiguous.
        sines: cosines and sines of the angles that RoPE turns by at every segment, each (segments,
            batch or 1, 1, 1, r) float32, contiguous; None for the Hessians as they are, as of one
            segment.
        half: the channels of a pair, see `pair_of`.

    Returns:
        Tensors (segments, batch, heads, ...).
    """
    batch, heads, d, _ = factor.shape
    cos, sin = (scale, scale) if sines is None else sines  # not read
    segments = 1 if sines is None else len(cos)
    made = [scale.new_empty(segments, batch, heads, d, RANK) for _ in range(2)]
    level = scale.new_empty(segments, batch, heads, 1, 1)
    launch = launch_of(
        feedback_kernel,
        torch.float32,
        factor.device,
        TURNS=sines is not None,
        HALF=half,
        RIDGE=RIDGE,
        RANK=RANK,
        CHUNK=32,
        PAD_D=padded(d),
        # The gains are a chain of short steps, where warps would wait for each other; but the whole
        # of F has to fit into registers.
        num_warps=1 if d <= 256 else 8,
        enable_fp_fusion=False,  # see `launch_of`
        num_stages=2,
    )
    launch(
        (segments * batch * heads, 1, 1),
        factor,
        scale,
        int(scale.shape[3] != 1),
        rotation,
        cos,
        sin,
        int(cos.shape[1] > 1),
        *made,
        level,
        batch,
        heads,
        d,
        cos.shape[-1],
    )
    return Feedback(made[0], made[1], level)


@triton.jit(do_not_specialize=["many", "batch", "heads"])
def feedback_kernel(
    p_factor,
    p_scale,
    stride_s,
    p_rotation,
    p_cos,
    p_sin,
    many,
    p_rotated,
    p_gains,
    p_level,
    batch,
    heads,
    d,
    r,
    TURNS: tl.constexpr,
    HALF: tl.constexpr,
    RIDGE: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    PAD_D: tl.constexpr,
):
    """Grid: segments, of each all heads. `many`: whether rows of the batch have angles each."""
    i_program = tl.program_id(0).to(tl.int64)
    i_bh, i_segment = i_program % (batch * heads), i_program // (batch * heads)
    i_b = i_bh // heads
    o_c, o_r = tl.arange(0, PAD_D), tl.arange(0, RANK)
    m_c = o_c < d
    p_factor += i_bh * d * RANK
    p_scale += i_bh * tl.where(stride_s == 1, d, 1)
    p_rotated += i_program * d * RANK
    p_gains += i_program * d * RANK
    o_angle = tl.where(many != 0, i_segment * batch + i_b, i_segment) * r
    p_cos += o_angle
    p_sin += o_angle

    # F at the segment, of the same strength: unequal scales of a pair would change it.
    o_f, m_f = o_c[:, None] * RANK + o_r[None, :], m_c[:, None]
    b_f = _turned(p_factor, p_scale, stride_s, p_cos, p_sin, o_c, o_r, m_c, r, TURNS, HALF)
    strength = 1.0
    if TURNS:
        b_before = tl.load(p_factor + o_f, mask=m_f, other=0).to(tl.float32)
        before = tl.sum(tl.sum(b_before * b_before, axis=1), axis=0)
        after = tl.sum(tl.sum(b_f * b_f, axis=1), axis=0)
        strength = tl.where(after > 0, tl.sqrt(before / tl.where(after > 0, after, 1.0)), 1.0)
        b_f = (b_f * strength).to(tl.float16).to(tl.float32)
    level = RIDGE + 1 - tl.sum(tl.sum(b_f * b_f, axis=1), axis=0) / d
    tl.store(p_level + i_program, level)

    # T F.
    tl.store(p_gains + o_f, b_f, mask=m_f)  # until the gains come there
    tl.debug_barrier()  # other threads read it
    for i in range(0, d, CHUNK):
        o_i = i + tl.arange(0, CHUNK)
        b_rotated = tl.zeros([CHUNK, RANK], tl.float32)
        for k in range(0, d, CHUNK):
            o_k = k + tl.arange(0, CHUNK)
            m_t = (o_i < d)[:, None] & (o_k < d)[None, :]
            b_t = tl.load(p_rotation + o_i[:, None] * d + o_k[None, :], mask=m_t, other=0)
            p_k = p_gains + o_k[:, None] * RANK + o_r[None, :]
            b_k = tl.load(p_k, mask=(o_k < d)[:, None], other=0)
            b_rotated = tl.dot(b_t, b_k, b_rotated, input_precision="tf32x3")
        p_i = p_rotated + o_i[:, None] * RANK + o_r[None, :]
        tl.store(p_i, b_rotated, mask=(o_i < d)[:, None])
    tl.debug_barrier()

    # The gains; the rows are loaded a step ahead.
    b_s = tl.where(o_r[:, None] == o_r[None, :], 1.0 / tl.sqrt(level), 0.0)  # [RANK, RANK]
    b_next = tl.load(p_rotated + (d - 1) * RANK + o_r)
    for n in range(d):
        i = d - 1 - n
        b_row = b_next
        b_next = tl.load(p_rotated + tl.maximum(i - 1, 0) * RANK + o_r)
        b_v = tl.sum(b_s * b_row[:, None], axis=0)
        a = 1.0 / (1.0 + tl.sum(b_v * b_v, axis=0))
        b_u = tl.sum(b_s * b_v[None, :], axis=1)
        tl.store(p_gains + i * RANK + o_r, a * b_u)
        b_s -= (a / (1.0 + tl.sqrt(a)) * b_u)[:, None] * b_v[None, :]


@triton.jit
def _turned(
    p_factor,
    p_scale,
    stride_s,
    p_cos,
    p_sin,
    o_c,
    o_r,
    m_c,
    r,
    TURNS: tl.constexpr,
    HALF: tl.constexpr,
):
    """F (channels, RANK) float32, turned along with the keys.

    Its columns are directions of queries, in units of the channels' scales.
    """
    RANK: tl.constexpr = o_r.shape[0]
    p_f = p_factor + o_r[None, :]
    b_f = tl.load(p_f + o_c[:, None] * RANK, mask=m_c[:, None], other=0).to(tl.float32)
    if TURNS:
        o_pair, o_other, first = pair_of(o_c, r, HALF)
        m_pair = o_c < 2 * r
        b_scale = tl.load(p_scale + o_c * stride_s, mask=m_c, other=1)
        b_ratio = b_scale / tl.load(p_scale + o_other * stride_s, mask=m_pair, other=1)
        b_other = tl.load(p_f + o_other[:, None] * RANK, mask=m_pair[:, None], other=0)
        b_cos = tl.load(p_cos + o_pair, mask=m_pair, other=1)
        b_sin = tl.load(p_sin + o_pair, mask=m_pair, other=0)
        b_sin = tl.where(first, -b_sin, b_sin) * b_ratio
        b_f = b_f * b_cos[:, None] + b_other.to(tl.float32) * b_sin[:, None]
    return b_f
