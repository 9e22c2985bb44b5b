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

import torch
from torch import Tensor

from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import sampled

SEGMENT = 1024
"""Tokens of a text that are coded with the same Hessian: positions 0 ... 1023, 1024 ..., and so on.
On SmolLM2, 256 of them are no better."""

_SAMPLE = 2048  # tokens

_HORIZON = 2048
"""Positions that the mean of keys is to fit at least; more if it is taken from further on. (8192
are better after position 4096, but cost a third of the quality at the beginning.)"""

_READ_AFTER = (512, 2048)
"""How long after a segment's keys the queries come that read them: half up to either."""

_TURNS = 0.98
"""Keys are taken to be turned as their model's config says if their mean before RoPE is at least
this share of their mean after it, in energy. In layers of SmolLM2, Gemma 3 and Qwen2.5 it is 1.00
to 1.96 times that; with wrong pairs of channels 0.13 to 0.99."""

# A channel's rms counts as at least this share of the head's: a channel that is silent in the
# first block may speak later, and would then be blown up by the division.
_MIN_RMS = 0.02

# A channel is an offset channel if its energy is this many times the head's median and nearly all
# of it is in the mean (measured on the first block, of 32 tokens or more).
_OFFSET_ENERGY = 25.0
_OFFSET_SHARE = 0.999


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
    """

    scale: Tensor
    mean: Tensor | None = None
    hessian: LowRankHessian | None = None
    rope: Rope | None = None

    @classmethod
    def of_block(
        cls,
        x: Tensor,
        power: float,
        center: bool | str = False,
        rope_layout: str = "none",
        rope: Rope | None = None,
        positions: Tensor | None = None,
    ) -> ChannelStatistics:
        """Take the statistics of a block of vectors.

        Args:
            x: (batch, heads, tokens, d), at least one token; of many a sample is looked at.
            power: scale_c is proportional to rms_c^power; 0 is one scale for all channels.
            center: True takes the means of all channels, "auto" only of offset channels (see
                `_offset_channels`), False none.
            rope_layout: "half", "interleaved" or "none": the channels that RoPE turns together.
                They share a scale, as their energy moves to and fro, and are centred together.
            rope: how RoPE has turned the vectors by their model's config, if that is known.
            positions: (tokens,), where in the text they are; needed for `rope`.
        """
        if rope is not None and positions is not None:
            positions = sampled(positions, _SAMPLE, axis=0)
        x = sampled(x, _SAMPLE)
        # The largest entry is taken out first: squares of 1e-30 or 1e30 leave float32.
        peak = torch.linalg.vector_norm(x, ord=math.inf, dim=(2, 3), keepdim=True).float()
        peak = _or_one(peak)
        # The scales are those of the uncentred energy: RoPE may turn a constant later, and a
        # scale taken from the small spread around it would let it drown the head then.
        x = x.float() / peak
        energy, mean = x.square().mean(dim=2, keepdim=True), x.mean(dim=2, keepdim=True)
        total = _or_one(energy.sum(dim=-1, keepdim=True))
        if rope is not None and positions is not None:
            before = rope.turn(x, -positions).mean(dim=2, keepdim=True)
            rope = rope.where(_is_turned(before, mean, total))
            if center is True:
                horizon = positions.max().clamp(min=_HORIZON)
                mean = torch.where(rope.turns, rope.spread(before, (horizon,)), mean)
        if center == "auto":
            mean = mean * _offset_channels(energy, mean, rope_layout)
        center_point = mean * peak if center else None
        if power == 0:
            return cls(total.sqrt() * peak, center_point, rope=rope)
        shared = _share_pairs(energy, rope_layout)
        scale = shared.clamp(min=_MIN_RMS**2 * total / x.shape[-1]) ** (power / 2)
        unit = _or_one((energy / scale.square()).sum(dim=-1, keepdim=True).sqrt())
        return cls(scale * unit * peak, center_point, rope=rope)

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
    def of_tensors(cls, named: dict[str, Tensor], rope_layout: str) -> ChannelStatistics:
        """The inverse of `tensors`."""
        factor, frequencies = named.get("hessian"), named.get("frequencies")
        return cls(
            named["weight"],
            named.get("mean"),
            None if factor is None else LowRankHessian(factor),
            None if frequencies is None else Rope(frequencies, rope_layout),
        )

    def normalize(self, x: Tensor) -> Tensor:
        """u = (x - mean) / scale of vectors (batch, heads, tokens, d), float32."""
        x = x.float()
        return (x if self.mean is None else x - self.mean) / self.scale

    def denormalize(self, u: Tensor) -> Tensor:
        """x = u * scale + mean of vectors (batch, heads, tokens, d)."""
        x = u * self.scale
        return x if self.mean is None else x + self.mean

    def read_by(self, queries: QueryMoment) -> ChannelStatistics:
        """The same, with the Hessian of vectors that are read by queries of this moment."""
        queries = queries.shrunk()
        moment = queries.mean
        if self.rope is not None and queries.pre_rope is not None:
            later = self.rope.spread_moment(queries.pre_rope, _READ_AFTER)
            moment = torch.where(self.rope.turns, later, moment)
        scale = self._channel_scales(moment.shape[-1])
        scale = scale / scale.amax(dim=-1, keepdim=True)  # its square may leave float32
        return replace(self, hessian=LowRankHessian.of(scale.mT * moment * scale))

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
        factor = self.hessian.factor.float()
        scale = self._channel_scales(factor.shape[-2])
        # The factor's columns are directions of queries, in units of the scales.
        rows = (factor.mT / scale).repeat(1, 1, count, 1)
        segments = torch.arange(count, device=factor.device) + position // SEGMENT
        middles = segments.repeat_interleave(factor.shape[-1]) * SEGMENT + SEGMENT // 2
        turned = (self.rope.turn(rows, middles) * scale).unflatten(2, (count, -1))
        turned = turned.movedim(2, 0).mT
        strength, before = (x.square().sum(dim=(-2, -1), keepdim=True) for x in (turned, factor))
        # Of the same strength: unequal scales of a pair would change it.
        ratio = before / _or_one(strength)
        return LowRankHessian((turned * ratio.sqrt()).half())

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
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors().values())


def _or_one(x: Tensor) -> Tensor:
    """x, and 1 where x is not positive."""
    return torch.where(x > 0, x, 1.0)


def _is_turned(before: Tensor, mean: Tensor, total: Tensor) -> Tensor:
    """Whether RoPE turned the rows so that `before` is their mean before it, (batch, 1, 1, 1).

    Turned back rightly, keys agree with each other at least as well as they do turned; turned by
    angles that are not theirs, hardly. `total` is the energy of the heads, (batch, heads, 1, 1).
    """
    energies = torch.stack((before, mean)).square().sum(dim=-1, keepdim=True)
    shares = (energies / total).sum(dim=2, keepdim=True)
    return shares[0] >= _TURNS * shares[1]


def _offset_channels(energy: Tensor, mean: Tensor, rope_layout: str) -> Tensor:
    """Which channels hold a large constant, (batch, heads, 1, d), 1 or 0.

    Key biases (Qwen2) make channels of a hundred times the others' size whose values hardly
    vary. Coded as they are, they drown the head; their constant is better taken out. Ordinary
    channels are left alone: the mean of a short block is noise where RoPE turns them.
    """
    energy, constant = _share_pairs(energy, rope_layout), _share_pairs(mean.square(), rope_layout)
    median = energy.median(dim=-1, keepdim=True).values
    large = energy > _OFFSET_ENERGY * median
    return (large & (constant > _OFFSET_SHARE * energy)).float()


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
