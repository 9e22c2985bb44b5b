"""Query-aware rounding against the sweep spelt out in float64, and for what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotorquant_hf.quant import SCALES, LloydMaxCodebook, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.rotations import Rotation
from rotorquant_hf.quant.rounding import Feedback, round_with_feedback


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


def feedback(h: Tensor) -> Feedback:
    """Of vectors that are not rotated."""
    return Feedback.of(LowRankHessian.of(h), Rotation(torch.eye(h.shape[-1])))


def tables(d: int, bits: int) -> tuple[Tensor, Tensor]:
    book = LloydMaxCodebook.of_integers(d, bits)
    return book.centroids.float(), book.boundaries.float()


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
    """With the same Hessian in full. Also where the last block of columns is not full. One code in
    a thousand may differ: a coordinate between two centroids to the last bit of float32."""
    centroids, boundaries = tables(d, bits)
    low_rank = LowRankHessian.of(hessian(d))
    w = vectors(60, d)
    found = Feedback.of(low_rank, Rotation(torch.eye(d)))
    codes, chosen, lost = round_with_feedback(w, centroids, boundaries, found)
    assert torch.equal(chosen, centroids[codes])
    torch.testing.assert_close(lost, found.along(w - chosen), rtol=1e-4, atol=1e-4)
    same = (codes == spelt_out(w, centroids, low_rank.matrix().double())).all(dim=-1)
    assert same.float().mean() > 0.95


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_along_the_queries_falls(bits: int) -> None:
    d = 64
    centroids, boundaries = tables(d, bits)
    h, w = hessian(d), vectors(500, d)
    nearest = centroids[torch.bucketize(w, boundaries)]
    rounded = round_with_feedback(w, centroids, boundaries, feedback(h)).centroids
    assert error(w, rounded, h).mean() < 0.25 * error(w, nearest, h).mean()
    # The error is moved, not removed: without preference nearest rounding is the best there is.
    assert (w - rounded).square().sum() > (w - nearest).square().sum()


def test_rotated_vectors() -> None:
    """The feedback of rotated vectors is that of the Hessian turned likewise."""
    d, h = 32, hessian(32)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(8)))[0]
    low_rank = LowRankHessian.of(h)
    found = Feedback.of(low_rank, Rotation(turn))
    w = vectors(30, d)
    turned = turn.double() @ low_rank.matrix().double() @ turn.double().mT
    assert torch.equal(
        round_with_feedback(w, *tables(d, 3), found).indices, spelt_out(w, tables(d, 3)[0], turned)
    )
    e = vectors(7, d, seed=4)
    expected = ((e.double() @ turned) * e.double()).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(found.dot(e, e).double(), expected, rtol=1e-4, atol=0)


def test_no_preference_is_nearest_rounding() -> None:
    centroids, boundaries = tables(64, 3)
    w = vectors(100, 64)
    for h in (torch.eye(64), 1e30 * torch.eye(64), torch.zeros(64, 64)):
        codes = round_with_feedback(w, centroids, boundaries, feedback(h)).indices
        assert torch.equal(codes, torch.bucketize(w, boundaries, out_int32=True))


def test_heads_have_hessians_of_their_own() -> None:
    d = 32
    h = torch.stack([hessian(d, seed=seed) for seed in range(6)]).view(2, 3, d, d)
    w = vectors(6 * 10, d).view(2, 3, 10, d)
    codes = round_with_feedback(w, *tables(d, 3), feedback(h)).indices
    for row in range(2):
        for head in range(3):
            own = feedback(h[row, head])
            alone = round_with_feedback(w[row, head], *tables(d, 3), own).indices
            assert torch.equal(codes[row, head], alone)


def test_it_changes_nothing_it_was_given() -> None:
    w, given = vectors(10, 32), feedback(hessian(32))
    before = w.clone(), [x.clone() for x in given]
    round_with_feedback(w, *tables(32, 3), given)
    assert torch.equal(w, before[0])
    assert all(torch.equal(x, y) for x, y in zip(given, before[1], strict=True))


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
    """Under the Hessian of low rank; up to the rounding of a stored scale."""
    x, h = keys(), hessian(64)
    quantizer = RotorQuantMSE(64, bits, scale=scale)
    metric = LowRankHessian.of(h).matrix().double()
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
