"""Queries, keys and values that RoPE has turned, and statistics of them beside their references."""

from __future__ import annotations

import torch
from torch import Tensor

from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.rope import Rope

BATCH, HEADS, FIRST = 2, 3, 70


def make_rope(
    pairs: int, layout: str = "half", batch: int = 1, device: torch.device | str = "cpu"
) -> Rope:
    """For a batch, other angles in every row."""
    frequencies = 5000.0 ** (-torch.arange(pairs, device=device) / pairs)
    rows = 1 + torch.arange(batch, device=device).view(-1, 1, 1, 1)
    return Rope(frequencies / rows, layout)


def states(
    n: int,
    d: int,
    heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(BATCH, heads, n, d), tokens before heads: channels of several sizes around a mean."""
    generator = torch.Generator().manual_seed(n + d)
    channels = torch.randn(d, generator=generator).exp()
    mean = torch.randn(heads, d, generator=generator)
    x = torch.randn(BATCH, n, heads, d, generator=generator) * channels + 2 * mean
    return x.to(device, dtype).transpose(1, 2)


def turned(x: Tensor, rope: Rope) -> tuple[Tensor, range]:
    """The vectors at positions from FIRST on, in their dtype and order of axes; the positions."""
    positions = range(FIRST, FIRST + x.shape[2])
    at = rope.turn(x, torch.tensor(list(positions), device=x.device)).to(x.dtype)
    return at.transpose(1, 2).contiguous().transpose(1, 2), positions


def exact_moment(query: Tensor, heads: int) -> Tensor:
    """The mean of q q' of each kv head, in float64."""
    batch, query_heads, n, d = query.shape
    rows = query.double().reshape(batch, heads, query_heads // heads * n, d)
    return rows.mT @ rows / rows.shape[2]


def assert_moment(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The same to a share of a head's largest."""
    assert (found.dtype, found.shape) == (torch.float32, wanted.shape)
    largest = wanted.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[..., None, None]
    assert ((found - wanted).abs() <= tolerance * largest).all()


def assert_hessian(found: LowRankHessian, wanted: LowRankHessian, tolerance: float) -> None:
    """The same but for float16 and float32 sums."""
    assert found.factor.dtype == torch.float16
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.factor.float(), wanted.factor.float(), **near)
    torch.testing.assert_close(found.matrix(), wanted.matrix(), **near)


def assert_statistics(found: ChannelStatistics, wanted: ChannelStatistics) -> None:
    """The same but for float32 sums; a mean to that share of the largest entry of a head."""
    a, b = found.tensors(), wanted.tensors()
    assert {name: (x.shape, x.dtype) for name, x in a.items()} == {
        name: (x.shape, x.dtype) for name, x in b.items()
    }
    torch.testing.assert_close(found.scale, wanted.scale, rtol=2e-5, atol=0)
    if wanted.mean is not None:
        near = 1e-5 * wanted.scale.amax(dim=-1, keepdim=True) * wanted.mean.shape[-1]
        assert ((found.mean - wanted.mean).abs() <= near).all()
    if wanted.rope is not None:
        assert torch.equal(a["frequencies"], b["frequencies"])
