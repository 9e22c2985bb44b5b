"""One step of decoding on the device: new tokens enter the ring, and the lengths move on.

The state of a layer is a vector of `STATE` int32:

    0 sinks           number of first tokens kept in full precision
    1 packed_begin    first packed row in use      2 packed_count
    3 recent_begin      slot of the oldest token     4 recent_count     of the ring
    5 flush_begin     slot     6 flush_count       7 flush_row      block to be coded now
    8 arrived         programs of this launch that are done

After a push, 0-4 are what attention reads and 5-7 the block that the append kernel codes. This
step's attention still reads that block in full precision; the next push counts it among the packed
tokens.
All of this happens on the device, so that a CUDA graph of a step can be replayed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.kernels.sizes import padded

STATE = 9
LENGTHS, FLUSH = slice(0, 5), slice(5, 8)


class PushTokens:
    """Puts new tokens into a ring and advances its state.

    Args:
        ring_keys, ring_values: (batch, heads, slots, d), contiguous.
        state: (STATE,) int32.
        residual, block: tokens leave the ring in multiples of `block`, down to `residual`.
        window: of sliding-window attention, 0 for none: before the new tokens, only the last
            window - 1 are kept. What is beyond has to be packed tokens.
    """

    def __init__(
        self,
        ring_keys: Tensor,
        ring_values: Tensor,
        state: Tensor,
        *,
        residual: int,
        block: int,
        window: int,
    ) -> None:
        batch, heads, slots, d_k = ring_keys.shape
        d_v = ring_values.shape[3]
        self._state, self._grid = state, (batch * heads, 1, 1)
        self._launch = Launch(
            push_kernel,
            p_ring_k=ring_keys,
            p_ring_v=ring_values,
            p_state=state,
            heads=heads,
            slots=slots,
            residual=residual,
            block=block,
            window=window,
            d_k=d_k,
            d_v=d_v,
            **push_options(d_k, d_v),
        )

    def __call__(self, keys: Tensor, values: Tensor) -> None:
        """Push keys and values (batch, heads, n, d), any strides; n at most the free slots."""
        with torch.cuda.device_of(self._state):  # Triton launches on the current device
            self._launch(self._grid, keys, *keys.stride(), values, *values.stride(), keys.shape[2])


def push_options(d_k: int, d_v: int) -> dict[str, Any]:
    """How `push_kernel` is compiled for these head dims."""
    return {"PAD_K": padded(d_k), "PAD_V": padded(d_v), "num_warps": 1}


@triton.jit(do_not_specialize=["n", "residual", "block", "window", "slots"])
def push_kernel(
    p_k,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    p_v,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    n,
    # from here on what stays from step to step
    p_ring_k,
    p_ring_v,
    p_state,
    heads,
    slots,
    residual,
    block,
    window,
    d_k,
    d_v,
    PAD_K: tl.constexpr,
    PAD_V: tl.constexpr,
):
    """Grid (batch * heads): every program writes the new tokens of its head into the ring."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_k, o_v = tl.arange(0, PAD_K), tl.arange(0, PAD_V)
    m_k, m_v = o_k < d_k, o_v < d_v
    packed_begin, packed_count = tl.load(p_state + 1), tl.load(p_state + 2)
    recent_begin, recent_count = tl.load(p_state + 3), tl.load(p_state + 4)
    flushed = tl.load(p_state + 6)

    p_row_k = p_k + i_b * stride_kb + i_h * stride_kh + o_k * stride_kd
    p_row_v = p_v + i_b * stride_vb + i_h * stride_vh + o_v * stride_vd
    # Behind the newest token. That may overwrite the block that the last step coded, which is
    # still counted in recent_count here, but never a token that is still read.
    for i in range(n):
        slot = i_bh * slots + (recent_begin + recent_count + i) % slots
        tl.store(p_ring_k + slot * d_k + o_k, tl.load(p_row_k + i * stride_kn, mask=m_k), mask=m_k)
        tl.store(p_ring_v + slot * d_v + o_v, tl.load(p_row_v + i * stride_vn, mask=m_v), mask=m_v)

    # The last program to arrive writes the new state: by then all the others have read the old
    # one. The barrier keeps the reads of this program's threads before its arrival.
    tl.debug_barrier()
    arrived = tl.atomic_add(p_state + 8, 1)
    if arrived == tl.num_programs(0) - 1:
        # The block of the last step was coded after its attention; it is packed from now on.
        packed_count += flushed
        recent_begin += flushed
        recent_count += n - flushed
        if window > 0:
            # Packed tokens that the first new query does not see any more.
            outside = tl.maximum(packed_count + recent_count - (window - 1 + n), 0)
            packed_begin += outside
            packed_count -= outside
        recent_begin = recent_begin % slots
        tl.store(p_state + 1, packed_begin)
        tl.store(p_state + 2, packed_count)
        tl.store(p_state + 3, recent_begin)
        tl.store(p_state + 4, recent_count)
        # The block for `append_segments` in this step: first slot, count (0: none) and row.
        tl.store(p_state + 5, recent_begin)
        tl.store(p_state + 6, tl.maximum(recent_count - residual, 0) // block * block)
        tl.store(p_state + 7, packed_begin + packed_count)
        tl.store(p_state + 8, 0)
