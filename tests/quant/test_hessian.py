"""Hessians of low rank, against eigenvalues in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotorquant_hf.quant import RotorQuantMSE
from rotorquant_hf.quant.hessian import RANK, RIDGE, LowRankHessian


def moment(d: int, decay: float = 0.7, seed: int = 0) -> Tensor:
    """A second moment of mean diagonal 1 whose eigenvalues fall by `decay` each, float64."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = decay ** torch.arange(d, dtype=torch.float64)
    return (turn * (values * d / values.sum())) @ turn.mT


@pytest.mark.parametrize("d", [8, 16, 17, 40, 64, 128, 256])
@pytest.mark.parametrize("decay", [0.3, 0.7, 0.95, 1.0])
def test_it_is_the_nearest(d: int, decay: float) -> None:
    """The strongest directions as they are, the others with their mean."""
    h = moment(d, decay)
    values, vectors = torch.linalg.eigh(h + RIDGE * torch.eye(d))
    if d > RANK:
        values[: d - RANK] = values[: d - RANK].mean()
    expected = (vectors * values) @ vectors.mT
    found = LowRankHessian.of(h)
    assert found.factor.shape == (d, RANK)
    assert found.factor.dtype == torch.float16
    strongest = values[-RANK:].sum() - min(RANK, d) * (values[0] if d > RANK else RIDGE)
    captured = found.factor.double().square().sum()
    assert captured <= 1.001 * strongest + 1e-6
    if decay < 0.9:  # of a flat spectrum other directions are as good
        assert captured >= 0.99 * strongest
        assert torch.linalg.matrix_norm(found.matrix() - expected, ord=2) < 8e-3 * values.max()
    torch.testing.assert_close(found.matrix().diagonal().mean(), torch.tensor(1 + RIDGE))


def test_few_directions_are_exact() -> None:
    h = moment(64, 0.1)
    torch.testing.assert_close(
        LowRankHessian.of(h).matrix(), (h + RIDGE * torch.eye(64)).float(), rtol=0, atol=0.05
    )


def test_heads_on_their_own() -> None:
    h = torch.stack([moment(32, seed=seed) for seed in range(6)]).view(2, 3, 32, 32)
    found = LowRankHessian.of(h)
    assert found.level.shape == (2, 3, 1, 1)
    torch.testing.assert_close(
        found.matrix()[1, 2], LowRankHessian.of(h[1, 2]).matrix(), rtol=1e-3, atol=1e-3
    )
    chosen = found.map(lambda x: x[:1])
    assert torch.equal(chosen.matrix(), found.matrix()[:1])
    assert chosen.nbytes == 3 * 32 * RANK * 2


@given(scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]), rank=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_the_unit_does_not_matter(scale: float, rank: int) -> None:
    """Nor that it is singular: fewer queries than channels."""
    queries = torch.randn(rank, 24, generator=torch.Generator().manual_seed(rank))
    h = queries.double().mT @ queries.double()
    torch.testing.assert_close(
        LowRankHessian.of(h * scale).matrix(), LowRankHessian.of(h).matrix(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("level", [0.0, 1.0, 1e30])
def test_no_preference(level: float) -> None:
    found = LowRankHessian.of(level * torch.eye(40))
    assert not found.factor.any()
    torch.testing.assert_close(found.matrix(), (1 + RIDGE) * torch.eye(40))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -5.0])
def test_what_is_no_second_moment_is_refused(bad: float) -> None:
    h = torch.eye(16)
    h[3, 3] = bad
    with pytest.raises(ValueError, match="second moments of queries"):
        LowRankHessian.of(h)
    with pytest.raises(ValueError, match="second moments of queries"):
        RotorQuantMSE(16, 3).quantize(torch.randn(4, 16), h)
