"""Vectors to quantise: the harmless kind, and the kinds that defeat a rotation that mixes little.

Every entry of `DISTRIBUTIONS` draws (n, d) float32 vectors from a seed; the seed also draws
which channels stand out.
"""

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + seed)


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    """Independent N(0, 1) coordinates: even no rotation at all does well."""
    return torch.randn(n, d, generator=_generator(seed))


def one_hot(n: int, d: int, seed: int = 0) -> Tensor:
    """All the energy of a vector in one random coordinate."""
    return torch.eye(d)[torch.randint(0, d, (n,), generator=_generator(seed))]


def two_outlier_channels(n: int, d: int, seed: int = 0) -> Tensor:
    """Gaussian with two channels 20 times as large."""
    x, channels = gaussian(n, d, seed), torch.randperm(d, generator=_generator(seed))
    x[:, channels[:2]] *= 20
    return x


def six_offset_channels(n: int, d: int, seed: int = 0) -> Tensor:
    """Gaussian with a constant of 20 on six channels, as a bias of k_proj makes them."""
    x, channels = gaussian(n, d, seed), torch.randperm(d, generator=_generator(seed))
    x[:, channels[:6]] += 20
    return x


def log_normal_channels(n: int, d: int, seed: int = 0) -> Tensor:
    """Gaussian with channel scales exp(2 g), g ~ N(0, 1)."""
    return gaussian(n, d, seed) * (2 * torch.randn(d, generator=_generator(seed + 500))).exp()


DISTRIBUTIONS = {
    f.__name__: f
    for f in (gaussian, one_hot, two_outlier_channels, six_offset_channels, log_normal_channels)
}


def relative_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """|x - x_hat|^2 / |x|^2 of each vector (..., d), in float64: (...)."""
    x, x_hat = x.double(), x_hat.double()
    return (x - x_hat).square().sum(dim=-1) / x.square().sum(dim=-1)
