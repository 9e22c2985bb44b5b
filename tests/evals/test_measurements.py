"""Memory, speed and text agreement."""

from __future__ import annotations

import copy
import json

import accelerate
import pytest
import torch
from transformers import DynamicCache

from evals.__main__ import main
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from evals.failures import Failure
from evals.measurements import speed
from evals.measurements.agreement import (
    AgreementMeasurement,
    AgreementOptions,
    agreement_length,
    continuation,
)
from evals.measurements.memory import MemoryOptions, measure
from evals.measurements.registry import MEASUREMENTS
from evals.measurements.speed import SpeedOptions
from evals.probes.footprint import peak_bytes
from evals.subjects.models import LoadedModel, ModelOptions
from evals.subjects.twins import add_key_bias, scale_key_channels
from rotorquant_hf import RotorQuantCache
from tests.conftest import MODEL, ROOT

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")


@pytest.fixture(scope="module")
def loaded(model, tokenizer) -> LoadedModel:
    return LoadedModel(model, tokenizer, ModelOptions(model=str(MODEL)))


def test_peak_is_what_was_in_use_at_once() -> None:
    def work() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(3 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(2 << 20, dtype=torch.uint8)
        del b, c
        torch.empty(4 << 20, dtype=torch.uint8)

    assert peak_bytes(work, [torch.device("cpu")]) == 5 << 20


def test_the_peak_of_an_offloaded_model_is_that_of_its_gpus(monkeypatch) -> None:
    """Its other weights are on the CPU, or on the disk with placeholders on "meta"."""
    used = {"cuda:0": [5, 9], "cuda:1": [7, 8]}

    def of(device: torch.device, which: int = 0) -> int:
        assert device.type == "cuda"
        return used[str(device)][which]

    monkeypatch.setattr(torch.cuda, "memory_allocated", of)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: of(device, 1))
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, of)
    devices = [torch.device(name) for name in ("meta", "cuda:0", "cpu", "cuda:1")]
    assert peak_bytes(lambda: None, devices) == 4 + 1


def test_a_model_with_offloaded_weights_is_measured_as_another(loaded) -> None:
    """Perplexity and lm-eval: the same figures, to the last bit."""
    offloaded = accelerate.cpu_offload(copy.deepcopy(loaded.model))
    assert offloaded.device.type == "meta"
    twin = LoadedModel(offloaded, loaded.tokenizer, loaded.options)
    spec = CacheSpec.of("k2v2", {"residual_length": 16, "statistics_length": 0})
    for name, values in {
        "perplexity": {"text": (TEXT,), "max_tokens": 220, "window": 220},
        "lm_eval": {"tasks": ("rotorquant_rhymes",), "limit": 1},
    }.items():
        measurement = MEASUREMENTS[name]
        options = measurement.options(**values)
        expected, found = (measurement.prepare(x, options, 0)([spec])[0] for x in (loaded, twin))
        assert not isinstance(expected, Failure)
        assert found == expected


def test_offloaded_weights_make_no_twin(loaded) -> None:
    offloaded = accelerate.cpu_offload(copy.deepcopy(loaded.model))
    for make in (lambda: scale_key_channels(offloaded, 10), lambda: add_key_bias(offloaded, 5, 0)):
        with pytest.raises(InputError, match="offloaded, and a twin has others: load it with"):
            make()


def test_memory_of_the_baseline_is_what_its_numbers_take(loaded) -> None:
    options = MemoryOptions(context=(60, 120), batch=(1, 3), new_tokens=4)
    points = measure(loaded, CacheSpec.of("dynamic"), options)["points"]
    assert [(p["batch"], p["context"]) for p in points] == [(1, 60), (1, 120), (3, 60), (3, 120)]
    for p in points:
        tokens = p["batch"] * (p["context"] + 4)
        assert p["cache_bytes"] == tokens * 8 * 2 * 64 * 2 * 4
        assert p["peak_prefill_bytes"] > p["cache_bytes"] * p["context"] / (p["context"] + 4)
        # The whole history of a layer is copied at every step.
        assert p["peak_decode_bytes"] > p["cache_bytes"] / 8 / 2


def test_memory_of_a_compressed_cache_is_its_own_count(loaded) -> None:
    options = MemoryOptions(context=(400,), new_tokens=4)
    spec = CacheSpec.of(
        "k2v2", {"residual_length": 32, "statistics_length": 0, "query_aware": False}
    )
    (point,) = measure(loaded, spec, options)["points"]
    assert point["cache_bytes"] == sum(point["parts"].values())
    assert point["parts"]["key_codes"] == point["parts"]["value_codes"] > 0
    plain = measure(loaded, CacheSpec.of("dynamic"), options)["points"][0]
    assert point["cache_bytes"] < 0.25 * plain["cache_bytes"]
    assert point["peak_prefill_bytes"] < plain["peak_prefill_bytes"]


def test_memory_in_16_bits_is_that_of_a_16_bit_model(loaded) -> None:
    """Counted beside a float32 model as on the model in bfloat16, and first."""
    options = MemoryOptions(context=(300,), batch=(2,), new_tokens=2)
    half = LoadedModel(copy.deepcopy(loaded.model).bfloat16(), loaded.tokenizer, loaded.options)
    names = ["cache_bytes", "bits_per_number", "packed_bits_per_number"]
    for name in ("k3v3", "quanto"):
        spec = CacheSpec.of(name)
        (point,) = measure(loaded, spec, options)["points"]
        (own,) = measure(half, spec, options)["points"]
        for figure in names:
            assert point[f"{figure}_16bit"] == own[figure] == own[f"{figure}_16bit"], (name, figure)
        assert list(point)[2:5] == [f"{figure}_16bit" for figure in names]
    (plain,) = measure(loaded, CacheSpec.of("dynamic"), options)["points"]
    assert (plain["bits_per_number_16bit"], plain["bits_per_number"]) == (16, 32)


def test_agreement_length() -> None:
    assert agreement_length([1, 2, 3], [1, 2, 3]) == 3
    assert agreement_length([1, 2, 4], [1, 2, 3]) == 2
    assert agreement_length([5], [1, 2]) == 0


@pytest.mark.parametrize("sample", [False, True])
def test_agreement_is_that_of_the_texts(loaded, sample) -> None:
    options = AgreementOptions(
        text=(TEXT,), max_tokens=600, window=300, new_tokens=12, sample=sample
    )
    measurement = AgreementMeasurement(loaded, options, seed=1)
    assert measurement.run(CacheSpec.of("dynamic"))["lengths"] == [12, 12]
    spec = CacheSpec.of(
        "rotorquant", {"key_bits": 1, "value_bits": 1, "residual_length": 0, "statistics_length": 0}
    )
    lossy = measurement.run(spec)
    assert (lossy["prompts"], lossy["prompt_tokens"], lossy["new_tokens"]) == (2, 300, 12)
    expected = [
        agreement_length(
            continuation(loaded.model, ids, loaded.new_cache(spec), 12, sample, 1),
            continuation(loaded.model, ids, DynamicCache(), 12, sample, 1),
        )
        for ids in measurement.prompts
    ]
    assert lossy["lengths"] == expected
    assert lossy["mean_length"] < 12
    assert lossy["identical"] == sum(n == 12 for n in expected)


def test_what_compresses_nothing_is_said(loaded) -> None:
    """Prompts that never leave the exact window: the trap of needles that nothing had to find."""
    spec = CacheSpec.of("k2v2")
    options = AgreementOptions(text=(TEXT,), max_tokens=100, window=100, new_tokens=8)
    result = AgreementMeasurement(loaded, options).run(spec)
    assert result["lengths"] == [8]
    assert result["compressed_share"] == 0
    assert "nothing was compressed" in result["warnings"][0]
    result = measure(loaded, spec, MemoryOptions(context=(100,), new_tokens=2))
    assert "nothing was compressed" in result["warnings"][0]
    (found,) = speed.measure(loaded, [spec], SpeedOptions(context=(60,), new_tokens=32, repeats=1))
    assert ["nothing was compressed" in warning for warning in found["warnings"]] == [True]


def test_decoding_that_is_charged_unequally_is_said(loaded) -> None:
    """hqq quantises its whole history anew every 128 tokens, rotorquant a block every 32."""
    specs = [CacheSpec.of(name) for name in ("dynamic", "k4v4", "hqq")]
    options = SpeedOptions(context=(280,), new_tokens=32, repeats=1)
    found = [result["warnings"] for result in speed.measure(loaded, specs, options)]
    assert found[:2] == [[], []]
    assert "not a multiple of the 128 tokens" in found[2][0]
    assert SpeedOptions().new_tokens % 128 == 0


def test_text_longer_than_the_context_is_refused(loaded) -> None:
    options = AgreementOptions(text=(TEXT,), new_tokens=2047)
    with pytest.raises(InputError, match="the model takes 2048 in all"):
        AgreementMeasurement(loaded, options)


def test_commands_print_what_they_measure(capsys) -> None:
    base = ["--model", str(MODEL), "--json"]
    main(["memory", *base, "--context", "64", "--cache", "dynamic"])
    (memory,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert memory["cache"] == "dynamic"
    assert memory["points"][0]["bits_per_number"] == 32
    main(["speed", *base, "--context", "64", "--new-tokens", "2", "--repeats", "1"])
    speed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["cache"] for row in speed] == ["dynamic", "k4v4"]
    main(["agreement", *base, "--text", TEXT, "--max-tokens", "64", "--window", "64",
          "--new-tokens", "3", "--cache", "k8v8"])  # fmt: skip
    agreement = json.loads(capsys.readouterr().out)
    assert agreement["lengths"] == [3]
    main(["caches"])
    assert "presets of rotorquant: k8v8" in capsys.readouterr().out


def test_a_cache_of_an_unloadable_package_ends_the_command(capsys, monkeypatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["memory", "--model", str(MODEL), "--cache", "hqq", "--context", "40"])
    assert "pip install hqq" in capsys.readouterr().err


def test_a_cache_without_room_for_anything_exact(loaded) -> None:
    cache = RotorQuantCache(
        residual_length=0, statistics_length=0, num_sink_tokens=0, config=loaded.model.config
    )
    assert cache.tokens_until_packing() == 32
