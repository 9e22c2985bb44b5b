"""Coding through the native library beside `encode` and beside float64."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from rotorquant_hf import RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.backend import backend
from rotorquant_hf.native.library import LEVELS, library
from rotorquant_hf.quant import SCALES, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.packing import pack, unpack
from rotorquant_hf.quant.quantizer import Quantizer
from rotorquant_hf.quant.rope import LAYOUTS, Rope
from rotorquant_hf.quant.rounding import Feedback
from rotorquant_hf.store import side
from rotorquant_hf.store.native_append import encode_native, native_takes
from tests.helpers.lossless import lossless
from tests.helpers.vectors import DISTRIBUTIONS

LIBRARY = library()
assert LIBRARY is not None, "the native library was not compiled: pip install -e . with a compiler"
HERE = LEVELS[LEVELS.index(LIBRARY.level) :]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, HEADS = 2, 3
POISON = 0xA5


def make_quantizer(d: int, bits: int, kind: str = "mse", **options: object) -> Quantizer:
    make = RotorQuantProd if kind == "prod" else RotorQuantMSE
    return make(d, bits, scale_dtype=torch.float16, **options)


def states(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(BATCH, HEADS, n, d): channels of several sizes and offsets, tokens before heads."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(d, generator=generator).exp()
    offsets = 5 * torch.randn(HEADS, d, generator=generator)
    x = torch.randn(BATCH, n, HEADS, d, generator=generator) * channels + offsets
    return x.to(dtype).transpose(1, 2)


def query_moment(d: int) -> QueryMoment:
    """That of many queries that look along few directions, of each head others."""
    generator = torch.Generator().manual_seed(d)
    queries = torch.randn(BATCH, HEADS, 200, d, generator=generator) * torch.logspace(0, -2, d)
    queries = queries @ torch.randn(BATCH, HEADS, d, d, generator=generator)
    return QueryMoment(queries.mT @ queries, 1 << 40)


def statistics_of(x: Tensor, turn: int = 0, aware: bool = False) -> ChannelStatistics:
    """Equalised and centred, or not, in turn."""
    taken = ChannelStatistics.of_block(x.float(), 0.5 * (turn % 2), turn % 3 > 0)
    return taken.read_by(query_moment(x.shape[3])) if aware else taken


def poisoned_rows(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows between others, in tensors of another order of axes."""
    rows = {}
    for name, row in like.items():
        batch, heads, n = row.shape[:3]
        width = row.shape[3] if row.dim() > 3 else 1
        size = (n + 2, heads + 1, batch, (width + 2) * row.element_size())
        base = torch.full(size, POISON, dtype=torch.uint8).view(row.dtype)
        inner = base.permute(2, 1, 0, 3)[:, 1:, 1:-1, 1:-1]
        rows[name] = inner if row.dim() > 3 else inner[..., 0]
    return rows


def encode(
    x: Tensor,
    quantizer: Quantizer,
    statistics: ChannelStatistics,
    level: str | None = None,
    position: int = 0,
) -> dict[str, Tensor]:
    """The rows; nothing beside them is written to."""
    like = quantizer.encode(statistics.normalize(x), statistics.hessian)
    rows = poisoned_rows(like)
    bases = {name: row._base for name, row in rows.items()}
    before = {name: base.clone() for name, base in bases.items()}
    assert encode_native(x, quantizer, statistics, position, rows, level)
    for name, row in rows.items():
        expected = before[name].as_strided(row.shape, row.stride(), row.storage_offset())
        expected.copy_(row)
        assert torch.equal(bases[name].view(torch.uint8), before[name].view(torch.uint8)), name
    return rows


def check_near(
    found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 0.99, prefix: str = ""
) -> None:
    """Of that share of the vectors at least the codes, and of these the scales, to one unit in the
    last place. The others have a coordinate on the boundary between two codes."""
    assert found.keys() == wanted.keys()
    codes = f"{prefix}codes"
    same = (found[codes] == wanted[codes]).all(dim=-1)
    assert same.float().mean() >= share
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        if x.dtype == torch.uint8:
            assert (found[name][same] != x[same]).float().mean() < 1e-3, name
        elif x.dtype == torch.float16:
            torch.testing.assert_close(found[name][same], x[same], rtol=2**-10, atol=2**-24)


def check(x, quantizer, statistics, level) -> None:
    """Nearest rounding: the rows of `encode`, and in float64 what the vectors call for."""
    rows = encode(x, quantizer, statistics, level)
    check_near(rows, quantizer.encode(statistics.normalize(x)))
    mse = quantizer.stage_one
    unit, norm = exact_units(x, quantizer, statistics)
    index = unpack(rows["codes"], mse.bits, mse.d).long()
    assert torch.equal(pack(index, mse.bits), rows["codes"])
    assert is_nearest(unit, index, mse).all()
    c, scale = mse.centroids.double()[index], rows["scale"].double().unsqueeze(-1)
    expected = norm * mse._scale_of_unit(unit, c)
    assert ((scale - expected).abs() <= 2**-11 * expected + 2**-25 + 1e-5 * expected).all()
    if mse is not quantizer:
        check_residual(unit * norm - c * scale, norm, rows, quantizer)


def check_residual(r: Tensor, norm: Tensor, rows: dict[str, Tensor], prod: Quantizer) -> None:
    expected, found = r.norm(dim=-1), rows["residual_norm"].double()
    tolerance = 2**-11 * expected + 2**-25 + 1e-5 * norm.squeeze(-1)
    assert ((found - expected).abs() <= tolerance).all()
    signs = unpack(rows["signs"], 1, prod.num_signs)
    assert torch.equal(pack(signs, 1), rows["signs"])  # zeros beyond the last projection
    projection = prod.sign_matrix.double()
    dot = r @ projection.T
    clear = 1e-5 * norm * projection.norm(dim=-1)
    assert (((dot >= 0) == signs.bool()) | (dot.abs() <= clear)).all()


def exact_units(x, quantizer, statistics) -> tuple[Tensor, Tensor]:
    """Rotated unit vectors and norms in float64."""
    mean = 0 if statistics.mean is None else statistics.mean.double()
    u = (x.double() - mean) / statistics.scale.double()
    norm = u.norm(dim=-1, keepdim=True)
    return quantizer.stage_one.rotation.rotate(u / norm.clamp(min=1e-300)), norm


def is_nearest(y: Tensor, index: Tensor, mse: RotorQuantMSE) -> Tensor:
    """Of every coordinate, to 1e-5 of the largest of its vector."""
    tolerance = 1e-5 * y.abs().amax(dim=-1, keepdim=True)
    edges = torch.nn.functional.pad(mse.boundaries.double(), (1, 1), value=math.inf)
    edges[0] = -math.inf
    return (y > edges[index] - tolerance) & (y <= edges[index + 1] + tolerance)


# --- nearest rounding ---


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [8, 9, 31, 40, 64, 80, 100, 128])
@pytest.mark.parametrize("level", HERE)
def test_equals_encode(level: str, d: int, bits: int) -> None:
    """Every width and kind of head dim; scale rules, dtypes and statistics take turns."""
    turn = d // 8 + bits
    x = states(37, d, DTYPES[turn % 3])
    check(x, make_quantizer(d, bits, scale=SCALES[turn % 4]), statistics_of(x, turn), level)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("level", HERE)
def test_scale_rules(level: str, scale: str) -> None:
    x = states(33, 64)
    for rotation in ("hadamard", "rotors"):
        quantizer = make_quantizer(64, 3, scale=scale, rotation=rotation)
        check(x, quantizer, statistics_of(x, 1), level)


@pytest.mark.parametrize("d", [192, 575, 576])
@pytest.mark.parametrize("level", HERE)
def test_long_vectors(level: str, d: int) -> None:
    x = states(9, d)
    check(x, make_quantizer(d, 3), statistics_of(x, 1), level)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 65])
@pytest.mark.parametrize("level", HERE)
def test_any_number_of_tokens(level: str, n: int) -> None:
    x = states(n, 24)
    check(x, make_quantizer(24, 5), statistics_of(states(40, 24)), level)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("level", HERE)
def test_hostile_vectors(level: str, name: str) -> None:
    x = DISTRIBUTIONS[name](BATCH * HEADS * 40, 64).view(BATCH, HEADS, 40, 64)
    for statistics in (statistics_of(x), statistics_of(x, 1)):
        check(x, make_quantizer(64, 3), statistics, level)


def plain(d: int) -> ChannelStatistics:
    """Statistics that change nothing."""
    return ChannelStatistics(torch.ones(BATCH, HEADS, 1, 1))


@pytest.mark.parametrize("kind", ["mse", "prod"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("level", HERE)
def test_zeros_have_no_scale(level: str, scale: str, kind: str) -> None:
    x, quantizer = states(40, 64), make_quantizer(64, 3, kind, scale=scale)
    x[:, :, 3] = 0
    for statistics in (plain(64), plain(64).read_by(query_moment(64))):
        rows = encode(x, quantizer, statistics, level)
        wanted = quantizer.encode(statistics.normalize(x), statistics.hessian)
        for name in rows:
            assert torch.equal(rows[name][:, :, 3], wanted[name][:, :, 3]), name
        assert (rows["scale"][:, :, 3] == 0).all()


@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-30, 1e-7, 1e3])
@pytest.mark.parametrize("level", HERE)
def test_vectors_of_any_unit(level: str, factor: float) -> None:
    """Codes know nothing of the unit, even where it is subnormal; scales are those of float16."""
    x, quantizer = torch.randn(BATCH, HEADS, 40, 64) * factor, make_quantizer(64, 3)
    check_near(encode(x, quantizer, plain(64), level), quantizer.encode(x))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("level", HERE)
def test_the_unit_goes_into_the_statistics(level: str, factor: float) -> None:
    x = states(40, 64) * factor
    check(x, make_quantizer(64, 3), statistics_of(x, 1), level)


@hypothesis.given(
    strategies.lists(
        strategies.floats(0, 65504, width=32) | strategies.floats(0, 2**-13, width=32),
        min_size=1,
        max_size=32,
    )
)
def test_scales_are_rounded_as_torch_rounds(numbers: list[float]) -> None:
    """Of a vector with one entry the scale by the rule "norm" is that entry."""
    x = torch.zeros(1, 1, len(numbers), 16)
    x[..., 5] = torch.tensor(numbers)
    quantizer = make_quantizer(16, 2, scale="norm")
    for level in HERE:
        rows = encode(x, quantizer, ChannelStatistics(torch.ones(1, 1, 1, 1)), level)
        assert torch.equal(rows["scale"].view(torch.int16), x[..., 5].half().view(torch.int16))


@pytest.mark.parametrize("level", HERE)
def test_scales_halfway_between_two_become_the_even_one(level: str) -> None:
    """Every number halfway between neighbours in float16, subnormal ones too, and those beside."""
    halves = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    numbers = torch.cat([middles, *(middles.nextafter(torch.tensor(x)) for x in (0.0, 1e9))])
    x = torch.zeros(1, 1, len(numbers), 8)
    x[..., 5] = numbers
    quantizer = make_quantizer(8, 1, scale="norm")
    rows = encode(x, quantizer, ChannelStatistics(torch.ones(1, 1, 1, 1)), level)
    assert torch.equal(rows["scale"], x[..., 5].half())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("level", HERE)
def test_exact_arithmetic_gives_the_same_codes(level: str, bits: int) -> None:
    """A Walsh-Hadamard transform of four ones, over their norm of 2: multiples of 1/16, by signs of
    which nothing is rounded. Many lie on the boundary 0 itself."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.zeros(BATCH * HEADS * 50, 64)
    for row in x:
        row[torch.randperm(64, generator=generator)[:4]] = 1.0
    x = x.view(BATCH, HEADS, 50, 64)
    quantizer = make_quantizer(64, bits, rotation="hadamard")
    wanted = quantizer.encode(x)
    rows = encode(x, quantizer, plain(64), level)
    check_near(rows, wanted, share=1.0)


# --- query-aware rounding ---


def replayed(unit: Tensor, index: Tensor, mse: RotorQuantMSE, feedback: Feedback) -> Tensor:
    """What each coordinate was to be rounded to, in float64, given the codes before it."""
    f, c = feedback.factor.double(), mse.centroids.double()[index]
    level, n = feedback.level.double(), unit.shape[2]
    s, wanted = torch.zeros(BATCH, HEADS, n, f.shape[-1], dtype=torch.float64), []
    for i in range(mse.d):
        tail = f[..., i:, :].mT @ f[..., i:, :] + level * torch.eye(f.shape[-1])
        gain = torch.linalg.solve(tail, f[..., i, :, None])  # (BATCH, HEADS, RANK, 1)
        wanted.append(unit[..., i] + (s @ gain).squeeze(-1))
        s = s + (unit[..., i] - c[..., i])[..., None] * f[..., i, None, :]
    return torch.stack(wanted, dim=-1)


def errors(unit: Tensor, norm: Tensor, rows: dict[str, Tensor], mse, feedback) -> Tensor:
    """Of every vector under the Hessian, over its norm, in float64."""
    y_hat = mse.decode({"codes": rows["codes"], "scale": rows["scale"]}).double()
    e = (unit - y_hat / norm.clamp(min=1e-300)).float()
    return feedback.dot(e, e).squeeze(-1)


def check_aware(x, quantizer, statistics, level) -> None:
    """Every code is that of the sweep, given those before it, or all are the nearest; and no vector
    has a larger error than the nearest codes have, or `encode` but for rounding."""
    rows, mse = encode(x, quantizer, statistics, level), quantizer.stage_one
    unit, norm = exact_units(x, quantizer, statistics)
    feedback = Feedback.of(statistics.hessian, mse.rotation)
    index = unpack(rows["codes"], mse.bits, mse.d).long()
    swept = is_nearest(replayed(unit, index, mse, feedback), index, mse).all(dim=-1)
    near = is_nearest(unit, index, mse).all(dim=-1)
    assert (swept | near).all()
    assert swept.any()

    u = statistics.normalize(x)
    wanted = quantizer.encode(u, statistics.hessian)
    check_near(rows, wanted, share=0.98)
    found = errors(unit, norm, rows, mse, feedback)
    by_torch = errors(unit, norm, wanted, mse, feedback)
    nearest = errors(unit, norm, quantizer.encode(u), mse, feedback)
    unit_error = feedback.dot(unit.float(), unit.float()).squeeze(-1)
    half_ulp = 2**-11 * unit_error.sqrt()  # of the stored scales
    assert (found.sqrt() <= nearest.sqrt() * (1 + 1e-3) + 2 * half_ulp).all()
    assert abs(found.mean() / by_torch.mean() - 1) < 0.01
    if quantizer.d > 16 and mse.bits > 1:
        assert found.mean() < 0.7 * nearest.mean()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [8, 24, 31, 64, 80])
@pytest.mark.parametrize("level", HERE)
def test_query_aware(level: str, d: int, bits: int) -> None:
    turn = d // 8 + bits
    x = states(37, d, DTYPES[turn % 3])
    quantizer = make_quantizer(d, bits, scale=SCALES[turn % 4])
    check_aware(x, quantizer, statistics_of(x, turn, aware=True), level)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("level", HERE)
def test_query_aware_hostile_vectors(level: str, name: str) -> None:
    x = DISTRIBUTIONS[name](BATCH * HEADS * 40, 64).view(BATCH, HEADS, 40, 64)
    check_aware(x, make_quantizer(64, 3), statistics_of(x, aware=True), level)


@pytest.mark.parametrize("level", HERE)
def test_query_aware_is_nearest_where_no_direction_is_preferred(level: str) -> None:
    x, quantizer = states(40, 64), make_quantizer(64, 3)
    statistics = statistics_of(x)
    moment = QueryMoment(torch.eye(64).expand(BATCH, HEADS, 64, 64), 1 << 40)
    aware, near = (
        encode(x, quantizer, each, level) for each in (statistics.read_by(moment), statistics)
    )
    assert torch.equal(aware["codes"], near["codes"])


@pytest.mark.parametrize("position", [0, 1500, 70_000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "pairs"), [(31, 8), (64, 32), (40, 20)])
@pytest.mark.parametrize("level", HERE)
def test_the_hessian_turns(level: str, d: int, pairs: int, layout: str, position: int) -> None:
    """To where the keys are, row by row, as `hessian_at` has it."""
    x, quantizer = states(60, d), make_quantizer(d, 3)
    frequencies = 5000.0 ** (-torch.arange(pairs) / pairs)
    rope = Rope(frequencies / torch.tensor([1, 3]).view(-1, 1, 1, 1), layout)
    if d == 40:  # nothing turns in the second row
        rope = rope.where(torch.tensor([True, False]).view(-1, 1, 1, 1))
    statistics = replace(statistics_of(x, 1, aware=True), rope=rope)
    rows = encode(x, quantizer, statistics, level, position)
    there = replace(statistics, hessian=statistics.hessian_at(position), rope=None)
    check_near(rows, quantizer.encode(there.normalize(x), there.hessian), share=0.98)
    here = encode(x, quantizer, there, level)
    check_near(rows, here, share=0.98)
    assert not torch.equal(rows["codes"], encode(x, quantizer, statistics_of(x, 1), level)["codes"])


# --- signs of the residual ---


@pytest.mark.parametrize(
    ("d", "bits", "options"),
    [
        (8, 2, {}),
        (31, 3, {}),
        (64, 3, {"qjl_dim": 1}),
        (64, 4, {"qjl_dim": 24, "projection": "gaussian"}),
        (64, 5, {"qjl_dim": 203}),
        (80, 6, {"projection": "gaussian"}),
        (128, 8, {"scale": "unbiased"}),
        (100, 7, {}),
    ],
)
@pytest.mark.parametrize("level", HERE)
def test_prod(level: str, d: int, bits: int, options: dict) -> None:
    quantizer, x = make_quantizer(d, bits, "prod", **options), states(37, d)
    check(x, quantizer, statistics_of(x, d), level)
    check_aware(x, quantizer, statistics_of(x, d, aware=True), level)


# --- the same, however it is called ---


@pytest.mark.parametrize("level", HERE)
def test_a_vector_has_its_codes_wherever_it_stands(level: str) -> None:
    x, quantizer = states(70, 64), make_quantizer(64, 3, "prod")
    statistics = statistics_of(x, 1, aware=True)
    together = encode(x, quantizer, statistics, level)
    for start, end in ((0, 1), (1, 30), (30, 70)):
        alone = encode(x[:, :, start:end].contiguous(), quantizer, statistics, level)
        for name in together:
            assert torch.equal(alone[name], together[name][:, :, start:end]), name


@pytest.mark.parametrize("level", HERE)
def test_threads_change_nothing(level: str) -> None:
    x, quantizer = states(300, 32), make_quantizer(32, 3, "prod")
    statistics = statistics_of(x, 1, aware=True)
    threads, coded = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            coded += [encode(x, quantizer, statistics, level) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for rows in coded[1:]:
        for name in rows:
            assert torch.equal(rows[name], coded[0][name]), name


def test_views() -> None:
    """Every second channel, one row for all of the batch, statistics that are views."""
    x, quantizer = states(40, 128)[..., ::2], make_quantizer(64, 3)
    check(x, quantizer, statistics_of(x, 1), None)
    one = states(40, 64)[:1].expand(BATCH, -1, -1, -1)
    check(one, quantizer, statistics_of(one, 1), None)


# --- in the store ---

SETTINGS = {
    "nearest": {},
    "prod": {"key_quantizer": "prod"},
    "plain": {"center_keys": False, "equalize_keys": 0.0, "equalize_values": 0.0},
    "5 and 1 bits": {"key_bits": 5, "value_bits": 1},
}


def make_store(**options: object) -> RotorQuantKVCache:
    return RotorQuantKVCache(32, 24, config=RotorQuantConfig.from_options(None, **options))


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_the_store_codes_as_in_torch(options: dict, monkeypatch) -> None:
    made = {}
    for name in ("native", "torch"):
        calls = []
        monkeypatch.setattr(side, "encode_native", counting(calls))
        store = make_store(**options)
        with backend(name):
            for n, seed in ((40, 0), (1, 1), (33, 2)):
                store.append(states(n, 32, seed=seed), states(n, 24, seed=seed))
        assert len(calls) == (6 if name == "native" else 0)
        made[name] = store.state()
    for prefix in ("key_", "value_"):
        native, in_torch = (
            {name: x for name, x in made[each].items() if name.startswith(prefix)}
            for each in ("native", "torch")
        )
        check_near(native, in_torch, prefix=prefix)


def counting(calls: list):
    def counted(*args):
        calls.append(args)
        return encode_native(*args)

    return counted


def test_rows_handed_out_stay_as_they_are() -> None:
    store = make_store()
    store.append(states(40, 32), states(40, 24))
    rows = store.keys.span().rows
    before = {name: row.clone() for name, row in rows.items()}
    store.crop(10)
    store.append(states(20, 32, seed=1), states(20, 24, seed=1))
    for name, row in rows.items():
        assert torch.equal(row, before[name])
    assert len(store) == 50


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("begun", [True, False])
def test_what_has_no_scale_is_refused_as_in_torch(number: float, begun: bool) -> None:
    """NaN, infinity, and a vector that leaves float16 beside those that fixed the statistics."""
    errors = []
    for name in ("native", "torch"):
        store, keys = make_store(), states(40, 32)
        with backend(name):
            if begun or number < math.inf:
                store.append(keys, states(40, 24))
            before = {name: x.clone() for name, x in store.state().items()}
            keys[1, 2, 7, 5] = number
            with pytest.raises(ValueError, match=r"too large|NaN or infinite") as error:
                store.append(keys, states(40, 24))
        errors.append(str(error.value))
        after = store.state()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        store.append(states(8, 32), states(8, 24))  # and goes on
    assert errors[0] == errors[1]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e5, 3e38])
def test_a_vector_without_a_scale_is_noticed(level: str, number: float) -> None:
    x, quantizer = torch.ones(1, 1, 40, 32), make_quantizer(32, 3)
    rows = poisoned_rows(quantizer.encode(x))
    statistics = ChannelStatistics(torch.ones(1, 1, 1, 1))
    assert encode_native(x, quantizer, statistics, 0, rows, level)
    x[0, 0, 39, 31] = number
    assert not encode_native(x, quantizer, statistics, 0, rows, level)


def test_no_tokens_and_no_rows() -> None:
    quantizer = make_quantizer(32, 3)
    for x in (states(0, 32), states(5, 32)[:0]):
        taken = ChannelStatistics(torch.ones(*x.shape[:2], 1, 1))
        encode(x, quantizer, taken)
    store = make_store()
    store.append(states(0, 32), states(0, 24))
    assert len(store) == 0
    assert not store.has_statistics


def test_what_the_library_takes() -> None:
    mse = make_quantizer(32, 3)
    assert native_takes(torch.float16, mse)
    assert native_takes(torch.float32, make_quantizer(33, 3, "prod"))
    assert not native_takes(torch.float64, mse)
    assert not native_takes(torch.float32, RotorQuantMSE(32, 3, scale_dtype=torch.float32))

    class Own(RotorQuantMSE):
        pass

    assert not native_takes(torch.float32, Own(32, 3, scale_dtype=torch.float16))
    with lossless():
        assert not native_takes(torch.float32, make_store().key_quantizer)
