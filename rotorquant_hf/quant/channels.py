"""Per-channel statistics: equalisation and centring of vectors before they are coded.

A vector x is coded as u = (x - mean) / scale and read back as x_hat = u_hat * scale + mean.
Neither costs anything in the loop over tokens:

    <q, x_hat> = <q * scale, u_hat> + <q, mean>        sum_t p_t x_hat_t =
                                                        (sum_t p_t u_hat_t) * scale + mean

Why equalise: a rotation spreads the energy of the large channels over all, and with it their
error. The error of a score is q . (scale * eps), of variance ~ |q scale|^2 |x / scale|^2, which
is smallest for scale_c^2 = |x_c| / |q_c|; for queries of unknown direction that is
scale_c = rms_c^(1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.tiles import sampled, token_tiles

_SAMPLE = 2048  # tokens

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
            reads the vectors.
    """

    scale: Tensor
    mean: Tensor | None = None
    hessian: LowRankHessian | None = None

    @classmethod
    def of_block(
        cls, x: Tensor, power: float, center: bool | str = False, rope_layout: str = "none"
    ) -> ChannelStatistics:
        """Take the statistics of a block of vectors.

        Args:
            x: (batch, heads, tokens, d), at least one token; of many a sample is looked at.
            power: scale_c is proportional to rms_c^power; 0 is one scale for all channels.
            center: True takes the means of all channels, "auto" only of offset channels (see
                `_offset_channels`), False none.
            rope_layout: "half", "interleaved" or "none": the channels that RoPE turns together.
                They share a scale, as their energy moves to and fro, and are centred together.
        """
        x = sampled(x, _SAMPLE)
        # The largest entry is taken out first: squares of 1e-30 or 1e30 leave float32.
        peak = torch.linalg.vector_norm(x, ord=math.inf, dim=(2, 3), keepdim=True).float()
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        # The scales are those of the uncentred energy: RoPE may turn a constant later, and a
        # scale taken from the small spread around it would let it drown the head then.
        energy, mean = _moments(x, peak)
        if center == "auto":
            mean = mean * _offset_channels(energy, mean, rope_layout)
        total = energy.sum(dim=-1, keepdim=True)
        total = torch.where(total > 0, total, torch.ones_like(total))
        center_point = mean * peak if center else None
        if power == 0:
            return cls(total.sqrt() * peak, center_point)
        shared = _share_pairs(energy, rope_layout)
        scale = shared.clamp(min=_MIN_RMS**2 * total / x.shape[-1]) ** (power / 2)
        unit = (energy / scale.square()).sum(dim=-1, keepdim=True).sqrt()
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        return cls(scale * unit * peak, center_point)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names that files give them; the scale is called "weight"."""
        named = {
            "weight": self.scale,
            "mean": self.mean,
            "hessian": None if self.hessian is None else self.hessian.factor,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor]) -> ChannelStatistics:
        """The inverse of `tensors`."""
        factor = named.get("hessian")
        hessian = None if factor is None else LowRankHessian(factor)
        return cls(named["weight"], named.get("mean"), hessian)

    def normalize(self, x: Tensor) -> Tensor:
        """u = (x - mean) / scale of vectors (batch, heads, tokens, d), float32."""
        x = x.float()
        return (x if self.mean is None else x - self.mean) / self.scale

    def denormalize(self, u: Tensor) -> Tensor:
        """x = u * scale + mean of vectors (batch, heads, tokens, d)."""
        x = u * self.scale
        return x if self.mean is None else x + self.mean

    def read_by(self, moment: Tensor) -> ChannelStatistics:
        """The same, with the Hessian of vectors that are read by queries.

        Args:
            moment: (batch, heads, d, d), the second moment of the queries.
        """
        scale = self.scale.expand(*self.scale.shape[:3], moment.shape[-1])
        return replace(self, hessian=LowRankHessian.of(scale.mT * moment * scale))

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChannelStatistics:
        """The same with `fn` applied to every tensor (a batch selection, a move to a device)."""
        return ChannelStatistics(
            fn(self.scale),
            None if self.mean is None else fn(self.mean),
            None if self.hessian is None else self.hessian.map(fn),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in (self.scale, self.mean, self.hessian) if x is not None)


def _moments(x: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square and mean of x / peak over the tokens, (batch, heads, 1, d) float32 each."""
    batch, heads, tokens, d = x.shape
    energy = torch.zeros(batch, heads, 1, d, device=x.device)
    mean = torch.zeros_like(energy)
    for tile in token_tiles(tokens, batch * heads * d):
        part = x[:, :, tile].float() / peak
        energy += part.square().sum(dim=2, keepdim=True)
        mean += part.sum(dim=2, keepdim=True)
    return energy / tokens, mean / tokens


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
