"""cache.memory(): real bytes, everything counted."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig

from rotorquant_hf import RotorQuantCache, calibrate
from rotorquant_hf.backend import backend, running
from rotorquant_hf.native.library import library
from tests.helpers.models import build, prompt


def fill(
    cache: RotorQuantCache, tokens: int, heads: int = 8, d: int = 128, layers: int = 1
) -> None:
    for layer in range(layers):
        x = torch.randn(1, heads, tokens, d, dtype=torch.bfloat16)
        cache.update(x, x.clone(), layer)


def test_16k_prompt_in_one_update() -> None:
    cache = RotorQuantCache(key_bits=3, value_bits=3)
    fill(cache, 16384)
    report = cache.memory()
    assert report.tokens == 16384
    assert report.uncompressed_bytes == 2 * 8 * 16384 * 128 * 2
    assert report.ratio >= 4.7
    assert report.packed_ratio >= 5.1
    assert report.parts["spare"] / report.total_bytes < 0.02
    assert report.bits_per_number == pytest.approx(16 / report.ratio)


def test_growth_does_not_eat_the_gain() -> None:
    cache = RotorQuantCache(key_bits=3, value_bits=3)
    fill(cache, 4096)
    for _ in range(300):
        fill(cache, 1)
    fill(cache, 1000)
    assert cache.memory().ratio >= 4.2
    assert cache.memory().parts["spare"] / cache.memory().total_bytes < 0.03


def live_bytes() -> int:
    """Bytes of the distinct storages of all live tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            try:
                storage = thing.untyped_storage()
            except NotImplementedError:  # what vmap leaves behind has none of its own
                continue
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"key_quantizer": "prod"}, {"exact_layers": (1,)}])
def test_total_is_what_the_process_holds(options: dict) -> None:
    """The report equals the growth of all tensors of the process, to the byte."""
    warm = RotorQuantCache(key_bits=3, **options)
    fill(warm, 600, heads=2, d=64, layers=2)  # the shared tables exist from here on
    before = live_bytes()
    cache = RotorQuantCache(key_bits=3, **options)
    fill(cache, 600, heads=2, d=64, layers=2)
    for _ in range(3):
        fill(cache, 1, heads=2, d=64, layers=2)
    report = cache.memory()
    assert live_bytes() - before == report.total_bytes - report.parts["tables"]
    assert report.parts["tables"] > 0


def test_a_calibration_counts() -> None:
    """Every cache keeps it, for after a reset."""
    config = build("llama").config
    calibration = calibrate(build("llama"), prompt(3, 100))
    held = sum(x.nbytes for pair in calibration.layers.values() for x in pair)
    cache = RotorQuantCache(config=config, calibration=calibration)
    plain = RotorQuantCache(config=config)
    for each in (cache, plain):
        for layer in range(2):
            each.update(*torch.randn(2, 1, 2, 300, 16), layer)
    grown = cache.memory().parts["statistics"] - plain.memory().parts["statistics"]
    assert grown >= held > 0


def test_layers_left_exact_count_in_full() -> None:
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, hidden_size=1024)
    cache = RotorQuantCache(config=config, exact_layers=(0, -1))
    fill(cache, 500, layers=3)
    report = cache.memory()
    assert report.parts["exact_layers"] == 2 * 2 * 8 * 500 * 128 * 2
    assert report.numbers == 3 * 2 * 8 * 500 * 128


def test_tables_count_once() -> None:
    one, many = RotorQuantCache(), RotorQuantCache()
    fill(one, 500, layers=1)
    fill(many, 500, layers=5)
    assert one.memory().parts["tables"] == many.memory().parts["tables"]


def test_table_is_readable() -> None:
    cache = RotorQuantCache(key_bits=3, value_bits=3)
    fill(cache, 1000)
    text = str(cache.memory())
    report = cache.memory()
    assert f"{report.total_bytes:,}" in text
    assert f"{report.ratio:.2f}x smaller" in text
    assert "key codes" in text
    assert "QJL" not in text  # parts that are not there are not shown
    assert all(len(line) < 90 for line in text.splitlines())
    assert report.to_dict()["parts"]["key_codes"] == report.parts["key_codes"]


def test_what_is_larger_than_uncompressed_is_said() -> None:
    """Of a short text the moments of its queries are held, until it is quantised."""
    model, cache = build("llama"), RotorQuantCache()
    assert "nothing is cached yet" in str(cache.memory())
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
    report = cache.memory()
    assert report.ratio < 1
    assert f"{1 / report.ratio:.2f}x larger (quantised tokens: none)" in str(report)


@pytest.mark.parametrize("name", ["torch", *(["native"] if library() else [])])
def test_what_computes_is_named(name) -> None:
    cache = RotorQuantCache()
    fill(cache, 300)
    with backend(name):
        report = cache.memory()
        assert report.backends == (running("cpu"),)
    assert report.backends[0].startswith(name)
    assert f"computed by {report.backends[0]}" in str(report)
    assert report.to_dict()["backends"] == list(report.backends)


def test_empty_cache() -> None:
    report = RotorQuantCache().memory()
    assert report.backends == ()
    assert report.total_bytes == 0
    assert "0 tokens" in str(report)
