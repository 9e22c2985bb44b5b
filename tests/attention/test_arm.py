"""The native library on a 64-bit ARM processor, with its vector instructions, in an emulator."""

from __future__ import annotations

import pytest
import torch

from rotorquant_hf.attention import native_attention
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.store import native_append, native_statistics
from tests.attention import test_native_attention as attention
from tests.helpers.arm import Arm, compiled
from tests.store import test_native_append as append
from tests.store import test_statistics as statistics


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("arm"))


@pytest.fixture
def arm(path, monkeypatch) -> Arm:
    processor = Arm(path)
    for module in (native_attention, native_append, native_statistics):
        monkeypatch.setattr(module, "library", lambda: processor)
    return processor


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [64, 40])
def test_bits(arm, d, bits, quantizer) -> None:
    key_bits = max(bits, 2 if quantizer == "prod" else 1)
    options = {"key_quantizer": quantizer, "key_bits": key_bits, "value_bits": bits}
    keys, values = attention.states(90, d, d, 1, **options)
    for n, group in ((1, 1), (1, 3), (1, 4), (2, 4)):
        query = attention.queries(n, d, 1, group)
        attention.check(query, keys, values, AttentionOptions(d**-0.5))
    assert arm.calls["attend"] == 4


@pytest.mark.parametrize("option", attention.OPTIONS)
def test_options(arm, option) -> None:
    torch.manual_seed(0)
    keys, values = attention.states(120, 128, 128, key_bits=3, value_bits=4)
    more = attention.OPTIONS[option](3, keys.shape[2])
    attention.check(attention.queries(3, 128), keys, values, AttentionOptions(0.1, **more))
    assert arm.calls["attend"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(arm, dtype) -> None:
    keys, values = attention.states(90, dtype=dtype)
    query, atol = attention.queries(1, 64, dtype=dtype), 2 * torch.finfo(dtype).eps
    attention.check(query, keys, values, AttentionOptions(0.125), atol=atol)
    assert arm.calls["attend"] == 1


@pytest.mark.parametrize("kind", ["mse", "prod"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_coding(arm, bits, kind) -> None:
    x = append.states(40, 64)
    quantizer = append.make_quantizer(64, bits, kind)
    append.check(x, quantizer, append.statistics_of(x, bits), None)
    append.check_aware(x, quantizer, append.statistics_of(x, bits, aware=True), None)
    append.test_the_hessian_turns(None, 40, 20, "half", 1500)
    assert arm.calls["append"] == 5


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("d", "pairs"), [(31, 9), (64, 32)])
def test_statistics(arm, d, pairs, layout) -> None:
    statistics.test_moment_before_rope(None, d, pairs, layout)
    statistics.test_hessian(None, d, pairs, layout, 0.5)
    for center in (True, False, "auto"):
        statistics.test_block_that_rope_turned(None, d, pairs, layout, center)
    assert arm.calls == {"moment": 2, "block": 9, "hessian": 3}
