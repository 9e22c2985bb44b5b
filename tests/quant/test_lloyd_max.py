"""Lloyd-Max codebooks: published figures, and the conditions of optimality by quadrature."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from rotorquant_hf.quant.lloyd_max import LloydMaxCodebook, nearest

ALL_BITS = range(1, 9)


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def unit(bits):
    """The codebook for N(0, 1)."""
    return LloydMaxCodebook.for_dimension(1, bits)


def cells(codebook):
    """(low border, high border, centroid) of every cell; the tails end at 12 sigma."""
    borders = [-12.0, *codebook.boundaries.tolist(), 12.0]
    return list(zip(borders[:-1], borders[1:], codebook.centroids.tolist(), strict=True))


def integral(f, low, high):
    return quad(f, low, high, epsabs=1e-14, epsrel=1e-10)[0]


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.36338), (2, 0.11748), (3, 0.03455), (4, 0.00950)]
)
def test_distortion_is_the_published_one(bits, distortion):
    assert round(unit(bits).distortion, 5) == distortion


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.7979]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_centroids_are_those_of_max_1960(bits, positive):
    centroids = unit(bits).centroids
    expected = torch.tensor([-c for c in reversed(positive)] + positive, dtype=torch.float64)
    assert (centroids - expected).abs().max() < 6e-4  # printed with 4 digits


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_centroid_is_the_mean_of_its_cell(bits):
    for low, high, centroid in cells(unit(bits)):
        mass = integral(density, low, high)
        moment = integral(lambda x: x * density(x), low, high)
        assert centroid == pytest.approx(moment / mass, abs=1e-6)


@pytest.mark.parametrize("make", [LloydMaxCodebook.for_dimension, LloydMaxCodebook.of_integers])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_distortion_is_the_integral_of_the_squared_error(bits, make):
    codebook = make(1, bits)
    total = sum(
        integral(lambda x, c=c: (x - c) ** 2 * density(x), low, high)
        for low, high, c in cells(codebook)
    )
    assert codebook.distortion == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize(("bits", "excess"), [(1, 1e-12), (2, 6e-7), (3, 2.5e-5), (4, 6e-4)])
def test_centroids_of_integers_cost_next_to_nothing(bits, excess):
    """Of an 8-bit integer each, in steps of which the distortion is the least."""
    exact, rounded = unit(bits), LloydMaxCodebook.of_integers(1, bits)
    integers = rounded.centroids / rounded.unit
    torch.testing.assert_close(integers, integers.round(), rtol=1e-14, atol=0)
    assert 64 <= integers.max() < 127.5
    assert (rounded.centroids - exact.centroids).abs().max() <= rounded.unit / 2
    assert exact.distortion <= rounded.distortion + 1e-15 < exact.distortion * (1 + excess)
    many = LloydMaxCodebook.of_integers(128, bits)
    torch.testing.assert_close(many.centroids * math.sqrt(128), rounded.centroids)
    assert many.unit == pytest.approx(rounded.unit / math.sqrt(128))


@pytest.mark.parametrize("bits", [5, 8])
def test_many_centroids_stay_exact(bits):
    rounded = LloydMaxCodebook.of_integers(64, bits)
    assert rounded.unit is None
    assert torch.equal(rounded.centroids, LloydMaxCodebook.for_dimension(64, bits).centroids)


@pytest.mark.parametrize("make", [LloydMaxCodebook.for_dimension, LloydMaxCodebook.of_integers])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_centroids_ascend_and_are_symmetric_and_borders_lie_halfway(bits, make):
    codebook = make(1, bits)
    assert codebook.bits == bits
    assert codebook.centroids.dtype == torch.float64
    assert codebook.centroids.shape == (2**bits,)
    assert (codebook.centroids.diff() > 0).all()
    assert torch.equal(codebook.centroids, -codebook.centroids.flip(0))
    halfway = (codebook.centroids[1:] + codebook.centroids[:-1]) / 2
    torch.testing.assert_close(codebook.boundaries, halfway, rtol=0, atol=1e-15)


def test_each_bit_lowers_the_distortion_towards_a_factor_of_four():
    distortions = [unit(bits).distortion for bits in ALL_BITS]
    factors = [a / b for a, b in itertools.pairwise(distortions)]
    assert factors == sorted(factors)
    assert factors[0] > 3
    assert factors[-1] < 4


@pytest.mark.parametrize("d", [64, 128, 576])
def test_codebooks_scale_with_the_root_of_the_dimension(d):
    one, many = unit(3), LloydMaxCodebook.for_dimension(d, 3)
    torch.testing.assert_close(many.centroids * math.sqrt(d), one.centroids)
    torch.testing.assert_close(many.boundaries * math.sqrt(d), one.boundaries)
    assert many.distortion == one.distortion


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 2.0, "3", None], ids=repr)
def test_impossible_bits_are_refused(bits):
    unit(2)  # an equal number that is already solved does not let 2.0 through
    with pytest.raises(ValueError, match=f"bits is {bits!r}"):
        LloydMaxCodebook.for_dimension(128, bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(7,), (3, 40_000)], ids=["few", "many"])
def test_the_nearest_centroid(bits, shape):
    """By comparing with all of them; in the middle between two, the lower one."""
    codebook = LloydMaxCodebook.for_dimension(64, bits)
    centroids, boundaries = codebook.centroids.float(), codebook.boundaries.float()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) / 8
    x.flatten()[: min(7, len(boundaries))] = boundaries[:7]
    found = nearest(x, boundaries)
    assert found.dtype == torch.int32
    distance = (x.double().unsqueeze(-1) - centroids.double()).abs()
    torch.testing.assert_close(
        (x - centroids[found]).abs().double(), distance.amin(dim=-1), rtol=0, atol=1e-7
    )
    assert torch.equal(found, torch.bucketize(x, boundaries, out_int32=True))
