"""Query-aware rounding against the sweep spelt out in float64, and for what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotorquant_hf.quant import SCALES, LloydMaxCodebook, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.rounding import feedback, regularised, round_with_feedback


def hessian(d: int, rank: int = 4, seed: int = 0) -> Tensor:
    """The second moment of queries that mostly look along a few directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(400, d, generator=generator, dtype=torch.float64) * 0.1
    queries[:, :rank] += torch.randn(400, rank, generator=generator, dtype=torch.float64) * 3
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    queries = queries @ turn
    return queries.mT @ queries


def vectors(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def spelt_out(w: Tensor, centroids: Tensor, h: Tensor) -> Tensor:
    """The sweep as its papers write it, one vector and one coordinate at a time, in float64."""
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rows = []
    for row in w.double():
        row, chosen = row.clone(), []
        for i in range(len(row)):
            index = int((row[i] - centroids.double()).abs().argmin())
            chosen.append(index)
            error = (row[i] - centroids[index].double()) / upper[i, i]
            row[i + 1 :] -= error * upper[i, i + 1 :]
        rows.append(chosen)
    return torch.tensor(rows, dtype=torch.int32)


def error(w: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    e = (w - rounded).double()
    return ((e @ h) * e).sum(dim=-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("d", [8, 16, 40, 64, 80])
def test_it_is_the_sweep_of_the_papers(d: int, bits: int) -> None:
    """Also where the last block of columns is not full. One code in a thousand may differ: a
    coordinate that lies between two centroids to the last bit of float32."""
    book = LloydMaxCodebook.for_dimension(d, bits)
    centroids, boundaries = book.centroids.float(), book.boundaries.float()
    h = hessian(d)
    h = h / h.diagonal().mean() + 0.03 * torch.eye(d)
    w = vectors(60, d)
    codes = round_with_feedback(w, centroids, boundaries, feedback(h))
    same = (codes == spelt_out(w, centroids, h)).all(dim=-1)
    assert same.float().mean() > 0.95


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_along_the_queries_falls(bits: int) -> None:
    d = 64
    book = LloydMaxCodebook.for_dimension(d, bits)
    centroids, boundaries = book.centroids.float(), book.boundaries.float()
    h, w = hessian(d), vectors(500, d)
    nearest = centroids[torch.bucketize(w, boundaries)]
    rounded = centroids[round_with_feedback(w, centroids, boundaries, feedback(regularised(h)))]
    assert error(w, rounded, h).mean() < 0.25 * error(w, nearest, h).mean()
    # The error is moved, not removed: without preference nearest rounding is the best there is.
    assert (w - rounded).square().sum() > (w - nearest).square().sum()


def test_no_preference_is_nearest_rounding() -> None:
    book = LloydMaxCodebook.for_dimension(64, 3)
    centroids, boundaries = book.centroids.float(), book.boundaries.float()
    w = vectors(100, 64)
    for h in (torch.eye(64), 1e30 * torch.eye(64), torch.zeros(64, 64)):
        codes = round_with_feedback(w, centroids, boundaries, feedback(regularised(h)))
        assert torch.equal(codes, torch.bucketize(w, boundaries, out_int32=True))


def test_heads_have_hessians_of_their_own() -> None:
    d = 32
    book = LloydMaxCodebook.for_dimension(d, 3)
    tables = book.centroids.float(), book.boundaries.float()
    h = torch.stack([hessian(d, seed=seed) for seed in range(6)]).view(2, 3, d, d)
    w = vectors(6 * 10, d).view(2, 3, 10, d)
    codes = round_with_feedback(w, *tables, feedback(h))
    for row in range(2):
        for head in range(3):
            alone = round_with_feedback(w[row, head], *tables, feedback(h[row, head]))
            assert torch.equal(codes[row, head], alone)


@given(scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]), rank=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_the_hessian_does_not_matter(scale: float, rank: int) -> None:
    """Nor that it is singular: fewer queries than channels."""
    queries = torch.randn(rank, 24, generator=torch.Generator().manual_seed(rank))
    h = queries.double().mT @ queries.double()
    torch.testing.assert_close(feedback(regularised(h * scale)), feedback(regularised(h)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_what_is_no_second_moment_is_refused(bad: float) -> None:
    h = torch.eye(16)
    h[3, 3] = bad if bad != -1.0 else -5.0
    with pytest.raises(ValueError, match="second moments of queries"):
        feedback(regularised(h))
    with pytest.raises(ValueError, match="second moments of queries"):
        RotorQuantMSE(16, 3).quantize(torch.randn(4, 16), h)


def test_it_changes_nothing_it_was_given() -> None:
    book = LloydMaxCodebook.for_dimension(32, 3)
    w, factor = vectors(10, 32), feedback(hessian(32))
    before = w.clone(), factor.clone()
    round_with_feedback(w, book.centroids.float(), book.boundaries.float(), factor)
    assert torch.equal(w, before[0])
    assert torch.equal(factor, before[1])


def keys(n: int = 300, d: int = 64) -> Tensor:
    """Vectors of very different channels and a few sinks, as keys are."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, d, generator=generator) * torch.logspace(-1, 1, d)
    x[:3] *= 20
    x[10] = 0
    return x


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", SCALES)
def test_no_vector_has_a_larger_error_than_without(bits: int, scale: str) -> None:
    """Under the Hessian with its ridge; up to the rounding of a stored scale."""
    x, h = keys(), hessian(64)
    quantizer = RotorQuantMSE(64, bits, scale=scale)
    metric = regularised(h).double()
    plain, aware = (
        error(x.double(), quantizer(x)[0].double(), metric),
        error(
            x.double(), quantizer.rotation.unrotate(quantizer.quantize(x, h)[0]).double(), metric
        ),
    )
    assert (aware <= plain * (1 + 1e-4) + 1e-9).all()
    if scale == "least_squares":
        assert aware.sum() < 0.5 * plain.sum()


def test_without_a_hessian_nothing_changes() -> None:
    """The codes of a cache that was saved before there were Hessians."""
    x = keys()
    quantizer = RotorQuantMSE(64, 3)
    first = quantizer.quantize(x)[1]
    again = quantizer.quantize(x, None)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    even = quantizer.quantize(x, torch.eye(64))[1]
    assert torch.equal(first["codes"], even["codes"])
    torch.testing.assert_close(first["scale"], even["scale"], rtol=1e-5, atol=0)


def test_unbiased_scales_do_not_shrink() -> None:
    x, h = keys(), hessian(64)
    quantizer = RotorQuantMSE(64, 3, scale="unbiased")
    x_hat = quantizer.rotation.unrotate(quantizer.quantize(x, h)[0])
    energy = x.square().sum(dim=-1)
    torch.testing.assert_close((x * x_hat).sum(dim=-1), energy, rtol=1e-4, atol=0)


def test_prod_stays_unbiased() -> None:
    """The mean over seeds of the estimate is the inner product, along the queries and across."""
    h, x = hessian(32), vectors(20, 32, seed=2)
    queries = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    estimates = []
    for seed in range(400):
        quantizer = RotorQuantProd(32, 3, seed=seed)
        codes = quantizer.quantize(x, h)
        estimates.append(torch.stack([quantizer.inner_product(q, codes) for q in queries]))
    found = torch.stack(estimates)
    deviation = (found.mean(dim=0) - queries @ x.mT) / (found.std(dim=0) / 400**0.5)
    assert deviation.abs().max() < 4.5
    assert 0.8 < deviation.square().mean() < 1.25


@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 5, 64), (2, 3, 0, 64)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    own = [hessian(64)] if len(shape) < 4 else [hessian(64), hessian(64).expand(3, 64, 64)]
    for h in own:
        y_hat, codes = RotorQuantMSE(64, 3).quantize(x, h)
        assert y_hat.shape == x.shape
        assert codes["codes"].shape == (*shape[:-1], 24)


@pytest.mark.parametrize(
    ("h", "says"),
    [
        (torch.eye(32), r"hessian has shape \(32, 32\).*pass \(64, 64\)"),
        (torch.eye(64).expand(5, 64, 64), r"broadcast to \(2, 3\)"),
        (torch.eye(64).expand(1, 2, 3, 64, 64), r"broadcast to \(2, 3\)"),
    ],
)
def test_another_shape_is_refused(h: Tensor, says: str) -> None:
    for quantizer in (RotorQuantMSE(64, 3), RotorQuantProd(64, 3)):
        with pytest.raises(ValueError, match=says):
            quantizer.quantize(torch.randn(2, 3, 5, 64), h)
    with pytest.raises(TypeError, match=r"hessian has dtype torch\.int64"):
        RotorQuantMSE(64, 3).quantize(torch.randn(5, 64), torch.eye(64).long())
