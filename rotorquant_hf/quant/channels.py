"""Per-channel statistics: equalisation and centring of vectors before they are coded.

A vector x is coded as u = (x - mean) / scale and read back as x_hat = u_hat * scale + mean.
Neither costs anything in the loop over tokens:

    <q, x_hat> = <q * scale, u_hat> + <q, mean>        sum_t p_t x_hat_t =
                                                        (sum_t p_t u_hat_t) * scale + mean

Why equalise: a rotation spreads the energy of the large channels over all, and with it their
error. The error of a score is q . (scale * eps), of variance ~ |q scale|^2 |x / scale|^2, which
is smallest for scale_c^2 = |x_c| / |q_c|; for queries of unknown direction that is
scale_c = rms_c^(1/2).

RoPE turns keys and queries on as the text goes on (`rope`), and statistics of its beginning soon
miss them. Where it is known how it turns them, the mean is therefore that of the same keys at all
positions up to a horizon, and the Hessian turns along with the keys that are coded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rotorquant_hf.quant.device import on_cpu
from rotorquant_hf.quant.hessian import RANK, LowRankHessian, doubled
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import last_sampled, sampled, sampled_positions

SEGMENT = 1024
"""Tokens of a text that are coded with the same Hessian: positions 0 ... 1023, 1024 ..., and so on.
On SmolLM2, 256 of them are no better."""

SAMPLED_TOKENS = 2048
"""Tokens looked at of a long first block."""

_HORIZON = 2048
"""Positions that the mean of keys is to fit at least; more if it is taken from further on. (8192
are better after position 4096, but cost a third of the quality at the beginning.)"""

READ_AFTER = (512, 2048)
"""How long after a segment's keys the queries come that read them: half up to either."""

TURNS = 0.98
"""Keys are taken to be turned as their model's config says if their mean before RoPE is at least
this share of their mean after it, in energy. In layers of SmolLM2, Gemma 3 and Qwen2.5 it is 1.00
to 1.96 times that; with wrong pairs of channels 0.13 to 0.99."""

# A channel's rms counts as at least this share of the head's: a channel that is silent in the
# first block may speak later, and would then be blown up by the division.
MIN_RMS = 0.02

# A channel is an offset channel if its energy is this many times the head's median and nearly all
# of it is in the mean (measured on the first block, of 32 tokens or more).
OFFSET_ENERGY = 25.0
OFFSET_SHARE = 0.999


class Measured(NamedTuple):
    """A block of vectors, or a sample of a long one, and what it is like; all float32.

    Attributes:
        unit: the vectors over `peak`, (batch, heads, tokens, d).
        peak: a head's largest entry, (batch, heads, 1, 1); 1 for zeros. It is taken out, as squares
            of 1e-30 or 1e30 leave float32.
        mean: of `unit`, (batch, heads, 1, d).
        energy: the mean of the squares of `unit`, (batch, heads, 1, d).
        total: the sum of `energy`, (batch, heads, 1, 1); 1 for zeros.
    """

    unit: Tensor
    peak: Tensor
    mean: Tensor
    energy: Tensor
    total: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Measured:
        """That of vectors (batch, heads, tokens, d), or with more axes before."""
        x = sampled(x, SAMPLED_TOKENS).float()
        # A NaN (on a GPU nobody looks for them) spoils its own vector, not the unit of the head.
        # What a GPU does in one operation takes a CPU ten times as long as the same in two, each of
        # which is a pass along the memory.
        short = on_cpu(x)
        if short:
            peak = x.abs().amax(dim=(-2, -1), keepdim=True)
        else:
            peak = torch.linalg.vector_norm(x, ord=math.inf, dim=(-2, -1), keepdim=True)
        peak = _or_one(peak.nan_to_num(0.0, math.inf))
        unit = x / peak
        if short:
            mean, energy = (y.mean(dim=-2, keepdim=True) for y in (unit, unit.square()))
        else:
            variance, mean = torch.var_mean(unit, dim=-2, correction=0, keepdim=True)
            energy = torch.addcmul(variance, mean, mean)
        total = energy.sum(dim=-1, keepdim=True)
        return cls(unit, peak, mean, energy, _or_one(total.nan_to_num(0.0)))

    @classmethod
    def of_both(cls, keys: Tensor, values: Tensor) -> tuple[Measured, Measured]:
        """Those of keys and of values; on a GPU, of equal shapes, in half the operations."""
        equal = (keys.shape, keys.dtype) == (values.shape, values.dtype)
        if not equal or on_cpu(keys):
            return cls.of(keys), cls.of(values)
        both = cls.of(torch.stack([sampled(x, SAMPLED_TOKENS) for x in (keys, values)]))
        return cls(*(x[0] for x in both)), cls(*(x[1] for x in both))


@dataclass(frozen=True)
class ChannelStatistics:
    """Scales and means of one layer's keys or values, frozen once taken.

    Attributes:
        scale: (batch, heads, 1, d), or (batch, heads, 1, 1) where channels are not equalised,
            float32, positive. In units such that |x / scale| is 1 in the quadratic mean of the
            first block, which lets 16-bit scales hold vectors of any unit.
        mean: (batch, heads, 1, d) float32, or None.
        hessian: what errors of u cost, for every row and head; None if nothing is known of who
            reads the vectors. With `rope`, what they cost at position 0: see `hessian_at`.
        rope: how RoPE turns the vectors, (batch, 1, 1, r); nothing in rows that it does not fit.
            None if that is not known.
        needs_wide: whether keys like these are spoilt by few bits: see `quant.wide`.
    """

    scale: Tensor
    mean: Tensor | None = None
    hessian: LowRankHessian | None = None
    rope: Rope | None = None
    needs_wide: bool = False

    @classmethod
    def of_block(
        cls,
        x: Tensor | Measured,
        power: float,
        center: bool | str = False,
        rope_layout: str = "none",
        rope: Rope | None = None,
        positions: range | Tensor | None = None,
    ) -> ChannelStatistics:
        """Take the statistics of a block of vectors.

        Args:
            x: (batch, heads, tokens, d), at least one token; of many a sample is looked at. Or what
                is measured of them.
            power: scale_c is proportional to rms_c^power; 0 is one scale for all channels.
            center: True takes the means of all channels, "auto" only of offset channels (see
                `_offset_channels`), False none.
            rope_layout: "half", "interleaved" or "none": the channels that RoPE turns together.
                They share a scale, as their energy moves to and fro, and are centred together.
            rope: how RoPE has turned the vectors by their model's config, if that is known.
            positions: where in the text they are; needed for `rope`. A range, or (tokens,), of
                which the host has to ask a GPU for the last.
        """
        unit, peak, mean, energy, total = x if isinstance(x, Measured) else Measured.of(x)
        if rope is not None and positions is not None:
            places = sampled_positions(positions, SAMPLED_TOKENS, unit.device)
            before = rope.turn(unit, -places).mean(dim=2, keepdim=True)
            is_turned = _is_turned(before, mean, total)
            if center is True:
                spread = rope.spread(before, (fitted_length(positions),))
                mean = torch.where(is_turned, spread, mean)
            rope = rope.where(is_turned)
        if center == "auto":
            mean = mean * _offset_channels(energy, mean, rope_layout)
        center_point = mean * peak if center else None
        if power == 0:
            return cls(total.sqrt() * peak, center_point, rope=rope)
        # The scales are those of the uncentred energy: RoPE may turn a constant later, and a
        # scale taken from the small spread around it would let it drown the head then.
        shared = _share_pairs(energy, rope_layout)
        square = shared.clamp(min=total * (MIN_RMS**2 / energy.shape[-1])) ** power
        coded = _or_one((energy / square).sum(dim=-1, keepdim=True))  # energy of x / scale
        return cls((square * coded).sqrt() * peak, center_point, rope=rope)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that files give them; the scale is called "weight"."""
        named = {
            "weight": self.scale,
            "mean": self.mean,
            "hessian": None if self.hessian is None else self.hessian.factor,
            "frequencies": None if self.rope is None else self.rope.frequencies,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of_tensors(
        cls, named: dict[str, Tensor], rope_layout: str, needs_wide: bool = False
    ) -> ChannelStatistics:
        """The inverse of `tensors`; `needs_wide` is no tensor."""
        factor, frequencies = named.get("hessian"), named.get("frequencies")
        return cls(
            named["weight"],
            named.get("mean"),
            None if factor is None else LowRankHessian(factor),
            None if frequencies is None else Rope(frequencies, rope_layout),
            needs_wide,
        )

    def check(self, batch: int, heads: int, d: int) -> None:
        """Raise ValueError unless the tensors are those of vectors (batch, heads, tokens, d)."""
        one = self.scale.shape[-1:] == (1,)  # scale for all channels
        right = {
            "weight": ((batch, heads, 1, 1 if one else d), torch.float32),
            "mean": ((batch, heads, 1, d), torch.float32),
            "hessian": ((batch, heads, d, RANK), torch.float16),
        }
        if self.rope is not None:
            right["frequencies"] = ((batch, 1, 1, min(self.rope.channels, d) // 2), torch.float32)
        for name, x in self.tensors().items():
            if (tuple(x.shape), x.dtype) != right[name]:
                raise ValueError(
                    f"{name} of the statistics is {tuple(x.shape)}, {x.dtype}, which for {heads} "
                    f"heads of {d} elements, {batch} rows of them, has to be {right[name]}"
                )

    def normalize(self, x: Tensor) -> Tensor:
        """u = (x - mean) / scale of vectors (batch, heads, tokens, d), float32."""
        x = x.float()
        return (x if self.mean is None else x - self.mean) / self.scale

    def denormalize(self, u: Tensor) -> Tensor:
        """x = u * scale + mean of vectors (batch, heads, tokens, d)."""
        x = u * self.scale
        return x if self.mean is None else x + self.mean

    def read_by(self, queries: QueryMoment, rope: Rope | None = None) -> ChannelStatistics:
        """The same, with the Hessian of vectors that are read by queries of this moment.

        Args:
            queries: theirs.
            rope: as given to `of_block`: one that layers share, which saves work.
        """
        moment = queries.mean
        if self.rope is not None and queries.pre_rope is not None:
            later = (rope or self.rope).spread_moment(queries.pre_rope, READ_AFTER)
            moment = torch.where(self.rope.turns, later, moment)
        # In float64, for the square of a scale may leave float32.
        scale = doubled(self._channel_scales(moment.shape[-1]))
        hessian = LowRankHessian.of(scale.mT * queries.shrunk(moment) * scale)
        return replace(self, hessian=hessian.map(lambda x: x.to(self.scale.device)))

    @property
    def turns(self) -> bool:
        """Whether errors cost something else at other positions."""
        return self.hessian is not None and self.rope is not None

    def hessian_at(self, position: int) -> LowRankHessian | None:
        """What errors of u cost in the segment of a position: turned there along with the keys."""
        if self.hessian is None or self.rope is None:
            return self.hessian
        return self.hessians_from(position, 1).map(lambda x: x[0])

    def hessians_from(self, position: int, count: int) -> LowRankHessian:
        """`hessian_at` of a position and of the next segments, along a first axis, if any turns."""
        assert self.hessian is not None
        assert self.rope is not None
        factor = self.hessian.factor
        scale = self._channel_scales(factor.shape[-2])
        # The factor's columns are directions of queries, in units of the scales.
        rows = factor.mT / scale
        middles = middles_of_segments(position, count, factor.device)
        # (count, batch, heads, d, RANK)
        turned = (self.rope.turn(rows, middles) * scale).mT
        norm, before = (
            torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
            for x in (turned, factor)
        )
        # Of the same strength: unequal scales of a pair would change it.
        return LowRankHessian((turned * (before / _or_one(norm))).half())

    def _channel_scales(self, d: int) -> Tensor:
        """The scale of every channel, (batch, heads, 1, d)."""
        return self.scale.expand(*self.scale.shape[:3], d)

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChannelStatistics:
        """The same with `fn` applied to every tensor (a batch selection, a move to a device)."""
        return ChannelStatistics(
            fn(self.scale),
            None if self.mean is None else fn(self.mean),
            None if self.hessian is None else self.hessian.map(fn),
            None if self.rope is None else self.rope.map(fn),
            self.needs_wide,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors().values())


def fitted_length(positions: range | Tensor) -> int:
    """Up to where in the text a mean of keys from these positions is to fit."""
    if isinstance(positions, range):
        last = positions[last_sampled(len(positions), SAMPLED_TOKENS)]
    else:
        last = int(sampled(positions, SAMPLED_TOKENS, axis=0).max())
    return max(last, _HORIZON)


def middle_of_segment(position: int) -> int:
    """Where in the text the middle of a position's segment is, to which its Hessian is turned."""
    return position // SEGMENT * SEGMENT + SEGMENT // 2


def middles_of_segments(position: int, count: int, device: torch.device) -> Tensor:
    """`middle_of_segment` of a position, and of the next segments: (count, 1, 1, 1)."""
    first = middle_of_segment(position)
    last = first + (count - 1) * SEGMENT
    return torch.arange(first, last + 1, SEGMENT, device=device).view(-1, 1, 1, 1)


def _or_one(x: Tensor) -> Tensor:
    """x, of which none is negative, and 1 where it is 0."""
    return torch.nn.functional.threshold(x, 0.0, 1.0)


def _is_turned(before: Tensor, mean: Tensor, total: Tensor) -> Tensor:
    """Whether RoPE turned the rows so that `before` is their mean before it, (batch, 1, 1, 1).

    Turned back rightly, keys agree with each other at least as well as they do turned; turned by
    angles that are not theirs, hardly. `total` is the energy of the heads, (batch, heads, 1, 1).
    """
    excess = torch.addcmul(before.square(), mean, mean, value=-TURNS)
    return (excess / total).sum(dim=(1, 3), keepdim=True) >= 0


def _offset_channels(energy: Tensor, mean: Tensor, rope_layout: str) -> Tensor:
    """Which channels hold a large constant, (batch, heads, 1, d), 1 or 0.

    Key biases (Qwen2) make channels of a hundred times the others' size whose values hardly
    vary. Coded as they are, they drown the head; their constant is better taken out. Ordinary
    channels are left alone: the mean of a short block is noise where RoPE turns them.
    """
    energy, constant = _share_pairs(energy, rope_layout), _share_pairs(mean.square(), rope_layout)
    median = energy.median(dim=-1, keepdim=True).values
    large = energy > OFFSET_ENERGY * median
    return (large & (constant > OFFSET_SHARE * energy)).float()


def _share_pairs(energy: Tensor, rope_layout: str) -> Tensor:
    """Give both channels of a RoPE pair the mean of their energies, (..., d).

    RoPE turns the pair by an angle that grows with the position: what is in one channel of a
    token is in the other of a later token. A scale of its own for each would fit the first block
    only.
    """
    d = energy.shape[-1]
    if rope_layout == "none" or d % 2:
        return energy
    if rope_layout not in ("half", "interleaved"):
        raise ValueError(f"rope_layout is {rope_layout!r}; choose half, interleaved or none")
    if rope_layout == "half":
        pairs = energy.unflatten(-1, (2, d // 2)).mean(dim=-2, keepdim=True)  # (..., 1, d / 2)
        return pairs.expand(*pairs.shape[:-2], 2, d // 2).flatten(-2)
    pairs = energy.unflatten(-1, (d // 2, 2)).mean(dim=-1, keepdim=True)  # (..., d / 2, 1)
    return pairs.expand(*pairs.shape[:-1], 2).flatten(-2)
