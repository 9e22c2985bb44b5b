"""Scales and means of channels from the sums of a block: `ChannelStatistics.of_block`.

Whether RoPE turned a row all its heads decide together: a head's answer is its `excess`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.block import BlockSums
from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.pairs import pair_of
from rotorquant_hf.kernels.sizes import padded
from rotorquant_hf.quant.channels import MIN_RMS, TURNS


class Channels(NamedTuple):
    """What channels of a block are like.

    Attributes:
        scale: (batch, heads, 1, d), or (batch, heads, 1, 1) of power 0, float32.
        mean: (batch, heads, 1, d) float32.
        spread: the mean of the same vectors at other positions, likewise.
        excess: (batch, heads) float32: by how much the vectors before RoPE agree more than those
            after it; its sum over heads is negative in rows that RoPE did not turn so.
    """

    scale: Tensor
    mean: Tensor
    spread: Tensor
    excess: Tensor


def channels_of(
    block: BlockSums,
    shape: tuple[int, int],
    power: float,
    layout: str,
    turns: Tensor | None,
    half: bool,
) -> Channels:
    """Those of a block.

    Args:
        shape: batch and heads. power: of the scales. layout: of the channels that share one.
        turns: `Rope.mean_turns` of the positions that `spread` is the mean of, (batch or 1, 1, 1,
            r) complex64, contiguous; None if it is not known how RoPE turned them: `spread` and
            `excess` are not written then.
        half: the channels of a pair, see `pair_of`.
    """
    (batch, heads), (splits, _, d) = shape, block.sums.shape[1:]
    sums = block.sums
    scale = sums.new_empty(batch, heads, 1, d if power else 1)
    mean, spread = (sums.new_empty(batch, heads, 1, d) for _ in range(2))
    excess = sums.new_empty(batch, heads)
    width = padded(d)
    launch = launch_of(
        channels_kernel,
        torch.float32,
        sums.device,
        POWER=float(power),
        SHARED={"none": 0, "half": 1, "interleaved": 2}[layout if d % 2 == 0 else "none"],
        TURNED=turns is not None,
        HALF=half,
        TURNS=TURNS,
        MIN_ENERGY=MIN_RMS**2,
        SPLITS=max(1, 4096 // width),
        PAD_D=width,
        num_warps=4,
        enable_fp_fusion=False,  # see `launch_of`
    )
    launch(
        (batch * heads, 1, 1),
        sums,
        block.peaks,
        sums if turns is None else torch.view_as_real(turns),
        0 if turns is None else int(turns.shape[0] > 1),
        scale,
        mean,
        spread,
        excess,
        block.tokens,
        heads,
        splits,
        d,
        0 if turns is None else turns.shape[3],
    )
    return Channels(scale, mean, spread, excess)


@triton.jit(do_not_specialize=["many", "tokens", "heads", "splits"])
def channels_kernel(
    p_sums,
    p_peaks,
    p_turns,
    many,
    p_scale,
    p_mean,
    p_spread,
    p_excess,
    tokens,
    heads,
    splits,
    d,
    r,
    POWER: tl.constexpr,
    SHARED: tl.constexpr,  # 0, or pairs of channels share a scale: 1 (i, i + d / 2), 2 (2i, 2i + 1)
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    TURNS: tl.constexpr,
    MIN_ENERGY: tl.constexpr,
    SPLITS: tl.constexpr,
    PAD_D: tl.constexpr,
):
    """Grid: all heads. `many`: whether rows of the batch have mean turns each."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, PAD_D)
    m_c = o_c < d
    peak = 0.0
    for i in range(0, splits, 256):
        o_i = i + tl.arange(0, 256)
        b_peak = tl.load(p_peaks + i_bh * splits + o_i, mask=o_i < splits, other=0)
        peak = tl.maximum(peak, tl.max(b_peak, axis=0))
    peak = tl.where(peak > 0, peak, 1.0)
    o_pair, o_other, first = pair_of(o_c, r, HALF)
    m_pair = o_c < 2 * r
    _, o_mate, _ = pair_of(o_c, d // 2, SHARED == 1)
    mean, energy = tl.zeros([PAD_D], tl.float32), tl.zeros([PAD_D], tl.float32)
    before, other = tl.zeros([PAD_D], tl.float32), tl.zeros([PAD_D], tl.float32)
    mates = tl.zeros([PAD_D], tl.float32)  # energy of the channels that share a scale
    for i in range(0, splits, SPLITS):
        o_i = i + tl.arange(0, SPLITS)
        m_i = o_i < splits
        unit = tl.load(p_peaks + i_bh * splits + o_i, mask=m_i, other=0) / peak
        unit = unit[:, None]
        p_i = p_sums + ((i_bh * splits + o_i) * 3 * d)[:, None]
        m_x = m_i[:, None] & m_c[None, :]
        mean += tl.sum(unit * tl.load(p_i + o_c[None, :], mask=m_x, other=0), axis=0)
        p_i += d
        energy += tl.sum(unit * unit * tl.load(p_i + o_c[None, :], mask=m_x, other=0), axis=0)
        if SHARED > 0:
            mate = tl.load(p_i + o_mate[None, :], mask=m_x, other=0)
            mates += tl.sum(unit * unit * mate, axis=0)
        if TURNED:
            p_i += d
            before += tl.sum(unit * tl.load(p_i + o_c[None, :], mask=m_x, other=0), axis=0)
            m_x = m_i[:, None] & m_pair[None, :]
            other += tl.sum(unit * tl.load(p_i + o_other[None, :], mask=m_x, other=0), axis=0)
    mean, energy, mates = mean / tokens, energy / tokens, mates / tokens
    total = tl.sum(energy, axis=0)
    total = tl.where(total > 0, total, 1.0)  # of zeros, and of a NaN
    o_out = i_bh * d + o_c
    tl.store(p_mean + o_out, mean * peak, mask=m_c)
    if POWER == 0:
        tl.store(p_scale + i_bh, tl.sqrt(total) * peak)
    else:
        # The scales are those of the uncentred energy, not too small beside the head's.
        shared = (energy + mates) * 0.5 if SHARED > 0 else energy
        square = tl.maximum(shared, total * (MIN_ENERGY / d))
        if POWER == 0.5:
            square = tl.sqrt(square)
        elif POWER != 1:
            square = tl.exp2(tl.log2(square) * POWER)
        coded = tl.sum(energy / square, axis=0)  # energy of x / scale
        coded = tl.where(coded > 0, coded, 1.0)
        tl.store(p_scale + o_out, tl.sqrt(square * coded) * peak, mask=m_c)
    if TURNED:
        before, other = before / tokens, other / tokens
        excess = tl.where(m_c, before * before - TURNS * mean * mean, 0.0)
        tl.store(p_excess + i_bh, tl.sum(excess / total, axis=0))
        p_turn = p_turns + (tl.where(many != 0, i_bh // heads, 0) * r + o_pair) * 2
        cos = tl.load(p_turn, mask=m_pair, other=1)
        sin = tl.load(p_turn + 1, mask=m_pair, other=0)
        spread = before * cos + other * tl.where(first, -sin, sin)
        tl.store(p_spread + o_out, spread * peak, mask=m_c)
