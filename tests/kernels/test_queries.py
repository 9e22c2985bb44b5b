"""Queries prepared as integers, against float64."""

import pytest
import torch

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.kernels.queries import PrepareQueries
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.store.kv_store import RotorQuantKVCache
from tests.helpers.integer_columns import integer_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, GROUP, N = 2, 3, 4, 2


def packed_keys(d: int, bits: int, **options: object) -> PackedSpan:
    config = RotorQuantConfig(key_bits=bits, **options)
    store = RotorQuantKVCache(d, d, config=config, device=DEVICE)
    shape = (BATCH, HEADS, 40, d)
    store.append(3 + torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE))
    return store.keys.span()


def prepared(keys: PackedSpan, bits: int, queries: torch.Tensor) -> torch.Tensor:
    """What the digits say of T(q w), (batch, heads, n, group, d) float64."""
    prepare = PrepareQueries(keys, BATCH, HEADS * GROUP, N, torch.float16, integers=True)
    rotated, _, factors = prepare(queries)
    d = keys.quantizer.d
    assert rotated.dtype == torch.int8
    assert rotated.shape == (2, BATCH * HEADS, N * GROUP, d)
    high, low = rotated.double()
    columns = integer_columns(d, bits, DEVICE)
    found = (256 * high + low)[..., columns] * factors[0].double().unsqueeze(-1)
    return found.view(BATCH, HEADS, N, GROUP, d)


def expected(keys: PackedSpan, queries: torch.Tensor) -> torch.Tensor:
    """T(q w), likewise."""
    grouped = queries.double().view(BATCH, HEADS, GROUP, N, -1).transpose(2, 3)
    weighted = grouped * keys.statistics.scale.double().unsqueeze(2)
    return weighted @ keys.quantizer.stage_one.rotation.matrix().double().T


def draw(d: int, kind: str) -> torch.Tensor:
    queries = torch.randn(BATCH, HEADS * GROUP, N, d, device=DEVICE)
    if kind == "one-hot":
        queries = torch.zeros_like(queries)
        queries[..., 5] = -2.0
    elif kind == "outliers":
        queries[..., [3, 17]] *= 100
    return queries * {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)


@pytest.mark.parametrize("kind", ["normal", "one-hot", "outliers", "huge", "tiny"])
@pytest.mark.parametrize(("d", "bits"), [(128, 2), (128, 3), (128, 4), (80, 3), (64, 4)])
def test_digits_are_those_of_the_rotated_queries(d, bits, kind):
    """To half a step of |q w| / 32,639, and the rounding of tf32 in three parts."""
    keys, queries = packed_keys(d, bits), draw(d, kind)
    wanted = expected(keys, queries)
    length = wanted.norm(dim=-1, keepdim=True)
    error = (prepared(keys, bits, queries) - wanted) / length
    assert error.abs().max() < 0.5 / 32639 + 2e-6
    assert error.square().mean().sqrt() < 0.3 / 32639 + 1e-6


def test_queries_of_several_chunks():
    """Their lengths are added up as they come."""
    keys, queries = packed_keys(256, 4), draw(256, "normal")
    queries[..., 128:] *= torch.tensor([1e-3, 1e3], device=DEVICE)[:, None, None, None]
    wanted = expected(keys, queries)
    error = (prepared(keys, 4, queries) - wanted) / wanted.norm(dim=-1, keepdim=True)
    assert error.abs().max() < 0.5 / 32639 + 2e-6


def test_queries_of_zeros():
    keys = packed_keys(128, 3)
    assert (prepared(keys, 3, torch.zeros(BATCH, HEADS * GROUP, N, 128, device=DEVICE)) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_one_in_its_row(bad):
    """Integers know no NaN: the factor does."""
    keys, queries = packed_keys(128, 3), draw(128, "normal")
    queries[1, 5, 1, 7] = bad
    found = prepared(keys, 3, queries).isnan().all(dim=-1)
    rows = torch.zeros_like(found)
    rows[1, 1, 1, 1] = True
    assert torch.equal(found, rows)


def test_signs_have_a_factor_of_their_own():
    """Projected queries of RotorQuantProd stay float16."""
    keys, queries = packed_keys(128, 3, key_quantizer="prod"), draw(128, "normal")
    shape = (BATCH, HEADS * GROUP, N, torch.float16)
    ours = PrepareQueries(keys, *shape, integers=True)(queries)
    theirs = PrepareQueries(keys, *shape)(queries)
    assert torch.equal(ours.projected, theirs.projected)
    assert torch.equal(ours.factors[1:], theirs.factors[1:])
