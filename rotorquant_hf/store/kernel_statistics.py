"""What queries, keys and values are like, found by the kernels: seven launches a layer.

The references, which ask a GPU for a hundred and more small operations, are `QueryMoment.of`,
`ChannelStatistics.of_block` and `read_by`, and `Feedback.of` with
`ChannelStatistics.hessians_from`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotorquant_hf.kernels.block import block_sums
from rotorquant_hf.kernels.channels import channels_of
from rotorquant_hf.kernels.feedback import feedback_of
from rotorquant_hf.kernels.hessian import Turning, hessian_factors
from rotorquant_hf.kernels.moment import query_moments
from rotorquant_hf.quant.channels import (
    READ_AFTER,
    SAMPLED_TOKENS,
    ChannelStatistics,
    fitted_length,
    middles_of_segments,
)
from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.moments import SAMPLED_QUERIES, QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.rotations import Rotation
from rotorquant_hf.quant.rounding import Feedback
from rotorquant_hf.quant.tiles import all_sampled_places
from rotorquant_hf.store.sines import sampled_sines


def kernel_moment(
    query: Tensor,
    heads: int,
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
) -> QueryMoment:
    """`QueryMoment.of` of at least one token.

    Of 16-bit queries to the rounding of float32 sums; of float32 ones, and before RoPE, numbers are
    multiplied in some 16 bits.
    """
    places = all_sampled_places(query.shape[2], SAMPLED_QUERIES, query.device)
    sines = None
    if rope is not None and positions is not None:
        sines = sampled_sines(rope, positions, SAMPLED_QUERIES)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        mean, before = query_moments(query, heads, places, sines, _half(rope))
    return QueryMoment(mean, len(places) * (query.shape[1] // heads), before)


def kernel_block(
    x: Tensor,
    power: float,
    center: bool,
    rope_layout: str = "none",
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
) -> ChannelStatistics:
    """`ChannelStatistics.of_block` of at least one token, but for the rounding of float32 sums."""
    places = all_sampled_places(x.shape[2], SAMPLED_TOKENS, x.device)
    sines = turns = None
    if rope is not None and positions is not None:
        sines = sampled_sines(rope, positions, SAMPLED_TOKENS)
        turns = rope.mean_turns((fitted_length(positions),))
    with torch.cuda.device_of(x):
        sums = block_sums(x, places, sines, _half(rope))
        found = channels_of(sums, (x.shape[0], x.shape[1]), power, rope_layout, turns, _half(rope))
    mean = found.mean if center else None
    if rope is None or turns is None:
        return ChannelStatistics(found.scale, mean, rope=rope)
    is_turned = found.excess.sum(dim=1).view(-1, 1, 1, 1) >= 0
    if center:
        mean = torch.where(is_turned, found.spread, found.mean)
    return ChannelStatistics(found.scale, mean, rope=rope.where(is_turned))


def kernel_hessian(
    statistics: ChannelStatistics, queries: QueryMoment, rope: Rope | None = None
) -> tuple[LowRankHessian, Tensor]:
    """That of `statistics.read_by(queries, rope)`, and `product_shift`, in float32."""
    own, turning = statistics.rope, None
    if own is not None and queries.pre_rope is not None:
        rope = rope or own
        frequencies = own.frequencies.expand(len(queries.mean), -1, -1, -1).contiguous()
        before, products = queries.pre_rope.contiguous(), rope.mean_products(READ_AFTER)
        by_turn = rope.mean_turns(READ_AFTER)
        turning = Turning(frequencies, before, *products, by_turn, _half(own))
    with torch.cuda.device_of(queries.mean):
        factor, shift = hessian_factors(
            statistics.scale.contiguous(),
            None if statistics.mean is None else statistics.mean.contiguous(),
            queries.mean.contiguous(),
            queries.count,
            turning,
        )
    return LowRankHessian(factor), shift


def kernel_feedback(
    statistics: ChannelStatistics, rotation: Rotation, position: int, count: int
) -> Feedback:
    """`Feedback.of` the Hessians of the segment of a position and of the next, along a first axis.

    Where nothing turns there is one for all.
    """
    assert statistics.hessian is not None
    sines = None
    if statistics.rope is not None:
        middles = middles_of_segments(position, count, statistics.scale.device)
        sines = statistics.rope.sines(middles)
    with torch.cuda.device_of(statistics.scale):
        return feedback_of(
            statistics.hessian.factor.contiguous(),
            statistics.scale.contiguous(),
            rotation.matrix(),
            sines,
            _half(statistics.rope),
        )


def _half(rope: Rope | None) -> bool:
    return rope is not None and rope.layout == "half"
