"""The native library beside attention in torch and in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf import backend as asked
from rotorquant_hf.attention.dispatch import attend
from rotorquant_hf.attention.native_attention import attend_native, native_takes
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.attention.torch_attention import attend_tiled
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.native.library import LEVELS, library
from tests.conftest import ROOT
from tests.helpers.lossless import lossless
from tests.helpers.models import build, feed, prompt

LIBRARY = library()
assert LIBRARY is not None, "the native library was not compiled: pip install -e . with a compiler"
HERE = LEVELS[LEVELS.index(LIBRARY.level) :]
BATCH, HEADS, GROUP = 2, 3, 4
NOW = {"residual_length": 16, "block_length": 8, "statistics_length": 0, "query_aware": False}


def states(tokens=300, d_key=64, d_value=64, batch=BATCH, dtype=torch.float32, **options):
    """Keys and values of which most are packed."""
    generator = torch.Generator().manual_seed(0)
    layer = RotorQuantLayer(RotorQuantConfig(**NOW | options))
    new = [torch.randn(batch, HEADS, tokens, d, generator=generator) for d in (d_key, d_value)]
    layer.update(*(x.to(dtype) for x in new))
    return layer.keys.states, layer.values.states


def queries(n, d, batch=BATCH, group=GROUP, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, HEADS * group, n, d, generator=generator).to(dtype)


def check(query, keys, values, options, level=None, atol=2e-6) -> None:
    wanted = attend_tiled(query, keys, values, options)
    found = attend_native(query, keys, values, options, level)
    assert found.dtype == wanted.dtype
    scale = float(wanted.float().abs().max().clamp(min=1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * scale)


OPTIONS = {
    "plain": lambda n, tokens: {},
    "causal": lambda n, tokens: {"causal": True},
    "soft-capped": lambda n, tokens: {"softcap": 3.0, "causal": True},
    "sink logits": lambda n, tokens: {"sink_logits": torch.randn(HEADS * GROUP)},
    "a mask": lambda n, tokens: {"mask": torch.rand(BATCH, 1, n, tokens) < 0.5},
    "an added mask": lambda n, tokens: {"mask": torch.randn(BATCH, HEADS * GROUP, n, tokens)},
    "a mask in 16 bits": lambda n, tokens: {"mask": torch.randn(n, tokens).bfloat16()},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("level", HERE)
def test_options(level, n, option) -> None:
    torch.manual_seed(0)
    keys, values = states(key_bits=3, value_bits=4)
    more = OPTIONS[option](n, keys.shape[2])
    check(queries(n, 64), keys, values, AttentionOptions(0.125, **more), level)


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [64, 128, 40])
@pytest.mark.parametrize("level", HERE)
def test_bits(level, d, bits, quantizer) -> None:
    key_bits = max(bits, 2 if quantizer == "prod" else 1)
    keys, values = states(90, d, d, 1, key_quantizer=quantizer, key_bits=key_bits, value_bits=bits)
    for group in (1, 2, 3, 4, 5):
        check(queries(1, d, 1, group), keys, values, AttentionOptions(d**-0.5), level)


@pytest.mark.parametrize("packed", [1, 2, 3, 31, 33, 35, 64])
@pytest.mark.parametrize("level", HERE)
def test_packed_tokens_of_any_number(level, packed) -> None:
    """Tiles of four tokens at a time, of which the last may not be full."""
    keys, values = states(packed + 20, 64, 64, 1, block_length=1)
    assert keys.packed.shape[2] == packed
    for group in (1, 4):
        check(queries(1, 64, 1, group), keys, values, AttentionOptions(0.125), level)


@pytest.mark.parametrize(
    ("d_key", "d_value"),
    [(8, 8), (16, 8), (24, 32), (9, 31), (80, 96), (256, 16), (576, 512), (100, 575)],
)
@pytest.mark.parametrize("level", HERE)
def test_head_dims(level, d_key, d_value) -> None:
    keys, values = states(90, d_key, d_value, 1, key_bits=3, value_bits=2)
    check(queries(1, d_key, 1), keys, values, AttentionOptions(d_key**-0.5), level)


@pytest.mark.parametrize("group", [1, 2, 5, 7])
@pytest.mark.parametrize("tokens", [28, 29, 60, 2100])
def test_rows_and_shares(tokens, group) -> None:
    """One packed block and more, groups of queries and rests, shares of threads."""
    keys, values = states(tokens, 32, 32)
    assert keys.packed.shape[2] > 0
    for level in HERE:
        check(queries(1, 32, group=group), keys, values, AttentionOptions(0.2), level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", HERE)
def test_16_bits(level, dtype) -> None:
    keys, values = states(dtype=dtype)
    query = queries(3, 64, dtype=dtype)
    atol = 2 * torch.finfo(dtype).eps
    check(query, keys, values, AttentionOptions(0.125), level, atol)


@pytest.mark.parametrize("level", HERE)
def test_beside_float64(level) -> None:
    keys, values = states(key_bits=3, value_bits=3)
    query, options = queries(2, 64), AttentionOptions(0.125, causal=True)
    wanted = attention_reference(
        query.double(), keys.materialize().double(), values.materialize().double(), options
    )
    found = attend_native(query, keys, values, options, level).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e3, 1e12])
def test_queries_of_any_unit(factor, level) -> None:
    keys, values = states()
    check(factor * queries(1, 64), keys, values, AttentionOptions(0.125), level, 1e-5)


@pytest.mark.parametrize("shape", ["causal", "mask", "window", "both"])
@pytest.mark.parametrize("n", [1, 20, 70, 200])
@pytest.mark.parametrize("level", HERE)
def test_tiles_that_no_query_sees(level, n, shape) -> None:
    """Packed or not, of a future that some queries of a block have, and of a past out of sight."""
    keys, values = states(600, 32, 32)
    tokens = keys.shape[2]
    i, j = torch.arange(tokens - n, tokens)[:, None], torch.arange(tokens)
    masks = {"mask": j <= i - 40, "window": (j <= i) & (j > i - 50), "both": j > i - 100}
    options = {"causal": shape in ("causal", "both")}
    if shape in masks:
        options["mask"] = masks[shape].expand(BATCH, 1, n, tokens)
    check(queries(n, 32), keys, values, AttentionOptions(0.2, **options), level)


@pytest.mark.parametrize("level", HERE)
def test_a_query_that_sees_nothing(level) -> None:
    keys, values = states()
    mask = torch.ones(BATCH, 1, 2, keys.shape[2], dtype=torch.bool)
    mask[0, :, 1] = False
    options = AttentionOptions(0.125, mask=mask)
    found = attend_native(queries(2, 64), keys, values, options, level)
    assert (found[0, :, 1] == 0).all()
    assert found[0, :, 0].abs().min() > 0
    check(queries(2, 64), keys, values, options, level)


@pytest.mark.parametrize("level", HERE)
def test_nan_stays_with_its_row(level) -> None:
    keys, values = states()
    query, options = queries(2, 64), AttentionOptions(0.125)
    wanted = attend_native(query, keys, values, options, level)
    query[1, 5, 1] = math.nan
    found = attend_native(query, keys, values, options, level)
    assert found[1, 5, 1].isnan().all()
    found[1, 5, 1] = wanted[1, 5, 1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("level", HERE)
def test_nan_of_one_token_is_not_lost(level) -> None:
    keys, values = states()
    mask = torch.zeros(BATCH, HEADS * GROUP, 2, keys.shape[2])
    for token in (2, 100, -1):  # a sink, a packed one, a recent one
        mask[1, 5, 1] = 0
        mask[1, 5, 1, token] = math.nan
        options = AttentionOptions(0.125, mask=mask)
        found = attend_native(queries(2, 64), keys, values, options, level)
        wanted = attend_tiled(queries(2, 64), keys, values, options)
        assert found[1, 5, 1].isnan().all()
        assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("level", HERE)
def test_no_rows_and_no_queries(level) -> None:
    keys, values = states()
    options = AttentionOptions(0.125)
    assert attend_native(queries(0, 64), keys, values, options, level).shape == (2, 12, 0, 64)
    none = [
        CachedStates(x.sinks[:0], replace(x.packed, rows=first_rows(x, 0)), x.recent[:0])
        for x in (keys, values)
    ]
    assert attend_native(queries(3, 64, 0), *none, options, level).shape == (0, 12, 3, 64)


def first_rows(of, count) -> dict[str, Tensor]:
    return {name: x[:count] for name, x in of.packed.rows.items()}


def test_views_of_queries_and_masks() -> None:
    keys, values = states()
    query = queries(3, 64).transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.randn(keys.shape[2], 3).T.expand(BATCH, 1, 3, -1)
    check(query, keys, values, AttentionOptions(0.125, mask=mask))
    check(queries(3, 128)[..., ::2], keys, values, AttentionOptions(0.125))


def test_many_queries_go_in_rounds() -> None:
    keys, values = states(60, 16, 16)
    check(queries(800, 16), keys, values, AttentionOptions(0.25))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_torch(threads) -> None:
    keys, values = states(3000, 32, 32, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            check(queries(1, 32, 1), keys, values, AttentionOptions(0.2))
    finally:
        torch.set_num_threads(before)


def test_threads_of_python() -> None:
    keys, values = states()
    options, query = AttentionOptions(0.125), queries(2, 64)
    wanted, found = attend_native(query, keys, values, options), []
    threads = [
        threading.Thread(
            target=lambda: found.extend(
                attend_native(query, keys, values, options) for _ in range(20)
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for x in found:
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6)


# --- which one computes ---


def test_the_library_computes_on_the_cpu_unless_told_otherwise(monkeypatch) -> None:
    keys, values = states()
    query, options, calls = queries(1, 64), AttentionOptions(0.125), []
    monkeypatch.setattr(
        "rotorquant_hf.attention.dispatch.attend_native", lambda *args: calls.append(args)
    )
    attend(query, keys, values, options)
    with backend("native"):
        attend(query, keys, values, options)
    assert len(calls) == 2
    with backend("torch"):
        attend(query, keys, values, options)
    assert len(calls) == 2
    assert asked.running("cpu") == f"native ({LIBRARY.level})"
    with backend("torch"):
        assert asked.running("cpu") == "torch"


def test_what_it_does_not_take_goes_to_torch() -> None:
    keys, values = states(dtype=torch.float64)
    assert not native_takes(queries(1, 64), keys, values)
    keys, values = states()
    assert not native_takes(queries(1, 64, dtype=torch.float64), keys, values)
    assert native_takes(queries(1, 64), keys, values)


def test_any_quantiser_of_few_terms() -> None:
    with lossless():
        keys, values = states(200, 32, 32)
        assert native_takes(queries(1, 32), keys, values)
        query, options = queries(2, 32), AttentionOptions(0.2)
        found = attend_native(query, keys, values, options)
        wanted = attention_reference(query, keys.materialize(), values.materialize(), options)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_a_span_without_sinks_or_recent_tokens() -> None:
    keys, values = states()
    none = [CachedStates(x.sinks[:, :, :0], x.packed, x.recent[:, :, :0]) for x in (keys, values)]
    check(queries(1, 64), *none, AttentionOptions(0.125))


def test_without_the_library_torch_computes() -> None:
    code = (
        "from rotorquant_hf import backend; assert backend.running('cpu') == 'torch'\n"
        "import pytest\n"
        "with pytest.raises(RuntimeError, match='no native library'):\n"
        "    backend.backend('native').__enter__()\n"
        "from tests.helpers.models import build, feed, prompt\n"
        "from rotorquant_hf import RotorQuantCache\n"
        "cache = RotorQuantCache(statistics_length=0, residual_length=8, block_length=4)\n"
        "assert feed(build('llama'), cache, prompt(1, 60), (40, 1)).isfinite().all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"ROTORQUANT_NATIVE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_models_compute_the_same(name) -> None:
    model, ids = build(name, "rotorquant"), prompt(2, 60)
    logits = []
    for computes in ("native", "torch"):
        cache = RotorQuantCache("k4v4", config=model.config, **NOW)
        with backend(computes):
            logits.append(feed(model, cache, ids, (40, 1, 1, 9, 1)))
        assert cache.memory().packed_numbers > 0
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4 * float(logits[1].abs().max()))
