"""What queries, keys and values are like, found by the native library.

The references are `QueryMoment.of`, `ChannelStatistics.of_block` and `read_by`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rotorquant_hf.native.library import (
    BlockArguments,
    HessianArguments,
    MomentArguments,
    TurnedArgument,
    library,
)
from rotorquant_hf.quant.channels import (
    MIN_RMS,
    OFFSET_ENERGY,
    OFFSET_SHARE,
    READ_AFTER,
    SAMPLED_TOKENS,
    TURNS,
    ChannelStatistics,
    fitted_length,
)
from rotorquant_hf.quant.hessian import ITERATIONS, RANK, RIDGE, LowRankHessian, start_of_iteration
from rotorquant_hf.quant.moments import SAMPLED_QUERIES, QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import sampled_places
from rotorquant_hf.store.sines import sampled_sines

_CENTERS = {False: 0, True: 1, "auto": 2}
_PAIRS = {"none": 0, "half": 1, "interleaved": 2}
"""As statistics.h numbers them."""


def native_moment(
    query: Tensor,
    heads: int,
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
    level: str | None = None,
) -> QueryMoment:
    """`QueryMoment.of` by the native library, to the rounding of float32 sums.

    Args:
        query, heads, rope, positions: as there; at least one token, of a dtype in `FLOATS`.
        level: one of `LEVELS`; None for the best.
    """
    loaded = library()
    assert loaded is not None
    batch, query_heads, _, d = query.shape
    a = MomentArguments()
    a.group = query_heads // heads
    held = _Held(query, SAMPLED_QUERIES, rope, positions)
    held.describe(a.x)
    mean = query.new_empty(batch, heads, d, d, dtype=torch.float32)
    before = None if held.sines is None else torch.empty_like(mean)
    a.mean, a.before = mean.data_ptr(), _address(before)
    loaded.moment(a, level)
    return QueryMoment(mean, a.x.tokens * a.group, before)


def native_block(
    x: Tensor,
    power: float,
    center: bool | str = False,
    rope_layout: str = "none",
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
    level: str | None = None,
) -> ChannelStatistics:
    """`ChannelStatistics.of_block` by the native library, to the rounding of float32 sums.

    Args:
        x, power, center, rope_layout, rope, positions: as there; vectors that are finite, at least
            one token, of a dtype in `FLOATS`.
        level: one of `LEVELS`; None for the best.
    """
    loaded = library()
    assert loaded is not None
    batch, heads, _, d = x.shape
    a, held = BlockArguments(), _Held(x, SAMPLED_TOKENS, rope, positions)
    held.describe(a.x)
    a.power, a.center, a.layout = power, _CENTERS[center], _PAIRS[rope_layout]
    a.turns, a.min_rms = TURNS, MIN_RMS
    a.offset_energy, a.offset_share = OFFSET_ENERGY, OFFSET_SHARE
    scale = x.new_empty(batch, heads, 1, d if power else 1, dtype=torch.float32)
    mean = x.new_empty(batch, heads, 1, d, dtype=torch.float32) if center else None
    a.scale, a.mean = scale.data_ptr(), _address(mean)
    if rope is None or positions is None:
        loaded.block(a, level)
        return ChannelStatistics(scale, mean, rope=rope)
    spread = _mean_turns(rope, (fitted_length(positions),), batch)
    turning = rope.frequencies.new_empty(batch, *rope.frequencies.shape[1:])
    a.spread.point(spread)
    a.turning = turning.data_ptr()
    loaded.block(a, level)
    return ChannelStatistics(scale, mean, rope=Rope(turning, rope.layout))


def native_hessian(
    statistics: ChannelStatistics,
    queries: QueryMoment,
    rope: Rope | None = None,
    level: str | None = None,
) -> LowRankHessian | None:
    """That of `statistics.read_by(queries, rope)` by the native library.

    Args:
        statistics, queries, rope: as there, for vectors of RANK channels at least.
        level: one of `LEVELS`; None for the best.

    Returns:
        None if a moment is not positive semidefinite, or not finite.
    """
    loaded = library()
    assert loaded is not None
    a = HessianArguments()
    mean = queries.mean.contiguous()
    a.batch, a.heads, a.d = mean.shape[:3]
    a.moment = mean.data_ptr()
    if statistics.rope is not None and queries.pre_rope is not None:
        before, rope = queries.pre_rope.contiguous(), rope or statistics.rope
        by_cos, by_sin = _mean_products(rope, READ_AFTER, a.batch)
        by_turn = _mean_turns(rope, READ_AFTER, a.batch)
        a.before = before.data_ptr()
        a.rope.point(statistics.rope.frequencies, rope.layout, a.batch)
        a.by_cos.point(by_cos)
        a.by_sin.point(by_sin)
        a.by_turn.point(by_turn)
    a.level = queries.shrinkage
    a.scale.point_channels(statistics.scale)
    start = start_of_iteration(a.d, RANK, mean.device)
    a.start, a.ridge, a.iterations = start.data_ptr(), RIDGE, ITERATIONS
    factor = mean.new_empty(a.batch, a.heads, a.d, RANK, dtype=torch.float16)
    a.factor = factor.data_ptr()
    return LowRankHessian(factor) if loaded.hessian(a, level) else None


class _Held:
    """Vectors as the library reads them, and the tensors that have to last as long.

    Attributes:
        sines: the cosines and sines of the angles that RoPE has turned them by, each (batch, 1,
            tokens looked at, r) float32; None if these are not known.
    """

    def __init__(
        self, x: Tensor, count: int, rope: Rope | None, positions: range | Tensor | None
    ) -> None:
        self.x = x if x.stride(3) == 1 else x.contiguous()
        self.places = sampled_places(x.shape[2], count, x.device)
        self.rope, self.sines = rope, None
        if rope is not None and positions is not None:
            self.sines = tuple(
                y.expand(x.shape[0], -1, -1, -1) for y in sampled_sines(rope, positions, count)
            )

    def describe(self, a: TurnedArgument) -> None:
        """Let arguments be these vectors."""
        a.batch, a.heads, a.tokens, a.d = self.x.shape
        a.x.point(self.x)
        if self.places is not None:
            a.tokens, a.places = len(self.places), self.places.data_ptr()
        if self.rope is not None and self.sines is not None:
            a.rope.point(self.rope.frequencies, self.rope.layout, a.batch)
            a.cos.point(self.sines[0])
            a.sin.point(self.sines[1])


# Kept, as every layer asks for those of a pass.


@lru_cache(maxsize=8)
def _mean_turns(rope: Rope, lengths: tuple[int, ...], batch: int) -> Tensor:
    with torch.inference_mode(False):
        return _real(rope.mean_turns(lengths), batch)


@lru_cache(maxsize=4)
def _mean_products(rope: Rope, lengths: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        by_cos, by_sin = rope.mean_products(lengths)
        return _real(by_cos, batch), _real(by_sin, batch)


def _real(x: Tensor, batch: int) -> Tensor:
    """Complex numbers, (batch or 1, ...), as pairs, for all rows of a batch."""
    return torch.view_as_real(x.expand(batch, -1, -1, -1))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
