"""The Triton kernels of a first packing's statistics, beside their references and float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rotorquant_hf.backend import backend
from rotorquant_hf.kernels.block import block_sums
from rotorquant_hf.quant.channels import SAMPLED_TOKENS, SEGMENT, ChannelStatistics
from rotorquant_hf.quant.hessian import RANK, RIDGE, LowRankHessian
from rotorquant_hf.quant.moments import SAMPLED_QUERIES, QueryMoment
from rotorquant_hf.quant.rope import LAYOUTS
from rotorquant_hf.quant.rotations import make_rotation
from rotorquant_hf.quant.rounding import Feedback
from rotorquant_hf.quant.wide import product_shift
from rotorquant_hf.store.kernel_statistics import (
    kernel_block,
    kernel_feedback,
    kernel_hessian,
    kernel_moment,
)
from rotorquant_hf.store.statistics import block_statistics, query_moment, read_by
from tests.helpers import turned as helpers
from tests.helpers.turned import BATCH, assert_statistics, exact_moment, turned
from tests.helpers.vectors import DISTRIBUTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 2
# Head dims with the pairs that RoPE turns: all channels, some of them; more than a tile.
TURNED = [(16, 8), (40, 12), (64, 32), (80, 40), (24, 3)]

make_rope = partial(helpers.make_rope, device=DEVICE)
assert_moment = partial(helpers.assert_moment, tolerance=3e-5)
assert_hessian = partial(helpers.assert_hessian, tolerance=4e-3)


def states(n: int, d: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> Tensor:
    return helpers.states(n, d, heads, dtype, DEVICE)


# --- moments of queries ---


@pytest.mark.parametrize("d", [8, 16, 40, 64, 128, 136])
def test_moment(d: int) -> None:
    """Every kind of head dim, with groups, numbers of queries and dtypes in turn."""
    for turn, n in enumerate((1, 33, 300) if d < 128 else (40,)):
        group = 1 + (turn + d // 8) % 3
        query = states(n, d, HEADS * group, DTYPES[(turn + d // 8) % 3])
        found = kernel_moment(query, HEADS)
        assert (found.count, found.pre_rope) == (group * n, None)
        assert_moment(found.mean, exact_moment(query, HEADS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), TURNED)
def test_moment_before_rope(d: int, pairs: int, layout: str) -> None:
    """Of every dtype in turn; of 16 bits what was turned has been rounded."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 40 else 1)
    dtype = DTYPES[(d // 8 + LAYOUTS.index(layout)) % 3]
    plain = states(100, d, 2 * HEADS).to(dtype)
    query, positions = turned(plain, rope)
    found = kernel_moment(query, HEADS, rope, positions)
    assert_moment(found.mean, exact_moment(query, HEADS))
    assert_moment(found.pre_rope, QueryMoment.of(query, HEADS, rope, positions).pre_rope)
    if dtype == torch.float32:
        assert_moment(found.pre_rope, exact_moment(plain, HEADS))
    places = torch.tensor(list(positions), device=DEVICE)
    given = kernel_moment(query, HEADS, rope, places)
    assert torch.equal(given.pre_rope, found.pre_rope)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_is_no_number_spoils_itself_alone(dtype: torch.dtype) -> None:
    """As where a padded row has NaN: the moment is that of zeros in its place."""
    rope = make_rope(8)
    query = states(40, 16, 2 * HEADS, dtype)
    zeros = query.clone()
    query[0, 1, 3, 5], query[1, 0, 7, 2], query[0, 0, 0, 0] = torch.nan, -torch.inf, torch.inf
    zeros[~query.isfinite()] = 0
    found, wanted = (kernel_moment(x, HEADS, rope, range(40)) for x in (query, zeros))
    assert torch.equal(found.mean, wanted.mean)
    assert found.pre_rope.isfinite().all()


def test_moment_of_a_sample() -> None:
    """Of the same tokens as torch's."""
    rope = make_rope(8)
    query, positions = turned(states(SAMPLED_QUERIES + 500, 16, 2 * HEADS), rope)
    found, wanted = (of(query, HEADS, rope, positions) for of in (kernel_moment, QueryMoment.of))
    assert found.count == wanted.count == 2 * SAMPLED_QUERIES
    assert_moment(found.mean, wanted.mean)
    assert_moment(found.pre_rope, wanted.pre_rope)


def test_views() -> None:
    """Every second channel, one row for all of the batch."""
    query = states(40, 64, 2 * HEADS)[..., ::2]
    assert_moment(kernel_moment(query, HEADS).mean, exact_moment(query, HEADS))
    one = query[:1].expand(BATCH, -1, -1, -1)
    assert_moment(kernel_moment(one, HEADS).mean, exact_moment(one, HEADS))
    keys = states(40, 64)[..., ::2]
    assert_statistics(kernel_block(keys, 0.5, True), ChannelStatistics.of_block(keys, 0.5, True))


# --- keys and values ---


@pytest.mark.parametrize("d", [8, 24, 40, 64, 128, 576])
def test_block(d: int) -> None:
    """Every kind of head dim; numbers of vectors, dtypes and settings in turn, against float64."""
    powers, layouts = (0.0, 0.5, 1.0, 0.3), ("none", *LAYOUTS)
    for turn, n in enumerate((1, 63, 300) if d < 128 else (40,)):
        turn += d // 8
        x = states(n, d, dtype=DTYPES[turn % 3])
        settings = powers[turn % 4], turn % 2 == 0, layouts[turn // 3 % 3]
        found = kernel_block(x, *settings)
        assert_statistics(found, ChannelStatistics.of_block(x, *settings))
        exact = x.double()
        if settings[0] == 0:
            energy = exact.square().mean(dim=2, keepdim=True).sum(dim=3, keepdim=True)
            torch.testing.assert_close(found.scale.double(), energy.sqrt(), rtol=1e-6, atol=0)
        if settings[1]:
            mean = exact.mean(dim=2, keepdim=True)
            torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), TURNED)
def test_block_that_rope_turned(d: int, pairs: int, layout: str, center: bool) -> None:
    """Also of one row that it did not, and of positions far into a text, which are not its own."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 40 else 1)
    dtype = DTYPES[(d // 8 + LAYOUTS.index(layout)) % 3]
    x, positions = turned(states(150, d, dtype=dtype), rope)
    if d not in (40, 64):
        x[1] = states(150, d)[1]
    far = range(9000, 9150)
    for places in (positions, torch.tensor(list(positions), device=DEVICE), far):
        given = 0.5, center, layout, rope, places
        wanted = ChannelStatistics.of_block(x, *given)
        assert_statistics(kernel_block(x, *given), wanted)
        if places is not far:
            assert wanted.rope.turns.flatten().tolist() == [True, d in (40, 64)]


def test_heads_count_alike_in_whether_rope_turned_a_row() -> None:
    """Also one that a single vector makes small beside its peak."""
    rope = make_rope(16)
    x, positions = turned(states(150, 32, 3), rope)
    x[:, :2] = states(150, 32)[:, :2]  # not turned
    x[:, :2, 40, 3] = 100.0
    given = 0.5, True, "half", rope, positions
    found = kernel_block(x, *given)
    assert not found.rope.turns.any()
    assert_statistics(found, ChannelStatistics.of_block(x, *given))


def test_block_at_unknown_positions() -> None:
    x, rope = states(40, 16), make_rope(8)
    assert kernel_block(x, 0.5, True, "half", rope).rope is rope


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_hostile_blocks(factor: float, name: str) -> None:
    x = DISTRIBUTIONS[name](BATCH * HEADS * 40, 32).view(BATCH, HEADS, 40, 32).to(DEVICE) * factor
    for layout in ("none", "half"):
        found = kernel_block(x, 0.5, True, layout)
        assert_statistics(found, ChannelStatistics.of_block(x, 0.5, True, layout))


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_what_is_no_number_spoils_its_own_vector(power: float) -> None:
    """The others' statistics are those of zeros in its place."""
    x, rope = states(40, 16), make_rope(8)
    x[0, 1, 3, 5] = 0
    x[1, 0, 7, 2] = 0
    for given in ((power, True), (power, True, "half", rope, range(40))):
        wanted = kernel_block(x, *given)
        spoilt = x.clone()
        spoilt[0, 1, 3, 5], spoilt[1, 0, 7, 2] = torch.nan, -torch.inf
        found = kernel_block(spoilt, *given)
        assert torch.equal(found.scale, wanted.scale)
        assert found.mean.isfinite().all()
        if len(given) == 2:
            assert torch.equal(found.mean, wanted.mean)


def test_dims_that_kernels_do_not_take_are_left_to_torch() -> None:
    """Of 512 elements is the limit of shared memory on many GPUs."""
    rope = make_rope(4)
    for d in (20, 520):
        query, keys = states(40, d, 2 * HEADS), states(40, d)
        with backend("triton"):
            seen = query_moment(query, HEADS, rope, range(40))
            found = read_by(block_statistics(keys, 0.5, True, "half", rope, range(40)), seen)
        wanted = ChannelStatistics.of_block(keys, 0.5, True, "half", rope, range(40))
        wanted = wanted.read_by(QueryMoment.of(query, HEADS, rope, range(40)))
        for name, tensor in wanted.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_block_of_zeros(power: float) -> None:
    x, rope = states(40, 16), make_rope(8)
    x[1] = 0
    for given in ((power, True), (power, True, "half", rope, range(40))):
        found = kernel_block(x, *given)
        assert_statistics(found, ChannelStatistics.of_block(x, *given))
        assert (found.scale[1] == 1).all() == (power == 0)


def test_tokens_of_zeros_before_small_ones() -> None:
    """A whole split of zeros has no unit, and sets none for the others."""
    x = states(512, 32) * 1e-25
    x[:, :, :256] = 0
    peaks = block_sums(x, torch.arange(512, device=DEVICE), None, False).peaks
    assert (peaks > 0).tolist() == [[False, True]] * len(peaks)  # two splits
    assert_statistics(kernel_block(x, 0.5, True), ChannelStatistics.of_block(x, 0.5, True))


def test_block_of_a_sample() -> None:
    rope = make_rope(4)
    x, positions = turned(states(SAMPLED_TOKENS + 500, 8), rope)
    given = 0.5, True, "half", rope, positions
    assert_statistics(kernel_block(x, *given), ChannelStatistics.of_block(x, *given))


# --- Hessians ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), [*TURNED, (136, 60), (256, 128)])
def test_hessian(d: int, pairs: int, layout: str) -> None:
    """Of queries and keys that RoPE turns; in another case also of one row that it does not."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 80 else 1)
    (query, positions), (keys, _) = (turned(states(100, d, h), rope) for h in (2 * HEADS, HEADS))
    if d == 24:
        keys[1] = states(100, d)[1]
    seen = QueryMoment.of(query, HEADS, rope, positions)
    power = 0.0 if d == 64 else 0.5
    statistics = ChannelStatistics.of_block(keys, power, True, layout, rope, positions)
    assert statistics.rope.turns.flatten().tolist() == [True, d != 24][: len(statistics.rope.turns)]
    for queries, given in ((seen, rope), (seen, None), (QueryMoment(seen.mean, 7), None)):
        found, shift = kernel_hessian(statistics, queries, given)
        assert_hessian(found, statistics.read_by(queries, given).hessian)
        torch.testing.assert_close(shift, product_shift(statistics, queries), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e30])
def test_hessian_of_any_unit(factor: float) -> None:
    """Of keys and of queries: it knows nothing of either."""
    x, query = states(80, 32), states(80, 32, 2 * HEADS)
    statistics = ChannelStatistics.of_block(x, 0.5, True)
    wanted = statistics.read_by(QueryMoment.of(query, HEADS)).hessian
    large = ChannelStatistics.of_block(x * factor, 0.5, True)
    for keys, by in ((large, 1), (statistics, factor**0.5)):
        seen = QueryMoment.of(query * by, HEADS)
        found, shift = kernel_hessian(keys, seen)
        assert_hessian(found, wanted)
        # Below what float32 holds it is nothing, beyond it infinite: both say what is to be done.
        expected = product_shift(keys, seen)
        torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-37)


def test_hessian_of_no_queries() -> None:
    """No direction is preferred."""
    statistics = ChannelStatistics.of_block(states(40, 32), 0.5)
    nothing = QueryMoment(torch.zeros(BATCH, HEADS, 32, 32, device=DEVICE), 0)
    found, shift = kernel_hessian(statistics, nothing)
    assert_hessian(found, statistics.read_by(nothing).hessian)
    assert not shift.any()


def test_shift_of_keys_that_keep_their_mean() -> None:
    """It is coded too. (Kernels get another tensor in the place of the mean.)"""
    query, keys = states(80, 32, 2 * HEADS), states(80, 32)
    seen = QueryMoment.of(query, HEADS)
    shifts = []
    for center in (True, False):
        statistics = ChannelStatistics.of_block(keys, 0.5, center)
        shifts.append(kernel_hessian(statistics, seen)[1])
        wanted = product_shift(statistics, seen)
        torch.testing.assert_close(shifts[-1], wanted, rtol=1e-5, atol=0)
    assert (shifts[1] > 1.1 * shifts[0]).all()


@pytest.mark.parametrize("d", [16, 64])
def test_hessian_of_one_query(d: int) -> None:
    """One direction has all: the condition is the largest that there is."""
    query = states(1, d)
    seen = QueryMoment(QueryMoment.of(query, HEADS).mean, 1 << 40)
    statistics = ChannelStatistics.of_block(states(40, d), 0.0)
    found = kernel_hessian(statistics, seen)[0].matrix().double()
    unit = query / query.norm(dim=-1, keepdim=True)
    wanted = d * (unit.mT @ unit).double() + RIDGE * torch.eye(d, device=DEVICE)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * d)


# --- what the sweep reads ---


def assert_feedback(found: Feedback, wanted: Feedback) -> None:
    for name, a, b in zip(Feedback._fields, found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        near = 2e-4 * b.abs().amax() if name != "level" else 1e-4
        torch.testing.assert_close(a, b, rtol=2e-4, atol=float(near), msg=name)


def statistics_of(d: int, pairs: int, layout: str) -> ChannelStatistics:
    """Of keys read along few directions, in the second row not turned, or by other angles."""
    rope = make_rope(pairs, layout, batch=BATCH if d == 40 else 1)
    (query, positions), (keys, _) = (turned(states(100, d, h), rope) for h in (2 * HEADS, HEADS))
    if d == 24:
        keys[1] = states(100, d)[1]
    seen = QueryMoment.of(query * torch.logspace(0, -1, d, device=DEVICE), HEADS, rope, positions)
    return ChannelStatistics.of_block(keys, 0.5, True, "none", rope, positions).read_by(seen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), [*TURNED, (8, 4), (128, 64), (264, 20)])
def test_feedback(d: int, pairs: int, layout: str) -> None:
    statistics, rotation = statistics_of(d, pairs, layout), make_rotation(d, "haar").to(DEVICE)
    for position, count in ((0, 1), (SEGMENT + 5, 2)):
        wanted = Feedback.of(statistics.hessians_from(position, count), rotation)
        assert_feedback(kernel_feedback(statistics, rotation, position, count), wanted)


def test_feedback_of_what_does_not_turn() -> None:
    """One for all; of one scale for all channels; of directions that hold nearly all."""
    d, rotation = 32, make_rotation(32).to(DEVICE)
    seen = QueryMoment(QueryMoment.of(states(2, d, 2 * HEADS), HEADS).mean, 1 << 40)
    statistics = ChannelStatistics.of_block(states(40, d), 0.0).read_by(seen)
    found = kernel_feedback(statistics, rotation, 7 * SEGMENT, 1)
    wanted = Feedback.of(statistics.hessian, rotation)
    assert_feedback(Feedback(*(x[0] for x in found)), wanted)


def test_feedback_without_a_direction() -> None:
    d, rotation = 32, make_rotation(32).to(DEVICE)
    nothing = LowRankHessian(torch.zeros(BATCH, HEADS, d, RANK, dtype=torch.float16, device=DEVICE))
    statistics = ChannelStatistics.of_block(states(40, d), 0.5, rope=make_rope(8))
    statistics = ChannelStatistics(statistics.scale, None, nothing, make_rope(8))
    found = kernel_feedback(statistics, rotation, 0, 1)
    assert not found.factor.any()
    assert not found.gains.any()
    assert torch.equal(found.level, torch.full_like(found.level, 1 + RIDGE))
