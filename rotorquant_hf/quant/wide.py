"""Which keys take 8 bits: those of layers whose scores fewer bits would spoil.

Codes of relative distortion D (`LloydMaxCodebook.distortion`) leave a squared error of D |u|^2 in
u = (x - mean) / scale. Spread evenly over its d elements, it shifts the scores s q . x
(mostly s = d^-1/2) by

    s^2 D |u|^2 / d * sum_c scale_c^2 C_cc

in the mean square, with C the second moment of the queries. (Rounding along the queries, see
`rounding`, then takes most of that away: in these layers and in all others.)

It is large where keys are mostly a constant, which RoPE turns away from any mean that could be
subtracted: then that is what is coded, and it drowns what differs between keys. The first layer of
Qwen2.5 has key biases a hundred times as large as that. At 4 bits the worst of its heads shift by
13 to 14, those of all other layers of Qwen2.5, SmolLM2 and Gemma 3 by 0.02 to 1.3. That layer's
attention over 8,192 tokens of a novel diverges by 0.54 nats with 4-bit keys and by 0.002 with 8-bit
keys; with 4 bits all 23 others together by 0.18.
"""

from __future__ import annotations

import math
from functools import cache

from torch import Tensor
from torch.linalg import vector_norm

from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.lloyd_max import MAX_BITS, LloydMaxCodebook
from rotorquant_hf.quant.moments import QueryMoment

WIDE_BITS = MAX_BITS

MAX_SHIFT = 4.0
"""The largest mean square shift of scores that keys of `JUDGED_BITS` may cause."""

JUDGED_BITS = 4
"""One width for all presets, so that the same layers of a model are wide in each."""


def needs_wide(shift: Tensor, score_scale: float) -> bool:
    """Whether keys take WIDE_BITS: some head's scores shift too far, in some row.

    One row is enough: the statistics of a row that is mostly padding are those of its padding,
    which shift little, and must not take the bits from a row that needs them. The host waits for a
    GPU, as it is the host that allocates the rows of codes.

    Args:
        shift: of `product_shift`.
        score_scale: factor of the inner products in scores.
    """
    limit = _max_shift() / score_scale**2 if score_scale else math.inf
    return any(x > limit for heads in shift.tolist() for x in heads)  # NaN is over no limit


@cache
def _max_shift() -> float:
    """The largest shift of scores by codes of distortion 1."""
    return MAX_SHIFT / LloydMaxCodebook.for_dimension(1, JUDGED_BITS).distortion


def product_shift(statistics: ChannelStatistics, queries: QueryMoment) -> Tensor:
    """The mean square shift of inner products by codes of distortion 1, (batch, heads) float32.

    Args:
        statistics: of the keys.
        queries: of the queries that read them.
    """
    scale = statistics.scale[:, :, 0]
    rms = queries.mean.diagonal(dim1=-2, dim2=-1).sqrt()
    read = vector_norm(scale * rms, dim=-1).square() / queries.mean.shape[-1]
    if statistics.mean is None:
        return read
    # |x / scale| has an rms of 1 wherever RoPE has turned the pairs of channels to. Subtracting the
    # mean takes its share of that away only if it was taken over all these positions.
    subtracted = vector_norm(statistics.mean[:, :, 0] / scale, dim=-1).square()
    return read * (1 - subtracted).clamp(min=0)
