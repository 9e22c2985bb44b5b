"""Second moments of queries, against their definition in float64."""

import pytest
import torch

from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.hessian import RIDGE
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope


def queries(batch=2, heads=6, n=50, d=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, d, generator=generator) @ torch.randn(d, d)


def expected(query, heads):
    batch, query_heads, n, d = query.shape
    rows = query.double().view(batch, heads, query_heads // heads, n, d)
    return torch.einsum("bhgnd,bhgne->bhde", rows, rows) / (n * query_heads // heads)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_of_queries(heads):
    query = queries()
    found = QueryMoment.of(query, heads)
    assert found.count == 50 * 6 // heads
    torch.testing.assert_close(found.mean.double(), expected(query, heads), rtol=1e-5, atol=1e-5)


def test_merged_is_that_of_all():
    parts = queries(n=7), queries(n=90, seed=1), queries(n=2, seed=2)
    found = QueryMoment.of(parts[0], 3)
    for part in parts[1:]:
        found = found.merged(QueryMoment.of(part, 3))
    whole = QueryMoment.of(torch.cat(parts, dim=2), 3)
    assert found.count == whole.count
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-5, atol=1e-5)


def test_half_precision_and_no_queries():
    query = queries().bfloat16()
    found = QueryMoment.of(query, 2)
    assert found.mean.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), expected(query, 2), rtol=1e-5, atol=1e-5)
    none = QueryMoment.of(query[:, :, :0], 2)
    assert none.count == 0
    assert not none.merged(none).mean.any()
    assert torch.isfinite(none.shrunk(none.mean)).all()


def test_few_queries_prefer_no_direction():
    """One query says little of where others look; a thousand say much."""

    def spread(n):
        moment = QueryMoment.of(queries(1, 1, n), 1)
        values = torch.linalg.eigvalsh(moment.shrunk(moment.mean)[0, 0])
        return float(values.max() / values.min())

    assert spread(1) < 20
    assert spread(1000) > 50 * spread(1)


def test_queries_before_rope():
    """Turned back by their positions, whatever parts they come in; a sample of many."""
    rope = Rope(10.0 ** -torch.arange(4.0).view(1, 1, 1, -1), "half")
    plain, positions = queries(2, 6, 30), torch.arange(100, 130)
    turned = rope.turn(plain, positions)
    whole = QueryMoment.of(turned, 3, rope, positions)
    torch.testing.assert_close(whole.pre_rope, QueryMoment.of(plain, 3).mean, rtol=0, atol=1e-4)
    assert torch.equal(whole.mean, QueryMoment.of(turned, 3).mean)
    parts = [
        QueryMoment.of(turned[:, :, part], 3, rope, positions[part])
        for part in (slice(0, 7), slice(7, 30))
    ]
    merged = parts[0].merged(parts[1])
    torch.testing.assert_close(merged.pre_rope, whole.pre_rope, rtol=1e-5, atol=1e-5)
    assert merged.merged(QueryMoment.of(turned, 3)).pre_rope is None  # of these it is not known
    assert whole.nbytes == 2 * whole.mean.nbytes
    assert torch.equal(whole.map(lambda x: x[1:]).pre_rope, whole.pre_rope[1:])
    added = whole.shrunk(whole.mean) - whole.mean
    torch.testing.assert_close(whole.shrunk(whole.pre_rope) - whole.pre_rope, added)
    many, positions = queries(1, 1, 5000), torch.arange(5000)
    found = QueryMoment.of(rope.turn(many, positions), 1, rope, positions)
    torch.testing.assert_close(found.pre_rope, QueryMoment.of(many, 1).mean, rtol=0, atol=1e-3)


def test_hessian_of_coded_vectors():
    """q . (x - x_hat) is the same from the vectors as from what is coded of them."""
    x = queries(2, 3, 40)
    for power in (0.0, 0.5):
        statistics = ChannelStatistics.of_block(x, power, center=True)
        u = statistics.normalize(x)
        error = torch.randn_like(u)
        factor = torch.randn(2, 3, 16, 4, generator=torch.Generator().manual_seed(7))
        moment = factor @ factor.mT  # of few directions: nothing is lost
        found = statistics.read_by(QueryMoment(moment, 10**9)).hessian.matrix() - RIDGE * torch.eye(
            16
        )
        unit = statistics.scale.mT * moment * statistics.scale
        unit = unit.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None]
        e = statistics.denormalize(u + error) - x
        torch.testing.assert_close(
            torch.einsum("bhnd,bhde,bhne->bhn", error, found, error) * unit,
            torch.einsum("bhnd,bhde,bhne->bhn", e, moment, e),
            rtol=1e-2,
            atol=1e-2,
        )
