"""The Triton kernel that codes blocks of tokens, against `encode` and against float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

# ruff: noqa: E402
triton = pytest.importorskip("triton")

from rotorquant_hf.kernels.append import (
    AppendPart,
    append_kernel,
    append_segments,
    kernel_arguments,
)
from rotorquant_hf.kernels.launch import FUSED
from rotorquant_hf.quant import SCALES, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.packing import pack, unpack
from rotorquant_hf.quant.quantizer import Quantizer
from rotorquant_hf.quant.rounding import Feedback
from tests.helpers.vectors import DISTRIBUTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, SLOTS, CAPACITY = 2, 37, 56
POISON = 0xA5


def make_quantizer(d: int, bits: int, kind: str = "mse", **options: object) -> Quantizer:
    make = RotorQuantProd if kind == "prod" else RotorQuantMSE
    return make(d, bits, device=DEVICE, scale_dtype=torch.float16, **options)


def states(d: int, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, HEADS, SLOTS, d): channels of several sizes and offsets."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(d, generator=generator).exp()
    offsets = 5 * torch.randn(HEADS, 1, d, generator=generator)
    x = torch.randn(batch, HEADS, SLOTS, d, generator=generator) * channels + offsets
    return x.to(DEVICE, dtype)


def poisoned_rows(quantizer: Quantizer, batch: int) -> dict[str, Tensor]:
    """Rows (batch, HEADS, CAPACITY, ...) between others, in tensors of another order of axes."""
    rows = {}
    for name, row in quantizer.encode(torch.ones(1, quantizer.d, device=DEVICE)).items():
        width = row.shape[1] if row.dim() > 1 else 1
        size = (CAPACITY, HEADS + 1, batch, (width + 2) * row.element_size())
        base = torch.full(size, POISON, dtype=torch.uint8, device=DEVICE).view(row.dtype)
        inner = base.permute(2, 1, 0, 3)[:, 1:, :, 1:-1]
        rows[name] = inner if row.dim() > 1 else inner[..., 0]
    return rows


def make_part(
    x: Tensor,
    quantizer: Quantizer,
    power: float = 0.5,
    center: bool = True,
    statistics: ChannelStatistics | None = None,
    moment: Tensor | None = None,
) -> AppendPart:
    if statistics is None:
        statistics = ChannelStatistics.of_block(x.float(), power, center)
    feedback = None
    if moment is not None:
        statistics = statistics.read_by(QueryMoment(moment, 1 << 40))  # of many: not shrunk
        feedback = Feedback.of(statistics.hessian, quantizer.stage_one.rotation)
        feedback = Feedback(*(x[None] for x in feedback))  # of one block
    return AppendPart(x, quantizer, statistics, poisoned_rows(quantizer, x.shape[0]), feedback)


def own_feedback(part: AppendPart) -> Feedback:
    """What the sweep reads of a part that is one block."""
    return Feedback(*(x[0] for x in part.feedback))


def query_moment(d: int, batch: int = 1) -> Tensor:
    """(batch, HEADS, d, d) of queries that look along few directions, of each head others."""
    generator = torch.Generator().manual_seed(d)
    queries = torch.randn(batch, HEADS, 200, d, generator=generator) * torch.logspace(0, -2, d)
    queries = queries @ torch.randn(batch, HEADS, d, d, generator=generator)
    return (queries.mT @ queries).to(DEVICE)


def append(
    keys: AppendPart, values: AppendPart, begin: int, count: int, row: int, max_count: int = 0
) -> None:
    """Launch, and see that nothing outside the rows [row, row + count) has changed."""
    bounds = torch.tensor([-7, begin, count, row], dtype=torch.int32, device=DEVICE)[None, 1:]
    before = [{k: v._base.clone() for k, v in part.out.items()} for part in (keys, values)]
    append_segments(bounds, max_count or count, keys, values)
    for part, old in zip((keys, values), before, strict=True):
        for name, rows in part.out.items():
            expected = old[name].as_strided(rows.shape, rows.stride(), rows.storage_offset())
            expected[:, :, row : row + count] = rows[:, :, row : row + count]
            assert torch.equal(rows._base.view(torch.uint8), old[name].view(torch.uint8)), name


def coded(part: AppendPart, begin: int, count: int, row: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens coded (batch, heads, count, d) and their rows."""
    slots = [(begin + i) % part.x.shape[2] for i in range(count)]
    return part.x[:, :, slots], {k: v[:, :, row : row + count] for k, v in part.out.items()}


def check_valid(part: AppendPart, begin: int, count: int, row: int) -> None:
    """The rows follow, in float64, from the tokens up to float32's rounding."""
    x, rows = coded(part, begin, count, row)
    quantizer, channel_scale, mean = part.quantizer, part.statistics.scale, part.statistics.mean
    mse = quantizer.mse if isinstance(quantizer, RotorQuantProd) else quantizer
    u = (x.double() - (0 if mean is None else mean.double())) / channel_scale.double()
    norm = u.norm(dim=-1, keepdim=True)
    unit = quantizer.rotation.rotate(u / norm.clamp(min=1e-300))

    index = unpack(rows["codes"], mse.bits, mse.d).long()
    assert torch.equal(pack(index, mse.bits), rows["codes"])
    tolerance = 1e-5 * unit.abs().amax(dim=-1, keepdim=True)
    edges = torch.nn.functional.pad(mse.boundaries.double(), (1, 1), value=torch.inf)
    edges[0] = -torch.inf
    assert (unit > edges[index] - tolerance).all()
    assert (unit <= edges[index + 1] + tolerance).all()

    c, scale = mse.centroids.double()[index], rows["scale"].double().unsqueeze(-1)
    expected = (norm * mse._scale_of_unit(unit, c)).clamp(max=65504)
    half_ulp = 2**-11 * expected + 2**-25
    assert ((scale - expected).abs() <= half_ulp + 1e-5 * expected).all()
    if mse is quantizer:
        return

    r = unit * norm - c * scale
    expected, actual = r.norm(dim=-1), rows["residual_norm"].double()
    tolerance = 2**-11 * expected + 2**-25 + 1e-5 * norm.squeeze(-1)
    assert ((actual - expected).abs() <= tolerance).all()
    signs = unpack(rows["signs"], 1, quantizer.qjl_dim)
    assert torch.equal(pack(signs, 1), rows["signs"])  # zeros beyond the last projection
    projection = quantizer.S.double()
    clear = 1e-5 * norm * projection.norm(dim=-1)
    dot = r @ projection.T
    assert (((dot >= 0) == signs.bool()) | (dot.abs() <= clear)).all()


def check_equal(part: AppendPart, begin: int, count: int, row: int) -> None:
    """The rows are those of `encode`, but for a few numbers on the edge between two codes."""
    x, rows = coded(part, begin, count, row)
    expected = part.quantizer.encode(part.statistics.normalize(x))
    assert rows.keys() == expected.keys()
    for name, want in expected.items():
        assert rows[name].dtype == want.dtype
        assert rows[name].shape == want.shape
        if want.dtype == torch.uint8:
            assert (rows[name] != want).float().mean() < 2e-3, name
        else:  # one unit in the last place
            torch.testing.assert_close(rows[name], want, rtol=2**-10, atol=2**-24)
    found, want = decoded(part.quantizer, rows), decoded(part.quantizer, expected)
    if "signs" in rows:  # one sign moves a vector by far more than the neighbouring code does
        same = (rows["signs"] == expected["signs"]).all(dim=-1)
        found, want = found[same], want[same]
    assert (found - want).norm() <= 1e-3 * want.norm()


def decoded(quantizer: Quantizer, rows: dict[str, Tensor]) -> Tensor:
    """The coded vectors in the rotated space."""
    mse = {"codes": rows["codes"], "scale": rows["scale"]}
    if isinstance(quantizer, RotorQuantMSE):
        return quantizer.decode(mse)
    signs = {"qjl_signs": rows["signs"], "residual_norm": rows["residual_norm"]}
    return quantizer.decode({"mse_indices": mse, **signs})


def check(keys: AppendPart, values: AppendPart, begin: int, count: int, row: int) -> None:
    append(keys, values, begin, count, row)
    for part in (keys, values):
        check_valid(part, begin, count, row)
        check_equal(part, begin, count, row)


@pytest.mark.parametrize("bits", [1, 2, 3, 4], ids=lambda b: f"{b}-and-{b + 4}-bits")
@pytest.mark.parametrize("d", [8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256, 576])
def test_equals_encode(d: int, bits: int) -> None:
    """Every width and kind of head dim; scale rules and dtypes take turns."""
    turn = d // 8 + bits
    keys = make_quantizer(d, bits, scale=SCALES[turn % 4])
    values = make_quantizer(d, bits + 4, scale=SCALES[(turn + 1) % 4])
    x, y = states(d, DTYPES[turn % 3]), states(d, DTYPES[(turn + 1) % 3], seed=1)
    k_part = make_part(x, keys, power=0.5 * (turn % 2), center=turn % 3 > 0)
    v_part = make_part(y, values, power=0.5 * (turn // 2 % 2), center=turn % 3 > 1)
    check(k_part, v_part, begin=0, count=SLOTS if d < 576 else 9, row=3)


def error_along_queries(part: AppendPart, x: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Of every vector, under the Hessian, without stage 2."""
    mse = part.quantizer.stage_one
    y = mse.rotation.rotate(part.statistics.normalize(x))
    e = y - mse.decode({"codes": rows["codes"], "scale": rows["scale"]})
    return own_feedback(part).dot(e, e).squeeze(-1)


def check_aware(part: AppendPart, begin: int, count: int, row: int) -> None:
    """The rows are those of `encode`, but where a coordinate lies on the edge between two codes,
    from which on others follow; and no vector has a larger error than of the nearest codes."""
    x, rows = coded(part, begin, count, row)
    quantizer, u = part.quantizer, part.statistics.normalize(x)
    expected = quantizer.encode(u, part.statistics.hessian)
    same = (rows["codes"] == expected["codes"]).all(dim=-1)
    assert same.float().mean() > 0.9
    for name, want in expected.items():
        if want.dtype == torch.uint8:
            assert (rows[name][same] != want[same]).float().mean() < 2e-3, name
        else:
            torch.testing.assert_close(rows[name][same], want[same], rtol=2**-9, atol=2**-24)
    found, wanted = (error_along_queries(part, x, r) for r in (rows, expected))
    nearest = error_along_queries(part, x, quantizer.encode(u))
    y = quantizer.rotation.rotate(u)
    half_ulp = 2**-11 * own_feedback(part).dot(y, y).squeeze(-1).sqrt()  # of the stored scales
    assert (found.sqrt() <= nearest.sqrt() * (1 + 1e-3) + 2 * half_ulp).all()
    assert found.mean() < 1.01 * wanted.mean()
    if quantizer.d > 16 and quantizer.stage_one.bits > 1:
        assert found.mean() < 0.7 * nearest.mean()


@pytest.mark.parametrize(
    ("d", "bits", "kind"),
    [
        *((d, bits, kind) for d in (8, 24, 64) for bits in (2, 3) for kind in ("mse", "prod")),
        (24, 4, "mse"),
        (40, 1, "mse"),
        (64, 5, "mse"),
        (64, 8, "mse"),  # of wide layers
        (24, 8, "prod"),
        (80, 4, "prod"),
        (128, 3, "mse"),
        (256, 3, "mse"),
        (320, 3, "mse"),  # rows that lie in several warps
    ],
)
def test_query_aware(d: int, bits: int, kind: str) -> None:
    """Every rule, rows of a batch with directions of their own; values beside as ever."""
    turn = d // 8 + bits
    quantizer = make_quantizer(d, bits, kind, scale=SCALES[turn % 4])
    x = states(d, DTYPES[turn % 3], batch=2)
    keys = make_part(x, quantizer, center=turn % 2 > 0, moment=query_moment(d, 2))
    values = make_part(states(d, batch=2, seed=1), make_quantizer(d, 3))
    count = SLOTS if d < 64 else 9
    append(keys, values, begin=5, count=count, row=3)
    check_aware(keys, 5, count, 3)
    check_equal(values, 5, count, 3)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_query_aware_hostile_vectors(name: str) -> None:
    x = DISTRIBUTIONS[name](HEADS * SLOTS, 64).view(1, HEADS, SLOTS, 64).to(DEVICE)
    x[:, :, 3] = 0
    quantizer = make_quantizer(64, 3, scale="least_squares")
    keys = make_part(x, quantizer, power=0.0, center=False, moment=query_moment(64))
    append(keys, make_part(x, quantizer), begin=0, count=SLOTS, row=0)
    check_aware(keys, 0, SLOTS, 0)
    assert (keys.out["scale"][:, :, 3] == 0).all()


def test_query_aware_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many programs as scratch memory has room for, each with a place of its own there."""
    x, made = states(24, batch=2), []
    quantizer = make_quantizer(24, 3)
    once, pieces = (make_part(x, quantizer, moment=query_moment(24, 2)) for _ in range(2))
    plain = make_part(x, quantizer)
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        if out.dtype == torch.float32 and out.numel():  # the interpreter makes empty ones
            made.append(out.fill_(torch.nan))
        return out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    append(once, plain, begin=0, count=SLOTS, row=0)
    (scratch,) = made
    assert not scratch.isnan().any()
    monkeypatch.setattr("rotorquant_hf.kernels.append._SCRATCH_ELEMENTS", 1)
    append(pieces, plain, begin=0, count=SLOTS, row=0)
    assert made[1].numel() == scratch.numel() // 2  # of two tiles
    for name in once.out:
        assert torch.equal(once.out[name], pieces.out[name])


@pytest.mark.parametrize("elements", [1, 1 << 23], ids=["in several launches", "in one"])
def test_blocks_are_coded_as_each_alone(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the sweep reads of each, of several lengths, of no token, in rows far apart."""
    monkeypatch.setattr("rotorquant_hf.kernels.append._SCRATCH_ELEMENTS", elements)
    d, blocks = 24, [(0, 33, 20), (33, 1, 3), (34, 0, 0), (34, 3, 8)]
    x, quantizer = states(d, batch=2), make_quantizer(d, 3)
    statistics = ChannelStatistics.of_block(x, 0.5, True)
    moments = [query_moment(d, 2).roll((i, i), dims=(2, 3)) for i in range(len(blocks))]
    read = [make_part(x, quantizer, moment=moment).feedback for moment in moments]
    together = Feedback(*(torch.cat(tensors) for tensors in zip(*read, strict=True)))

    def part(feedback: Feedback | None) -> AppendPart:
        return AppendPart(x, quantizer, statistics, poisoned_rows(quantizer, 2), feedback)

    def run(keys: AppendPart, values: AppendPart, some: list[tuple[int, int, int]]) -> None:
        bounds = torch.tensor(some, dtype=torch.int32, device=DEVICE)
        append_segments(bounds, max(1, *(count for _, count, _ in some)), keys, values)

    keys, values, alone, plain = part(together), part(None), part(None), part(None)
    run(keys, values, blocks)
    for feedback, block in zip(read, blocks, strict=True):
        run(replace(alone, feedback=feedback), plain, [block])
    for found, wanted in ((keys, alone), (values, plain)):
        for name in found.out:
            assert torch.equal(found.out[name], wanted.out[name]), name
    swept = keys.out["codes"][:, :, 20:53] != values.out["codes"][:, :, 20:53]
    assert swept.any()


def test_query_aware_is_nearest_where_no_direction_is_preferred() -> None:
    moment = torch.eye(64, device=DEVICE).expand(1, HEADS, 64, 64)
    plain = make_part(states(64), make_quantizer(64, 3), power=0.0)
    aware = make_part(states(64), plain.quantizer, power=0.0, moment=moment)
    append(aware, plain, begin=0, count=SLOTS, row=0)
    check_equal(replace(aware, out=plain.out), 0, SLOTS, 0)
    assert torch.equal(aware.out["codes"], plain.out["codes"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_rules(bits: int, scale: str) -> None:
    quantizer = make_quantizer(64, bits, scale=scale, rotation="hadamard")
    keys = make_part(states(64), quantizer)
    values = make_part(states(64, seed=1), make_quantizer(64, bits, "prod", scale=scale))
    check(keys, values, begin=0, count=33, row=0)


@pytest.mark.parametrize(
    ("d", "bits", "options"),
    [
        (8, 2, {}),
        (40, 3, {}),
        (64, 3, {"qjl_dim": 1}),
        (64, 4, {"qjl_dim": 24, "projection": "gaussian"}),
        (64, 5, {"qjl_dim": 203}),
        (80, 6, {"projection": "gaussian"}),
        (128, 3, {}),
        (128, 8, {"scale": "unbiased"}),
        (192, 7, {}),
        (576, 3, {}),
    ],
)
def test_prod(d: int, bits: int, options: dict) -> None:
    keys = make_part(states(d), make_quantizer(d, bits, "prod", **options))
    values = make_part(states(d, torch.bfloat16), make_quantizer(d, 3))
    check(keys, values, begin=0, count=15, row=3)


@pytest.mark.parametrize("d_value", [8, 64, 192, 320])
def test_head_dims_of_keys_and_values_differ(d_value: int) -> None:
    keys = make_part(states(96, torch.float16), make_quantizer(96, 4))
    values = make_part(states(d_value, torch.bfloat16), make_quantizer(d_value, 3), center=False)
    check(keys, values, begin=0, count=20, row=5)


@pytest.mark.parametrize(
    ("begin", "count", "row"), [(0, 1, 0), (5, 32, 3), (SLOTS - 1, 7, 49), (20, SLOTS, 19)]
)
def test_ring_buffer_and_rows(begin: int, count: int, row: int) -> None:
    """Tokens wrap around; rows lie anywhere, up to the last."""
    keys = make_part(states(32, batch=3), make_quantizer(32, 3))
    values = make_part(states(16, batch=3), make_quantizer(16, 3, "prod"))
    check(keys, values, begin, count, row)


def test_source_of_any_strides() -> None:
    x = states(64, batch=2)
    tokens_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    channels_first = x.mT.contiguous().mT
    keys = make_part(tokens_first, make_quantizer(64, 3))
    values = make_part(channels_first, make_quantizer(64, 3))
    check(keys, values, begin=3, count=36, row=0)
    for name in keys.out:
        assert torch.equal(keys.out[name], values.out[name])
    shared = make_part(x[:, :1].expand(-1, 2, -1, -1), make_quantizer(64, 3))
    check(shared, values, begin=3, count=36, row=0)


@pytest.mark.parametrize("max_count", [1, 32, 64])
def test_count_zero_writes_nothing(max_count: int) -> None:
    keys, values = (make_part(states(32), make_quantizer(32, 3, kind)) for kind in ("prod", "mse"))
    append(keys, values, begin=3, count=0, row=4, max_count=max_count)


def test_grid_larger_than_the_count() -> None:
    keys, values = (make_part(states(32), make_quantizer(32, 3, kind)) for kind in ("prod", "mse"))
    append(keys, values, begin=30, count=9, row=4, max_count=200)
    check_equal(keys, 30, 9, 4)
    check_equal(values, 30, 9, 4)


def test_block_by_block_equals_at_once() -> None:
    """A token's row does not depend on its place in a tile or on the tokens beside it."""
    quantizer, x = make_quantizer(64, 3, "prod"), states(64)
    once, blocks = make_part(x, quantizer), make_part(x, quantizer)
    append(once, once, begin=0, count=SLOTS, row=2)
    for first, count in ((0, 5), (5, 1), (6, 31)):
        append(blocks, blocks, begin=first, count=count, row=2 + first)
    for name in once.out:
        assert torch.equal(once.out[name], blocks.out[name])


@pytest.mark.parametrize("kind", ["mse", "prod"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_hostile_vectors(name: str, kind: str) -> None:
    x = DISTRIBUTIONS[name](HEADS * SLOTS, 64).view(1, HEADS, SLOTS, 64).to(DEVICE)
    x[:, :, 3] = 0
    keys = make_part(x, make_quantizer(64, 4, kind), power=0.0, center=False)
    values = make_part(x, make_quantizer(64, 3, kind), power=0.5, center=name != "one_hot")
    check(keys, values, begin=0, count=SLOTS, row=0)
    for rows in (keys.out, values.out if values.statistics.mean is None else keys.out):
        assert (rows["scale"][:, :, 3] == 0).all()


@pytest.mark.parametrize("rule", SCALES)
def test_zeros(rule: str) -> None:
    """Codes and signs of zero vectors are exactly those of the reference."""
    x = torch.zeros(1, HEADS, SLOTS, 64, device=DEVICE)
    keys = make_part(x, make_quantizer(64, 3, "prod", scale=rule))
    values = make_part(x, make_quantizer(64, 8, scale=rule))
    append(keys, values, begin=0, count=SLOTS, row=0)
    for part in (keys, values):
        for name, want in part.quantizer.encode(part.x).items():
            assert torch.equal(part.out[name][:, :, :SLOTS], want)


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_any_unit(unit: float) -> None:
    """Whatever the unit of the first block, as the statistics take it out."""
    keys = make_part(states(64) * unit, make_quantizer(64, 4, "prod"))
    values = make_part(states(64) * unit, make_quantizer(64, 3), power=0.0, center=False)
    check(keys, values, begin=0, count=SLOTS, row=0)


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e-3, 1e3, 1e30])
def test_vectors_of_another_size_than_the_first_block(unit: float) -> None:
    """Codes stay right; scales leave float16 at 0 and at its largest number."""
    statistics = ChannelStatistics(torch.ones(1, HEADS, 1, 1, device=DEVICE))
    quantizer = make_quantizer(64, 4)
    x = states(64) * unit
    keys, values = (make_part(x, quantizer, statistics=statistics) for _ in range(2))
    append(keys, values, begin=0, count=SLOTS, row=0)
    check_valid(keys, 0, SLOTS, 0)
    assert torch.isfinite(keys.out["scale"][:, :, :SLOTS]).all()
    if unit == 1e30:
        assert (keys.out["scale"][:, :, :SLOTS] == 65504).all()


def test_offsets_much_larger_than_the_rest() -> None:
    x = states(64) + 3e4 * torch.linspace(-1, 1, 64, device=DEVICE)
    keys = make_part(x, make_quantizer(64, 4))
    values = make_part(x, make_quantizer(64, 4, "prod"), center=False)
    check(keys, values, begin=0, count=SLOTS, row=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_tokens_harm_only_themselves(bad: float) -> None:
    x = states(32)
    clean = make_part(x, make_quantizer(32, 3, "prod"))
    y = x.clone()
    y[:, :, 7, 5] = bad
    dirty = make_part(y, clean.quantizer, statistics=clean.statistics)
    append(clean, dirty, begin=0, count=SLOTS, row=2)
    assert dirty.out["scale"][:, :, 2 + 7].isnan().all()
    others = [2 + i for i in range(SLOTS) if i != 7]
    for name in clean.out:
        assert torch.equal(clean.out[name][:, :, others], dirty.out[name][:, :, others])


COMPILED = {
    "mse": (("mse", 4, "least_squares", True), ("mse", 3, "unbiased", False)),
    "prod": (("prod", 3, "least_squares", True), ("mse", 8, "norm", False)),
    "query-aware": (("mse", 3, "least_squares", True), ("mse", 3, "unbiased", False)),
}


@pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="Triton came without ptxas")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int, tmp_path: Path) -> None:
    """For head dim 128, and no more than a few registers are spilled to memory."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.test_append_kernel", str(capability)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    usage = run.stdout.splitlines()
    assert len(usage) == len(COMPILED)
    for line in usage:
        stack = int(re.search(r"STACK:(\d+)", line).group(1))
        assert stack <= 96, line


def compile_for(capability: int) -> None:
    """Compile without a GPU, and print what the binaries need."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDriver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoDriver())
    bounds = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    for name, pair in COMPILED.items():
        parts = []
        for kind, bits, scale, center in pair:
            quantizer = make_quantizer(128, bits, kind, scale=scale)
            moment = query_moment(128) if name == "query-aware" and center else None
            x = states(128, torch.bfloat16)
            part = make_part(x, quantizer, center=center, moment=moment)
            parts.append(replace(part, out={k: v.contiguous() for k, v in part.out.items()}))
        arguments, options = kernel_arguments(bounds, 32, *parts)
        scratch = {"p_scratch": torch.zeros(1, device=DEVICE), "first_tile": 0}
        options = FUSED | options
        kernel = append_kernel.warmup(**scratch, **arguments, **options, grid=(1, 1, 2))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(next(line for line in usage.splitlines() if "STACK" in line))


if __name__ == "__main__":
    compile_for(int(sys.argv[1]))
