# mypy: allow-untyped-defs
"""Coding segments of tokens into the store's rows, in one launch for keys and values.

The plain-torch reference is `quantizer.encode(statistics.normalize(x), hessian)`. One program codes
32 tokens of one head (16 of more than 256 channels):

    u = (x - mean) / channel scale        y = T u                   in chunks of the channels
    index_j = #{boundaries < y_j / |y|}        s = |y| rule(y / |y|, centroid[index])
              or of the sweep of `rounding`
    prod: r = y - s centroid[index]            |r|, signs of S r

The columns of y are the d coordinates in the order of the narrowest plane's slots (`packing.py`),
each slot filled up to a power of two: column k P + j is element k p + j for j < p, the bytes of
that plane, P the power of two. A plane's byte is then the sum of its fields along the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import launch_of
from rotorquant_hf.kernels.rounding import CHUNK, TINY, centroids_of, element, head
from rotorquant_hf.kernels.sizes import pieces, power_of_2
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.packing import plane_bytes, planes
from rotorquant_hf.quant.quantizer import Quantizer
from rotorquant_hf.quant.rounding import Feedback

_MAX_SCALE = tl.constexpr(65504.0)  # of float16
_SCRATCH_ELEMENTS = 1 << 23  # for the sweeps of one launch: enough of them to fill a GPU


@dataclass(frozen=True)
class AppendPart:
    """Keys or values to code.

    Attributes:
        x: (batch, heads, slots, d), float16, bfloat16 or float32, any strides.
        quantizer: one that `backend.kernels_take` accepts.
        statistics: equalisation and centring.
        out: the store's tensors (batch, heads, capacity, ...) by name, as in `PackedSpan.rows`:
            "codes", "scale" and for `RotorQuantProd` "signs" and "residual_norm". Any strides;
            the rows must exist: the kernel does not look at the capacity.
        feedback: what query-aware rounding reads of the statistics' Hessian, of every segment along
            a first axis, see `PackedSide.feedbacks`; None rounds to the nearest.
    """

    x: Tensor
    quantizer: Quantizer
    statistics: ChannelStatistics
    out: dict[str, Tensor]
    feedback: Feedback | None = None


def append_segments(bounds: Tensor, max_count: int, keys: AppendPart, values: AppendPart) -> None:
    """Code segments of tokens into rows of the store, keys and values in one launch.

    Token i < count of a segment is slot (begin + i) % slots of `x` and goes to row `row + i` of
    `out`.

    Args:
        bounds: (segments, 3) int32 on the device: begin, count and row of each. They are read by
            the kernel, so that a CUDA graph can replay the launch; with count = 0 nothing is
            written.
        max_count: upper bound of the counts, for the size of the grid.
        keys, values: what to code. Their batch and heads agree.
    """
    if max_count == 0:
        return
    arguments, options = kernel_arguments(bounds, max_count, keys, values)
    batch, heads = keys.x.shape[:2]
    tiles = launched = len(bounds) * arguments["segment_tiles"]
    scratch = None
    if keys.feedback is not None:
        elements = batch * heads * arguments["TOKENS"] * arguments["KEYS"].columns
        launched = min(tiles, max(1, _SCRATCH_ELEMENTS // elements))
        scratch = keys.feedback.factor.new_empty(launched * elements)
    constants = {name: arguments.pop(name) for name in ("KEYS", "VALUES", "TOKENS")}
    dtypes = keys.x.dtype, values.x.dtype
    launch = launch_of(append_kernel, dtypes, bounds.device, **constants, **options)
    p_bounds, stride, segment_tiles, *sides = arguments.values()
    with torch.cuda.device_of(bounds):  # Triton launches on the current device
        for first in range(0, tiles, launched):
            grid = min(launched, tiles - first), heads, 2 * batch
            launch(grid, p_bounds, stride, segment_tiles, scratch, first, *sides)


def kernel_arguments(
    bounds: Tensor, max_count: int, keys: AppendPart, values: AppendPart
) -> tuple[dict[str, Any], dict[str, int]]:
    """The arguments of `append_kernel`, in its order without scratch, and compiler options."""
    d = max(keys.quantizer.d, values.quantizer.d)
    tokens = 32 if d <= 256 else 16
    arguments = {
        "p_bounds": bounds,
        "stride_bounds": bounds.stride(0),
        "segment_tiles": pieces(max_count, tokens),
        **{f"k_{name}": value for name, value in _arguments(keys).items()},
        **{f"v_{name}": value for name, value in _arguments(values).items()},
        "KEYS": _shape(keys),
        "VALUES": _shape(values),
        "TOKENS": tokens,
    }
    if d <= 256:  # the fastest of those tried on an H100
        warps = 8 if d > 128 and keys.feedback is not None else 4
        return arguments, {"num_warps": warps, "num_stages": 3}
    # Lanes of a row add up across warps here; see `launch_of`.
    return arguments, {"num_warps": 16, "num_stages": 2, "enable_fp_fusion": False}


class _Shape(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        d, bits, rule: of stage 1. projections: m, or 0 without a stage 2.
        rank: of the Hessian, 0 without.
        width: of the narrowest plane. slot: its bytes; 8 / width slots of as many elements make d.
        pad: columns of a slot, a power of two. columns: of all slots.
    """

    d: int
    bits: int
    rule: str
    projections: int
    rank: int
    width: int
    slot: int
    pad: int
    columns: int


def _shape(part: AppendPart) -> _Shape:
    mse, d = part.quantizer.stage_one, part.quantizer.d
    width = planes(mse.bits)[-1]
    slot = plane_bytes(d, width)
    pad = max(power_of_2(slot), 2 * width)  # 16 columns at least
    rank = 0 if part.feedback is None else part.feedback.factor.shape[-1]
    signs = part.quantizer.num_signs
    return _Shape(d, mse.bits, mse.scale, signs, rank, width, slot, pad, 8 // width * pad)


def _arguments(part: AppendPart) -> dict[str, Any]:
    """The kernel's arguments for keys or values; tensors as (pointer, *strides)."""
    mse, out = part.quantizer.stage_one, part.out
    return {
        "x": _strided(part.x),
        "slots": part.x.shape[2],
        "channel_scale": _strided(part.statistics.scale.expand(-1, -1, -1, mse.d)),
        "mean": _strided(part.statistics.mean),
        "rotation": _strided(mse.rotation.matrix()),
        "codebook": (mse.boundaries, mse.centroids),
        **_feedback(part.feedback),
        "projection": _strided(part.quantizer.sign_matrix),
        "codes": _strided(out["codes"]),
        "scale": _strided(out["scale"]),
        "signs": _strided(out.get("signs")),
        "residual_norm": _strided(out.get("residual_norm")),
    }


def _feedback(feedback: Feedback | None) -> dict[str, tuple | None]:
    parts = (None, None, None) if feedback is None else feedback
    return dict(zip(Feedback._fields, map(_strided, parts), strict=True))


# Triton 3.6 loses the constants in tuples of tuples: one level only.
def _strided(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor, *tensor.stride())


@triton.jit(
    do_not_specialize=("stride_bounds", "segment_tiles", "k_slots", "v_slots", "first_tile"),
    do_not_specialize_on_alignment=("p_bounds",),
)
def append_kernel(
    p_bounds,
    stride_bounds,
    segment_tiles,
    p_scratch,
    first_tile,
    k_x,
    k_slots,
    k_channel_scale,
    k_mean,
    k_rotation,
    k_codebook,
    k_factor,
    k_gains,
    k_level,
    k_projection,
    k_codes,
    k_scale,
    k_signs,
    k_residual_norm,
    v_x,
    v_slots,
    v_channel_scale,
    v_mean,
    v_rotation,
    v_codebook,
    v_factor,
    v_gains,
    v_level,
    v_projection,
    v_codes,
    v_scale,
    v_signs,
    v_residual_norm,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (tiles of tokens, heads, 2 batch): the keys and the values of row b, side by side.

    Every segment has `segment_tiles` tiles.
    """
    # One grid for both sides, so that a step launches once; program z is side z % 2 of row z // 2.
    i_tile, i_h = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_z, i_segment = tl.program_id(2), i_tile // segment_tiles
    i_tile %= segment_tiles
    p_bounds += i_segment * stride_bounds
    begin, count, row = tl.load(p_bounds), tl.load(p_bounds + 1), tl.load(p_bounds + 2)
    if i_tile * TOKENS >= count:  # the grid is sized for the largest count
        return
    i_b = (i_z // 2).to(tl.int64)
    o_i = i_tile * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    m_i = o_i < count
    o_row = (row + o_i).to(tl.int64)
    scratch = None
    if i_z % 2 == 0:
        if KEYS.rank > 0:
            i_program = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + tl.program_id(0)
            scratch = p_scratch + i_program * (TOKENS * KEYS.columns)
        _append(
            scratch,
            k_x,
            k_slots,
            k_channel_scale,
            k_mean,
            k_rotation,
            k_codebook,
            k_factor,
            k_gains,
            k_level,
            k_projection,
            k_codes,
            k_scale,
            k_signs,
            k_residual_norm,
            i_segment,
            i_b,
            i_h,
            begin + o_i,
            o_row,
            m_i,
            KEYS,
        )
    else:
        _append(
            None,
            v_x,
            v_slots,
            v_channel_scale,
            v_mean,
            v_rotation,
            v_codebook,
            v_factor,
            v_gains,
            v_level,
            v_projection,
            v_codes,
            v_scale,
            v_signs,
            v_residual_norm,
            i_segment,
            i_b,
            i_h,
            begin + o_i,
            o_row,
            m_i,
            VALUES,
        )


@triton.jit
def _append(
    scratch,
    x,
    slots,
    channel_scale,
    mean,
    rotation,
    codebook,
    factor,
    gains,
    level,
    projection,
    codes,
    scale,
    signs,
    residual_norm,
    i_segment,
    i_b,
    i_h,
    o_x,
    o_row,
    m_i,
    SHAPE: tl.constexpr,
):
    """Code the tokens `o_x`, counted from slot 0 and beyond the last, into the rows `o_row`."""
    o_x = (o_x % slots).to(tl.int64)  # a ring's block may wrap around
    b_y = _rotate(x, channel_scale, mean, rotation, i_b, i_h, o_x, m_i, SHAPE)
    b_r, b_peak = _code(
        b_y,
        scratch,
        codebook,
        factor,
        gains,
        level,
        codes,
        scale,
        i_segment,
        i_b,
        i_h,
        o_row,
        m_i,
        SHAPE,
    )
    if SHAPE.projections > 0:
        _project(b_r, b_peak, projection, signs, residual_norm, i_b, i_h, o_row, m_i, SHAPE)


@triton.jit
def _rotate(x, channel_scale, mean, rotation, i_b, i_h, o_x, m_i, SHAPE: tl.constexpr):
    """T((x - mean) / channel_scale) of the slots `o_x`: (tokens, columns)."""
    D: tl.constexpr = SHAPE.d
    o_n = tl.arange(0, SHAPE.columns)
    m_n = o_n % SHAPE.pad < SHAPE.slot
    p_x = head(x, i_b, i_h) + o_x[:, None] * x[3]
    p_w = head(channel_scale, i_b, i_h)
    p_t = rotation[0] + element(o_n, SHAPE)[None, :] * rotation[1]
    b_y = tl.zeros((o_x.shape[0], o_n.shape[0]), tl.float32)  # [TOKENS, columns]
    for k in range(0, D, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        m_k = o_k < D
        m_u = m_i[:, None] & m_k[None, :]
        b_u = tl.load(p_x + o_k[None, :] * x[4], m_u, 0.0).to(tl.float32)  # [TOKENS, CHUNK]
        if mean is not None:
            b_u -= tl.load(head(mean, i_b, i_h) + o_k * mean[4], m_k, 0.0)[None, :]
        b_u *= (1.0 / tl.load(p_w + o_k * channel_scale[4], m_k, 1.0))[None, :]
        # Columns that only fill up a slot are zero: they add nothing to the norm of y.
        m_t = m_k[:, None] & m_n[None, :]
        b_t = tl.load(p_t + o_k[:, None] * rotation[2], m_t, 0.0)  # [CHUNK, columns]
        # Three products in tf32 make nearly float32, on tensor cores.
        b_y = tl.dot(b_u, b_t, b_y, input_precision="tf32x3")
    return b_y


@triton.jit
def _code(
    b_y,
    scratch,
    codebook,
    factor,
    gains,
    level,
    codes,
    scale,
    i_segment,
    i_b,
    i_h,
    o_row,
    m_i,
    SHAPE: tl.constexpr,
):
    """Store codes and scales of y (tokens, columns).

    Returns (y - y_hat) / peak and peak (tokens,), the largest coordinate of y.
    """
    BITS: tl.constexpr = SHAPE.bits
    # Taken out first: squares of 1e-30 or 1e30 leave float32.
    b_peak = tl.maximum(tl.max(tl.abs(b_y), axis=1), TINY)
    b_y *= (1.0 / b_peak)[:, None]
    b_norm = tl.sqrt(tl.sum(b_y * b_y, axis=1))
    b_unit = b_y * (1.0 / tl.maximum(b_norm, 1.0))[:, None]  # the norm is 1 or more, or y = 0

    b_index, b_c, b_scale = centroids_of(
        b_unit, scratch, codebook, factor, gains, level, i_segment, i_b, i_h, SHAPE
    )
    b_scale = b_norm * b_scale * b_peak
    b_scale = tl.where(b_scale > _MAX_SCALE, _MAX_SCALE, b_scale).to(tl.float16)
    tl.store(head(scale, i_b, i_h) + o_row * scale[3], b_scale, m_i)

    p_codes = head(codes, i_b, i_h) + o_row[:, None] * codes[3]
    for i in tl.static_range(4):  # planes of 8, 4, 2 and 1 bits
        if BITS & (8 >> i):
            _store_plane(p_codes, codes[4], b_index, m_i, 8 >> i, SHAPE)
    return b_y - b_c * (b_scale.to(tl.float32) / b_peak)[:, None], b_peak


@triton.jit
def _store_plane(p_codes, stride, b_index, m_i, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    """Store the plane of WIDTH bits: the widths are the binary digits of the bits of a code."""
    SHIFT: tl.constexpr = SHAPE.bits // (2 * WIDTH) * (2 * WIDTH)  # the planes before
    b_byte = _pack((b_index >> SHIFT) & ((1 << WIDTH) - 1), WIDTH)
    o_n = tl.arange(0, b_byte.shape[1])
    o_byte = SHAPE.d * SHIFT // 8 + element(o_n, SHAPE)
    m_byte = m_i[:, None] & (o_n % SHAPE.pad < SHAPE.slot)[None, :]
    tl.store(p_codes + o_byte[None, :] * stride, b_byte, m_byte)


@triton.jit
def _project(b_r, b_peak, projection, signs, norm, i_b, i_h, o_row, m_i, SHAPE: tl.constexpr):
    """Store the norm of the residual r = b_r * b_peak and the signs of S r.

    As many bytes of signs at a time as take the registers that the residual does.
    """
    M: tl.constexpr = SHAPE.projections
    SIZE: tl.constexpr = (M + 7) // 8
    BYTES: tl.constexpr = max(2, min(triton.next_power_of_2(SIZE), b_r.shape[1] // 8))
    CHUNKS: tl.constexpr = b_r.shape[1] // CHUNK
    b_norm = tl.sqrt(tl.sum(b_r * b_r, axis=1)) * b_peak
    tl.store(head(norm, i_b, i_h) + o_row * norm[3], b_norm.to(tl.float16), m_i)

    p_signs = head(signs, i_b, i_h) + o_row[:, None] * signs[3]
    b_chunks = tl.reshape(b_r, (b_r.shape[0], CHUNKS, CHUNK))
    o_chunk = tl.arange(0, CHUNKS)[None, :, None]
    o_m = tl.arange(0, 8 * BYTES)
    for j in range(0, SIZE, BYTES):
        o_byte = j + o_m % BYTES
        o_s = o_m // BYTES * SIZE + o_byte
        m_m = (o_byte < SIZE) & (o_s < M)
        b_dot = tl.zeros((b_r.shape[0], 8 * BYTES), tl.float32)
        for i in range(CHUNKS):
            # Columns [i CHUNK, (i + 1) CHUNK) of the residual; a sum, as Triton has no slices.
            b_chunk = tl.sum(tl.where(o_chunk == i, b_chunks, 0.0), axis=1)  # [TOKENS, CHUNK]
            o_n = i * CHUNK + tl.arange(0, CHUNK)
            p_s = projection[0] + element(o_n, SHAPE)[:, None] * projection[2]
            m_s = (o_n % SHAPE.pad < SHAPE.slot)[:, None] & m_m[None, :]
            b_s = tl.load(p_s + o_s[None, :] * projection[1], m_s, 0.0)
            b_dot = tl.dot(b_chunk, b_s, b_dot, input_precision="tf32x3")
        b_byte = _pack(((b_dot >= 0) & m_m[None, :]).to(tl.int32), 1)
        o_j = j + tl.arange(0, BYTES)
        tl.store(p_signs + o_j[None, :] * signs[4], b_byte, m_i[:, None] & (o_j < SIZE)[None, :])


@triton.jit
def _pack(b_field, WIDTH: tl.constexpr):
    """Fields (tokens, 8 / WIDTH * bytes), slot by slot, to bytes (tokens, bytes)."""
    SLOTS: tl.constexpr = 8 // WIDTH
    b_slots = tl.reshape(b_field, (b_field.shape[0], SLOTS, b_field.shape[1] // SLOTS))
    o_shift = tl.arange(0, SLOTS) * WIDTH
    return tl.sum(b_slots << o_shift[None, :, None], axis=1).to(tl.uint8)
