"""RoPE: turning against complex numbers in float64 and Transformers, means against averaging."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotorquant_hf.quant.rope import Rope

W = torch.tensor([1.0, 0.3, 0.04, 0.002])
layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])


def rope(layout="half", frequencies=W):
    return Rope(frequencies.view(1, 1, 1, -1), layout)


def vectors(n=5, d=12, seed=0):
    return torch.randn(2, 3, n, d, generator=torch.Generator().manual_seed(seed))


def matrix(layout, p, d=12):
    """R(p), (d, d) float64, pair by pair."""
    r = torch.eye(d, dtype=torch.float64)
    for i, w in enumerate(W.tolist()):
        a, b = (i, i + 4) if layout == "half" else (2 * i, 2 * i + 1)
        c, s = torch.cos(torch.tensor(w * p)).double(), torch.sin(torch.tensor(w * p)).double()
        r[a, a], r[a, b], r[b, a], r[b, b] = c, -s, s, c
    return r


@layouts
def test_turning_is_that_of_every_pair(layout):
    x, positions = vectors(), torch.tensor([0, 1, 7, -7, 1000])
    turned = rope(layout).turn(x, positions)
    for i, p in enumerate(positions.tolist()):
        expected = x[:, :, i].double() @ matrix(layout, p).T
        torch.testing.assert_close(turned[:, :, i].double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    back = rope(layout).turn(turned, -positions)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_turning_is_that_of_transformers():
    x, positions = vectors(d=8), torch.arange(3, 8)
    angles = positions[:, None] * torch.cat((W, W))
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(rope().turn(x, positions), expected, rtol=0, atol=1e-6)


def test_half_precision_is_turned_in_full():
    x = vectors().bfloat16()
    assert torch.equal(
        rope().turn(x, torch.arange(5)), rope().turn(x.float(), torch.arange(5).int())
    )


@layouts
@pytest.mark.parametrize("lengths", [(50,), (20, 700)])
def test_means_over_positions(layout, lengths):
    """Of vectors and of second moments, as averaging over many positions gives them."""
    x, query = vectors(), vectors(40, seed=1)
    moment = query.mT @ query / 40
    means, moments = [], []
    for length in lengths:
        grid = (torch.arange(4000) + 0.5) * (length / 4000)
        turns = torch.stack([matrix(layout, float(p)) for p in grid])
        means.append(turns.mean(dim=0))
        # R C R' is linear in C: as a matrix on vec(C), its mean takes one product.
        outer = torch.einsum("pij,pkl->ikjl", turns, turns) / 4000
        moments.append(torch.einsum("ikjl,bhjl->bhik", outer, moment.double()))
    expected = x.double() @ torch.stack(means).mean(dim=0).T
    found = rope(layout).spread(x, lengths)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    expected = torch.stack(moments).mean(dim=0)
    found = rope(layout).spread_moment(moment, lengths)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@layouts
def test_a_mean_moment_is_a_moment(layout):
    """Symmetric, of the same trace, positive semidefinite."""
    query = vectors(3, seed=2)
    moment = query.mT @ query
    found = rope(layout).spread_moment(moment, (512, 8192))
    torch.testing.assert_close(found, found.mT)
    traces = (x.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for x in (found, moment))
    torch.testing.assert_close(*traces)
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-5


def test_rows_where_nothing_turns():
    where = rope().where(torch.tensor([True, False]).view(2, 1, 1, 1))
    assert where.turns.flatten().tolist() == [True, False]
    x = vectors()
    moment = x.mT @ x
    turned = where.turn(x, torch.arange(5))
    assert torch.equal(turned[:1], rope().turn(x[:1], torch.arange(5)))
    torch.testing.assert_close(turned[1:], x[1:])
    torch.testing.assert_close(where.spread(x, (100,))[1:], x[1:])
    torch.testing.assert_close(where.spread_moment(moment, (100,))[1:], moment[1:])
    assert where.map(lambda w: w[:1]).turns.flatten().tolist() == [True]
