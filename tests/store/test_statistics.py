"""Statistics by the native library beside torch's, and beside float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rotorquant_hf import RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.backend import backend
from rotorquant_hf.native.library import LEVELS, library
from rotorquant_hf.quant.channels import SAMPLED_TOKENS, ChannelStatistics
from rotorquant_hf.quant.hessian import RANK
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import LAYOUTS
from rotorquant_hf.store import statistics as dispatch
from rotorquant_hf.store.native_statistics import native_block, native_hessian, native_moment
from tests.helpers import turned as helpers
from tests.helpers.turned import (
    BATCH,
    FIRST,
    HEADS,
    assert_statistics,
    exact_moment,
    make_rope,
    states,
    turned,
)
from tests.helpers.vectors import DISTRIBUTIONS

LIBRARY = library()
assert LIBRARY is not None, "the native library was not compiled: pip install -e . with a compiler"
HERE = LEVELS[LEVELS.index(LIBRARY.level) :]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

assert_hessian = partial(helpers.assert_hessian, tolerance=2e-3)


def assert_moment(found: Tensor, wanted: Tensor) -> None:
    """And symmetric."""
    assert torch.equal(found, found.mT)
    helpers.assert_moment(found, wanted, 1e-5)


# --- moments of queries ---


@pytest.mark.parametrize("d", [1, 8, 17, 31, 40, 64, 80, 128, 192])
@pytest.mark.parametrize("level", HERE)
def test_moment(level: str, d: int) -> None:
    """Every kind of head dim, with groups, numbers of queries and dtypes in turn."""
    for turn, n in enumerate((1, 2, 63, 64, 65, 100)):
        group = 1 + turn % 3
        query = states(n, d, HEADS * group, DTYPES[(turn + d) % 3])
        found = native_moment(query, HEADS, level=level)
        assert (found.count, found.pre_rope) == (group * n, None)
        assert_moment(found.mean, exact_moment(query, HEADS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), [(8, 4), (31, 9), (40, 12), (64, 32), (128, 64), (20, 3)])
@pytest.mark.parametrize("level", HERE)
def test_moment_before_rope(level: str, d: int, pairs: int, layout: str) -> None:
    rope = make_rope(pairs, layout, batch=BATCH if d == 40 else 1)
    plain = states(100, d, 2 * HEADS)
    query, positions = turned(plain, rope)
    found = native_moment(query, HEADS, rope, positions, level)
    assert_moment(found.mean, exact_moment(query, HEADS))
    assert_moment(found.pre_rope, exact_moment(plain, HEADS))
    places = torch.tensor(list(positions))
    given = native_moment(query, HEADS, rope, places, level)
    assert torch.equal(given.pre_rope, found.pre_rope)


@pytest.mark.parametrize("n", [1025, 4000])
def test_moment_of_a_sample(n: int) -> None:
    """Of the same tokens as torch's."""
    rope = make_rope(8)
    query, positions = turned(states(n, 16, 2 * HEADS), rope)
    found, wanted = (of(query, HEADS, rope, positions) for of in (native_moment, QueryMoment.of))
    assert found.count == wanted.count < 2 * n
    assert_moment(found.mean, wanted.mean)
    assert_moment(found.pre_rope, wanted.pre_rope)


def test_views() -> None:
    """Every second channel, one row for all of the batch."""
    query = states(40, 128, 2 * HEADS)[..., ::2]
    assert_moment(native_moment(query, HEADS).mean, exact_moment(query, HEADS))
    one = query[:1].expand(BATCH, -1, -1, -1)
    assert_moment(native_moment(one, HEADS).mean, exact_moment(one, HEADS))
    keys = states(40, 128)[..., ::2]
    assert_statistics(native_block(keys, 0.5, True), ChannelStatistics.of_block(keys, 0.5, True))


# --- keys and values ---


@pytest.mark.parametrize("d", [1, 2, 8, 17, 31, 40, 64, 80, 128, 192])
@pytest.mark.parametrize("level", HERE)
def test_block(level: str, d: int) -> None:
    """Every kind of head dim; numbers of vectors, dtypes and settings in turn, against float64."""
    powers, centers, layouts = (0.0, 0.5, 1.0, 0.3), (True, False, "auto"), ("none", *LAYOUTS)
    for turn, n in enumerate((1, 2, 32, 63, 64, 65, 300)):
        turn += d
        x = states(n, d, dtype=DTYPES[turn % 3])
        settings = powers[turn % 4], centers[turn % 3], layouts[turn // 3 % 3]
        found = native_block(x, *settings, level=level)
        assert_statistics(found, ChannelStatistics.of_block(x, *settings))
        exact = x.double()
        if settings[0] == 0:
            energy = exact.square().mean(dim=2, keepdim=True).sum(dim=3, keepdim=True)
            torch.testing.assert_close(found.scale.double(), energy.sqrt(), rtol=1e-6, atol=0)
        if settings[1] is True:
            mean = exact.mean(dim=2, keepdim=True)
            torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", [True, False, "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), [(8, 4), (31, 9), (40, 12), (64, 32), (20, 3)])
@pytest.mark.parametrize("level", HERE)
def test_block_that_rope_turned(level, d: int, pairs: int, layout: str, center) -> None:
    """Also of one row that it did not, by other angles, and of positions far into a text."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 40 else 1)
    x, positions = turned(states(150, d), rope)
    if d not in (40, 64):
        x[1] = states(150, d)[1]
    far = range(9000, 9150)
    for places in (positions, torch.tensor(list(positions)), far):
        given = 0.5, center, layout if d % 2 == 0 else "none", rope, places
        wanted = ChannelStatistics.of_block(x, *given)
        assert_statistics(native_block(x, *given, level), wanted)
        if places is not far:
            assert wanted.rope.turns.flatten().tolist() == [True, d in (40, 64)]


@pytest.mark.parametrize("level", HERE)
def test_heads_count_alike_in_whether_rope_turned_a_row(level: str) -> None:
    """Also one that a single vector makes small beside its peak."""
    rope = make_rope(16)
    x, positions = turned(states(150, 32), rope)
    x[:, :2] = states(150, 32)[:, :2]  # not turned
    x[:, :2, 40, 3] = 100.0
    given = 0.5, True, "half", rope, positions
    found = native_block(x, *given, level)
    assert not found.rope.turns.any()
    assert_statistics(found, ChannelStatistics.of_block(x, *given))


def test_block_at_unknown_positions() -> None:
    x, rope = states(40, 16), make_rope(8)
    given = 0.5, True, "half", rope
    assert native_block(x, *given).rope is ChannelStatistics.of_block(x, *given).rope is rope


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("level", HERE)
def test_hostile_blocks(level: str, factor: float, name: str) -> None:
    x = DISTRIBUTIONS[name](BATCH * HEADS * 40, 64).view(BATCH, HEADS, 40, 64) * factor
    for center, layout in ((True, "none"), ("auto", "half"), ("auto", "interleaved")):
        found = native_block(x, 0.5, center, layout, level=level)
        assert_statistics(found, ChannelStatistics.of_block(x, 0.5, center, layout))


@pytest.mark.parametrize("layout", ["none", *LAYOUTS])
@pytest.mark.parametrize("level", HERE)
def test_offset_channels(level: str, layout: str) -> None:
    """Some with a constant that is all they hold, some with one that is not."""
    x = states(50, 16)
    x[:, 0, :, 3] = 300 + torch.randn(BATCH, 50)
    x[:, 1, :, 5] = 300 * torch.randn(BATCH, 50)
    x[:, 2, :, ::2] = 400.0  # half of them: no more than the median
    found = native_block(x, 0.5, "auto", layout, level=level)
    assert_statistics(found, ChannelStatistics.of_block(x, 0.5, "auto", layout))
    assert found.mean[:, 0].any()
    assert not found.mean[:, 1].any()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_block_of_zeros(power: float) -> None:
    x, rope = states(40, 16), make_rope(8)
    x[1] = 0
    for given in ((power, True), (power, "auto", "half"), (power, True, "half", rope, range(40))):
        found = native_block(x, *given)
        assert_statistics(found, ChannelStatistics.of_block(x, *given))
        assert (found.scale[1] == 1).all() == (power == 0)


def test_block_of_a_sample() -> None:
    rope = make_rope(4)
    x, positions = turned(states(SAMPLED_TOKENS + 500, 8), rope)
    given = 0.5, True, "half", rope, positions
    assert_statistics(native_block(x, *given), ChannelStatistics.of_block(x, *given))


# --- Hessians ---


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("d", "pairs"), [(16, 8), (17, 8), (31, 9), (64, 32), (64, 16), (80, 40), (128, 64)]
)
@pytest.mark.parametrize("level", HERE)
def test_hessian(level: str, d: int, pairs: int, layout: str, power: float) -> None:
    """Of queries and keys that RoPE turns; in another case also of one row that it does not."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 80 else 1)
    (query, positions), (keys, _) = (turned(states(100, d, h), rope) for h in (2 * HEADS, HEADS))
    if d == 31:
        keys[1] = states(100, d)[1]
    seen = QueryMoment.of(query, HEADS, rope, positions)
    shared = "none" if d % 2 else layout
    statistics = ChannelStatistics.of_block(keys, power, True, shared, rope, positions)
    assert statistics.rope.turns.flatten().tolist() == [True, d != 31][: len(statistics.rope.turns)]
    for queries, given in ((seen, rope), (seen, None), (QueryMoment(seen.mean, 7), None)):
        found = native_hessian(statistics, queries, given, level)
        assert_hessian(found, statistics.read_by(queries, given).hessian)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("level", HERE)
def test_hessian_of_any_unit(level: str, factor: float) -> None:
    """Of keys and of queries: it knows nothing of either."""
    x, query = states(80, 32), states(80, 32, 2 * HEADS)
    statistics = ChannelStatistics.of_block(x, 0.5, True)
    wanted = statistics.read_by(QueryMoment.of(query, HEADS)).hessian
    large = ChannelStatistics.of_block(x * factor, 0.5, True)
    assert_hessian(native_hessian(large, QueryMoment.of(query, HEADS), level=level), wanted)
    seen = QueryMoment.of(query * factor**0.5, HEADS)
    assert_hessian(native_hessian(statistics, seen, level=level), wanted)


@pytest.mark.parametrize("level", HERE)
def test_hessian_of_no_queries(level: str) -> None:
    """No direction is preferred."""
    statistics = ChannelStatistics.of_block(states(40, 32), 0.5)
    nothing = QueryMoment(torch.zeros(BATCH, HEADS, 32, 32), 0)
    assert_hessian(
        native_hessian(statistics, nothing, level=level), statistics.read_by(nothing).hessian
    )


@pytest.mark.parametrize("entry", [-1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("level", HERE)
def test_what_is_no_moment_is_refused_as_in_torch(level: str, entry: float) -> None:
    statistics = ChannelStatistics.of_block(states(40, 32), 0.5)
    moment = QueryMoment.of(states(40, 32), HEADS)
    moment.mean[1, 2, 5, 5] = entry
    assert native_hessian(statistics, moment, level=level) is None
    with pytest.raises(ValueError, match="negative diagonal"):
        dispatch.read_by(statistics, moment)


# --- the same, however it is called ---


@pytest.mark.parametrize("level", HERE)
def test_threads_change_nothing(level: str) -> None:
    rope = make_rope(16)
    (query, positions), (keys, _) = (turned(states(300, 32, h), rope) for h in (6, HEADS))
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moment = native_moment(query, HEADS, rope, positions, level)
            statistics = native_block(keys, 0.5, True, "half", rope, positions, level)
            hessian = native_hessian(statistics, moment, rope, level)
            made.append(
                (moment.mean, moment.pre_rope, *statistics.tensors().values(), hessian.factor)
            )
    finally:
        torch.set_num_threads(threads)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_store_takes_them_as_in_torch(dtype: torch.dtype, monkeypatch) -> None:
    """Float64 is torch's, but for the Hessian, whose moment is float32."""
    rope, config = make_rope(16), RotorQuantConfig.from_options(None)
    keys, positions = turned(states(100, 32), rope)
    keys, values = keys.to(dtype), states(100, 24).to(dtype)
    query = turned(states(100, 32, 2 * HEADS), rope)[0].to(dtype)
    made, called = {}, []
    for name in ("native_moment", "native_block", "native_hessian"):
        monkeypatch.setattr(dispatch, name, _counted(called, name, getattr(dispatch, name)))
    for name in ("native", "torch"):
        called.clear()
        store = RotorQuantKVCache(32, 24, config=config, rope=rope)
        with backend(name):
            seen = dispatch.query_moment(query, HEADS, rope, positions)
            store.append_unchecked(keys, values, FIRST, None, seen)
        taken = ["native_hessian"]
        if dtype != torch.float64:
            taken = ["native_moment", "native_block", *taken, "native_block"]
        assert called == (taken if name == "native" else [])
        made[name] = store
    for a, b in zip(*(store.sides for store in made.values()), strict=True):
        found, wanted = (x.statistics.tensors() for x in (a, b))
        assert found.keys() == wanted.keys()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-3)


def _counted(called: list[str], name: str, function):
    def counted(*args):
        called.append(name)
        return function(*args)

    return counted


def test_small_heads_and_no_tokens_are_left_to_torch() -> None:
    statistics = ChannelStatistics.of_block(states(40, RANK - 1), 0.5)
    query = states(40, RANK - 1)
    found = dispatch.read_by(statistics, dispatch.query_moment(query, HEADS)).hessian
    assert_hessian(found, statistics.read_by(QueryMoment.of(query, HEADS)).hessian)
    none = dispatch.query_moment(query[:, :, :0], HEADS)
    assert none.count == 0
    assert not none.mean.any()
