"""The attention kernels against a float64 reference, on the device there is or the interpreter."""

import dataclasses
import math

import pytest
import torch

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention import triton_attention
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.attention.triton_attention import Tiling, attend_packed, choose_tiling
from rotorquant_hf.kernels.combine import Combine, combine_options
from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.store.kv_store import RotorQuantKVCache
from tests.helpers.launches import H100

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts float32 off to bfloat16 where hardware rounds: twice the rounding error,
# which is 3.3e-3 +- 0.3e-3 here.
BFLOAT16 = 2e-3 if DEVICE == "cuda" else 5e-3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: BFLOAT16}


def states(
    dk=64, dv=64, tokens=70, sinks=4, tail=20, batch=2, heads=2, dtype=torch.float32, **options
):
    """Random cached keys and values with channels of different size, and one-token outliers."""
    store = RotorQuantKVCache(dk, dv, config=RotorQuantConfig(**options), device=DEVICE)

    def draw(count, d):
        x = torch.randn(batch, heads, count, d, device=DEVICE)
        return (x * (1 + torch.arange(d, device=DEVICE) % 5)).to(dtype)

    spread = torch.randn(batch, heads, tokens, 1, device=DEVICE).exp()
    store.append(draw(tokens, dk), (draw(tokens, dv) * spread).to(dtype))
    keys = CachedStates(draw(sinks, dk), store.keys.span(), draw(tail, dk))
    values = CachedStates(draw(sinks, dv), store.values.span(), draw(tail, dv))
    return keys, values


def exact(cached):
    packed = torch.empty(cached.packed.shape, device=DEVICE)
    cached.packed.materialize(packed)
    return torch.cat((cached.sinks.double(), packed.double(), cached.recent.double()), dim=2)


def error(query, keys, values, options, tiling=None):
    """|out - reference| / |reference|, with `out` from poisoned memory."""
    out = attend_packed(query, keys, values, options, tiling)
    assert out.dtype == query.dtype
    assert out.shape == (*query.shape[:3], values.shape[3])
    wanted = attention_reference(query.double(), exact(keys), exact(values), options)
    return float((out.double() - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def _poisoned(request, monkeypatch):
    """Memory handed out is NaN: what a kernel forgets to write shows."""
    if request.config.getoption("--emulate", None):
        return  # the emulator follows what is written, and would see this
    real = torch.Tensor.new_empty

    def new_empty(self, *size, **kwargs):
        out = real(self, *size, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out.fill_(113)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def query(dk=64, n=1, heads=4, batch=2, dtype=torch.float32):
    return (torch.randn(batch, heads, n, dk, device=DEVICE) / 3).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("key_bits", range(1, 9))
def test_widths(key_bits, dtype):
    value_bits = 9 - key_bits
    keys, values = states(key_bits=key_bits, value_bits=value_bits, dtype=dtype)
    options = AttentionOptions(scale=0.125)
    assert error(query(dtype=dtype), keys, values, options) < TOLERANCE[dtype]


@pytest.mark.parametrize("value_bits", [2, 3, 4])
@pytest.mark.parametrize("dk", [64, 128])
def test_wide_keys(dk, value_bits):
    """As layers have them that need 8 bits, beside the values of the presets."""
    keys, values = states(dk, dk, tokens=40, heads=1, key_bits=8, value_bits=value_bits)
    found = error(query(dk, heads=3), keys, values, AttentionOptions(scale=dk**-0.5))
    assert found < TOLERANCE[torch.float32]


@pytest.mark.parametrize("qjl_dim", [None, 40, 200])
@pytest.mark.parametrize("key_bits", [2, 3, 5])
def test_keys_with_signs(key_bits, qjl_dim):
    options = {"key_quantizer": "prod", "key_bits": key_bits, "qjl_dim": qjl_dim}
    for dtype in (torch.float32, torch.float16):
        keys, values = states(dtype=dtype, **options)
        found = error(query(dtype=dtype), keys, values, AttentionOptions(scale=0.125))
        assert found < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dk", "dv"),
    [(8, 8), (80, 80), (96, 96), (112, 64), (128, 128), (192, 128), (256, 256), (576, 512)],
)
def test_head_dims(dk, dv):
    # In float32 larger heads go through torch: their tiles would not fit into an A100.
    for dtype in (torch.float32, torch.float16) if dk <= 512 else (torch.float16,):
        keys, values = states(dk, dv, tokens=40, tail=5, heads=1, key_bits=3, dtype=dtype)
        options = AttentionOptions(scale=dk**-0.5)
        found = error(query(dk, heads=3, dtype=dtype), keys, values, options)
        assert found < TOLERANCE[dtype]


@pytest.mark.parametrize("n", [2, 5, 37])
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_several_queries_and_groups(n, heads):
    keys, values = states(tail=40)
    options = AttentionOptions(scale=0.125, causal=True)
    assert error(query(n=n, heads=heads), keys, values, options) < 1e-5


@pytest.mark.parametrize("tokens", [20, 150], ids=["few splits", "many"])
@pytest.mark.parametrize(("n", "kind"), [(1, "few"), (9, "some"), (32, "many")])
@pytest.mark.parametrize(("dk", "dv"), [(16, 16), (64, 80)])
def test_rows_that_are_combined_together(dk, dv, n, kind, tokens):
    """`combine` is compiled for few rows, for some, and for many; also of odd head dims."""
    options = combine_options(dv, 2 * 8 * n)
    assert options["TENSOR_CORES"] == (kind == "many")
    assert (options["STATS"] > 16) == (kind == "few")
    keys, values = states(dk, dv, tokens=tokens, tail=35, key_bits=2, value_bits=5)
    asked = AttentionOptions(scale=0.25, causal=n > 1)
    splits = 3 if tokens == 20 else 21
    # Attention itself in few programs: each takes as many rows as it can.
    tiling = Tiling(16 if n == 1 else 64, 16, 16, splits, warps=4, stages=2, exact_splits=2)
    assert error(query(dk, n=n, heads=8), keys, values, asked, tiling) < 1e-5


@pytest.mark.parametrize("mask", [None, "by query", "shared"])
def test_many_queries_are_taken_some_at_a_time(mask, monkeypatch):
    most = 5 * 2 * 2 * 4 * 64  # the partial results of five queries, from two splits
    monkeypatch.setattr(triton_attention, "_MAX_SUMS", most)
    one = triton_attention.Device(1, 1 << 17)  # whose default is two splits
    monkeypatch.setattr(triton_attention.Device, "of", lambda _: one)
    sums, real = [], Combine.__call__
    monkeypatch.setattr(Combine, "__call__", lambda *args: sums.append(args[1]) or real(*args))
    keys, values = states()
    if mask is not None:
        mask = torch.rand(1, 1, 12 if mask == "by query" else 1, 94, device=DEVICE) > 0.4
    options = AttentionOptions(scale=0.125, mask=mask, causal=mask is None)
    assert error(query(n=12), keys, values, options) < 1e-5
    assert len(sums) == 3
    assert all(x.numel() <= most for x in sums)
    del sums[:]
    tiling = Tiling(16, 16, 16, splits=3, warps=4, stages=1, exact_splits=2)
    assert error(query(n=12), keys, values, options, tiling) < 1e-5
    assert len(sums) == 6
    assert all(x.numel() <= most for x in sums)


def test_rows_and_heads_lie_along_the_axis_of_a_grid_that_is_long_enough(monkeypatch):
    """Batch times heads may be more than 65,535, where the other axes end."""
    grids = []
    real = Launch.__call__

    def recorded(self, grid, *changing):
        grids.append(grid)
        real(self, grid, *changing)

    monkeypatch.setattr(Launch, "__call__", recorded)
    keys, values = states()
    attend_packed(query(n=3), keys, values, AttentionOptions(scale=0.125))
    assert len(grids) == 3
    assert {grid[1:] for grid in grids} == {(1, 1)}


MASKS = {
    "shared": (1, 1, 1, 94),
    "by row": (2, 1, 3, 94),
    "by head": (2, 4, 3, 94),
    "by query": (1, 1, 3, 94),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(kind, shape):
    keys, values = states()
    mask = torch.rand(shape, device=DEVICE) > 0.4
    if kind == "added":
        mask = torch.randn(shape, device=DEVICE) * 3
    options = AttentionOptions(scale=0.125, mask=mask)
    assert error(query(n=3), keys, values, options) < 1e-5


def test_left_padding_and_rows_that_see_nothing():
    keys, values = states()
    mask = torch.arange(94, device=DEVICE) >= torch.tensor([[50], [90]], device=DEVICE)
    mask = mask[:, None, None].repeat(1, 1, 3, 1)
    mask[1, :, 1] = False
    options = AttentionOptions(scale=0.125, mask=mask)
    q = query(n=3)
    assert error(q, keys, values, options) < 1e-5
    out = attend_packed(q, keys, values, options)
    assert torch.equal(out[1, :, 1], torch.zeros_like(out[1, :, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_softcap_and_learned_sinks(dtype):
    keys, values = states(dtype=dtype)
    q = query(n=2, dtype=dtype)
    plain = attend_packed(q, keys, values, AttentionOptions(scale=0.125)).float()
    for extra in ({"softcap": 2.0}, {"sink_logits": 3 + torch.rand(4, device=DEVICE)}):
        options = AttentionOptions(scale=0.125, **extra)
        assert error(q, keys, values, options) < TOLERANCE[dtype]
        changed = attend_packed(q, keys, values, options).float()
        assert (changed - plain).norm() > 0.03 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [(0, 70, 0), (0, 3, 5), (4, 70, 0), (1, 0, 30)], ids=str)
def test_parts_may_be_empty(parts, dtype):
    sinks, tokens, tail = parts
    keys, values = states(tokens=max(tokens, 1), sinks=sinks, tail=tail, dtype=dtype)
    if not tokens:
        keys, values = (
            CachedStates(
                x.sinks,
                type(x.packed)(
                    {k: v[:, :, :0] for k, v in x.packed.rows.items()},
                    x.packed.statistics,
                    x.packed.quantizer,
                ),
                x.recent,
            )
            for x in (keys, values)
        )
    options = AttentionOptions(scale=0.125)
    assert error(query(dtype=dtype), keys, values, options) < TOLERANCE[dtype]


@pytest.mark.parametrize("exact_splits", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("blocks", [(16, 16, 16), (16, 64, 32), (32, 32, 16)])
def test_tilings_agree(splits, exact_splits, blocks):
    keys, values = states(tokens=150, tail=33, batch=1)
    tiling = Tiling(*blocks, splits, warps=4, stages=2, exact_splits=exact_splits)
    options = AttentionOptions(scale=0.125, causal=True)
    assert error(query(n=5, batch=1), keys, values, options, tiling) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_centred_keys(dtype):
    keys, values = states(center_keys=True, dtype=dtype)
    assert keys.packed.statistics.mean is not None
    options = AttentionOptions(scale=0.125)
    assert error(query(dtype=dtype), keys, values, options) < TOLERANCE[dtype]


@pytest.mark.parametrize("unit", [1e-8, 1e8], ids=["tiny", "huge"])
@pytest.mark.parametrize("options", [{}, {"key_quantizer": "prod"}], ids=["mse", "prod"])
def test_queries_of_any_unit(unit, options):
    """Their products with the keys are as ever, though float16 would not hold the queries."""
    keys, values = states(dtype=torch.bfloat16, **options)
    queries = (query() * unit).bfloat16()
    found = error(queries, keys, values, AttentionOptions(scale=0.125 / unit))
    assert found < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("unit", [1e-4, 1e4], ids=["tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_units_of_the_model_do_not_matter(unit, dtype):
    """Keys, values and queries of any unit: nothing leaves float16 on the way."""
    torch.manual_seed(1)
    store = RotorQuantKVCache(64, 64, device=DEVICE)
    k, v = torch.randn(2, 1, 2, 90, 64, device=DEVICE) * unit
    store.append(k, v)
    empty = k[:, :, :0].to(dtype)
    keys = CachedStates(empty, store.keys.span(), empty)
    values = CachedStates(empty, store.values.span(), empty)
    q = (torch.randn(1, 2, 1, 64, device=DEVICE) / unit).to(dtype)
    assert error(q, keys, values, AttentionOptions(scale=0.125)) < TOLERANCE[dtype]


def test_values_much_smaller_or_larger_than_those_before():
    """Scales of one cache may differ by 2^30: the sums keep the largest product near 1."""
    store = RotorQuantKVCache(64, 64, device=DEVICE)
    k, v = torch.randn(2, 1, 2, 90, 64, device=DEVICE)
    v *= torch.where(torch.arange(90, device=DEVICE) < 45, 3e2, 3e-5)[:, None]
    store.append(k, v)
    empty = k[:, :, :0].half()
    keys = CachedStates(empty, store.keys.span(), empty)
    values = CachedStates(empty, store.values.span(), empty)
    for seen in (slice(0, 45), slice(45, 90), slice(0, 90)):
        mask = torch.zeros(1, 1, 1, 90, dtype=torch.bool, device=DEVICE)
        mask[..., seen] = True
        options = AttentionOptions(scale=0.125, mask=mask)
        # The small ones are subnormal scales: compared in float32, as float16 output cannot hold
        # them. One zero scale among them must not hide a token's mass.
        q = query(batch=1, heads=2)
        assert error(q, *(_in_float32(x) for x in (keys, values)), options) < 1e-5


def _in_float32(cached):
    return CachedStates(cached.sinks.float(), cached.packed, cached.recent.float())


def test_one_zero_value_keeps_its_mass():
    store = RotorQuantKVCache(64, 64, device=DEVICE)
    k, v = torch.randn(2, 1, 1, 40, 64, device=DEVICE)
    v[:, :, 7] = 0
    store.append(k, v)
    assert float(store.values.span().rows["scale"][0, 0, 7]) == 0
    empty = k[:, :, :0]
    keys = CachedStates(empty, store.keys.span(), empty)
    values = CachedStates(empty, store.values.span(), empty)
    q = k[:, :, 7:8].repeat(1, 2, 1, 1)  # looks at the zero value
    assert error(q, keys, values, AttentionOptions(scale=0.25)) < 1e-5


def test_strided_queries():
    """Models hand over transposed views."""
    keys, values = states()
    q = query(n=3).transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert error(q, keys, values, AttentionOptions(scale=0.125)) < 1e-5


def test_default_tiling_covers_the_rows_and_fills_the_processors():
    def choose(rows, programs, tokens, dtype=torch.float16, **options):
        return choose_tiling(rows, programs, tokens, (128, 128), (3, 3), H100, dtype, **options)

    def tiling(d, bits, rows=4, device=H100):
        return choose_tiling(rows, 8, 4096, (d, d), (bits, bits), device, torch.float16)

    def pairs(*args):
        return tiling(*args).pairs

    assert (pairs(128, 4), pairs(256, 4)) == (1, 1)
    assert (pairs(128, 3), pairs(256, 3), pairs(64, 4)) == (2, 2, 2)  # warps share the tokens
    assert (pairs(64, 3), pairs(64, 2), pairs(32, 4)) == (2, 2, 2)  # as columns of a product
    # Half in vain; many rows; not looked up so.
    assert (pairs(32, 3), pairs(128, 4, 64), pairs(128, 8)) == (0, 0, 0)
    # A part of a step would have fewer tokens than a product takes.
    mixed = choose_tiling(4, 8, 4096, (288, 128), (3, 3), H100, torch.float16)
    assert (mixed.warps, mixed.block_n, mixed.pairs) == (4, 16, 0)

    assert all(tiling(*x).block_n == 128 for x in ((64, 2), (64, 4), (128, 2)))
    assert all(tiling(*x).block_n == 64 for x in ((64, 8), (80, 4), (128, 3), (64, 3, 64)))

    assert all(tiling(*x).integers for x in ((128, 2), (128, 4), (80, 3), (64, 4)))
    # Too few columns, too many, not looked up so, many rows; and a GPU that has lost them.
    assert not any(tiling(*x).integers for x in ((64, 3), (256, 3), (128, 8), (128, 3, 64)))
    b200 = dataclasses.replace(H100, integers=False)
    assert not tiling(128, 3, device=b200).integers
    small = choose(4, 8, 4096)
    assert small.block_m == 8
    assert small.splits == 4096 // 256
    # Eight programs a processor: 1056 in a wave, with the one of each head for exact tokens.
    assert -(choose(4, 8, 1 << 20).splits + 1) % (1056 // 8) < 6  # hardly any is left empty
    assert choose(4, 8, 1 << 20, signs=True).splits < choose(4, 8, 1 << 20).splits
    assert choose(4, 64, 32768).splits + 1 in (1056 // 64, 2 * 1056 // 64, 3 * 1056 // 64)
    assert choose(4096, 8, 1 << 20).splits <= 4
    assert choose(4096, 8, 1 << 20).block_m == 64
    assert choose(4, 256, 1 << 20, torch.float32).block_m == 16


@pytest.mark.parametrize("programs", [1, 7, 64, 100, 256, 1000, 5000])
@pytest.mark.parametrize("tokens", [1, 100, 4000, 33000])
def test_splits_leave_no_wave_almost_empty(programs, tokens):
    """The last wave is well used, or the work of a program is small."""
    splits = choose_tiling(4, programs, tokens, (128, 128), (3, 3), H100, torch.float16).splits
    assert 1 <= splits <= max(1, math.ceil(tokens / 256))
    waves = programs * (splits + 1) / 1056
    steps = math.ceil(math.ceil(tokens / splits) / 64)
    assert math.ceil(waves) * (steps + 2) <= 1.6 * max(waves * (steps + 2), steps + 2, 4)
