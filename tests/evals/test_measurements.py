"""Memory, text agreement and the verdicts of `verify`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import DynamicCache

from evals import verify
from evals.__main__ import main, parser
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from evals.measurements import speed
from evals.measurements.agreement import (
    AgreementMeasurement,
    AgreementOptions,
    agreement_length,
    continuation,
)
from evals.measurements.memory import MemoryOptions, measure
from evals.measurements.speed import SpeedOptions
from evals.probes.footprint import peak_bytes
from evals.subjects.models import LoadedModel, ModelOptions
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
    spec = CacheSpec.of("k2v2", {"residual_length": 32, "statistics_length": 0})
    (point,) = measure(loaded, spec, options)["points"]
    assert point["cache_bytes"] == sum(point["parts"].values())
    assert point["parts"]["key_codes"] == point["parts"]["value_codes"] > 0
    plain = measure(loaded, CacheSpec.of("dynamic"), options)["points"][0]
    assert point["cache_bytes"] < 0.25 * plain["cache_bytes"]
    assert point["peak_prefill_bytes"] < plain["peak_prefill_bytes"]


def test_memory_in_16_bits_is_that_of_a_16_bit_model(loaded) -> None:
    """Counted beside a float32 model as on the model in bfloat16, and first."""
    options = MemoryOptions(context=(180,), batch=(2,), new_tokens=2)
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
    options = SpeedOptions(context=(200,), new_tokens=32, repeats=1)
    found = [result["warnings"] for result in speed.measure(loaded, specs, options)]
    assert found[:2] == [[], []]
    assert "not a multiple of the 128 tokens" in found[2][0]
    assert SpeedOptions().new_tokens % 128 == 0


def test_text_longer_than_the_context_is_refused(loaded) -> None:
    options = AgreementOptions(text=(TEXT,), new_tokens=2047)
    with pytest.raises(InputError, match="the model takes 2048 in all"):
        AgreementMeasurement(loaded, options)


FIGURES = {
    "kl_mean": 1e-4,
    "kl_p99": 1e-3,
    "top1_agreement": 0.995,
    "delta": 0.01,
    "delta_ci95": (-0.01, 0.03),
    "baseline_perplexity": 10.0,
    "bits_per_number_16bit": 4.0,
    "packed_bits_per_number_16bit": 3.5,
    "compressed_share": 0.8,
    "window": 2048,
    "windows": 4,
    "documents": ["a"],
    "interval_over": "windows of one document",
    "tokens": 8188,
    "warnings": [],
}
LIMITS = verify.VerifyOptions()


def verdict_of(change: dict) -> verify.Verdict:
    figures = {**FIGURES, **change}
    lacking = verify.missing(figures, LIMITS)
    return verify.Verdict("k4v4", figures, verify.reasons(figures, LIMITS), lacking)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "safe"),
        ({"kl_mean": 0.006}, "not safe: mean KL 0.006 is over 0.005"),
        ({"kl_p99": 0.06}, "not safe: KL p99 0.06 is over 0.05"),
        ({"top1_agreement": 0.975}, "not safe: top-1 97.50% is under 98.00%"),
        ({"delta": 0.5, "delta_ci95": (0.4, 0.6)}, "perplexity rises by 5.00%, over 1.00%"),
        ({"delta_ci95": None, "delta": 0.5}, "not safe: perplexity rises by 5.00%"),
        ({"warnings": ["the stored codes are not read"]}, "not safe: the stored codes are not"),
        ({"kl_mean": float("nan")}, "not safe: its figures are not finite"),
        ({"delta_ci95": (0.0, float("inf"))}, "not safe: its figures are not finite"),
    ],
)
def test_verdicts(change, says) -> None:
    assert says in str(verdict_of(change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # Of 2,048 tokens 1 - sqrt(0.2) are kept: windows 1.22 times as long will do.
        (
            {"compressed_share": 0.2},
            "20% of what was read was read quantised, under 30%: give texts, and a --window, of at "
            "least 2,600 tokens",
        ),
        # 4 sinks, a window of 128 and a block of 32 are kept, at least.
        (
            {"compressed_share": 0.0, "window": 150, "warnings": ["nothing is compressed"]},
            "of at least 370 tokens",
        ),
        (
            {"compressed_share": 0.0, "window": 2048, "warnings": ["no compressed layer"]},
            "not enough evidence: no compressed layer; nothing was read quantised",
        ),
        (
            {"delta_ci95": None},
            "one window of 2,048 tokens gives no interval: give at least 4,096 tokens "
            "(--text, --max-tokens)",
        ),
        # t of 3 degrees of freedom is 3.18: (0.39 * 1.96 / 3.18 / 0.09)^2 times as many.
        (
            {"delta_ci95": (-0.38, 0.4)},
            "perplexity may rise by 4.00%, over 1.00%: give about 59,000 tokens of text",
        ),
    ],
)
def test_too_little_evidence_is_no_verdict(change, says) -> None:
    """Neither safe nor unsafe, with the text that would tell; a broken limit is unsafe still."""
    verdict = verdict_of(change)
    assert verdict.outcome == verify.NOT_ENOUGH
    assert says in str(verdict)
    if FIGURES["compressed_share"] and change.get("compressed_share") != 0.0:
        assert verdict_of(change | {"kl_mean": 1.0}).outcome == verify.NOT_SAFE


def test_what_nothing_was_read_of_is_not_safe() -> None:
    """Not even where no share is asked for."""
    nothing = FIGURES | {"compressed_share": 0.0, "window": 120, "warnings": ["nothing packed"]}
    asked = verify.VerifyOptions(min_packed=0.0)
    assert "nothing was read quantised" in "; ".join(verify.missing(nothing, asked))


def test_the_fewest_bits_among_the_safe_are_recommended(loaded) -> None:
    def verdict(preset: str, bits: float, *reasons: str, lacks: str = "") -> verify.Verdict:
        figures = FIGURES | {"bits_per_number_16bit": bits}
        return verify.Verdict(preset, figures, list(reasons), [lacks] if lacks else [])

    found = [verdict("k8v8", 8), verdict("k4v4", 4), verdict("k2v2", 2, "KL is over")]
    assert verify.recommended(found).preset == "k4v4"
    assert verify.outcome(found) == verify.SAFE
    assert 'RotorQuantCache("k4v4", config=model.config)' in verify.conclusion(found, loaded)

    one = verify.conclusion(found[2:], loaded)
    assert one.startswith("WARNING: k2v2 is not safe on this model with this text: KL is over")
    assert "k8v8, k4v4, k4v3, k3v3, k3v2; add them to --presets" in one
    assert verify.outcome(found[2:]) == verify.NOT_SAFE
    two = [verdict("k3v3", 3, "top-1 is under"), found[2]]
    assert "WARNING: none of k3v3, k2v2 is safe" in verify.conclusion(two, loaded)
    every = [verdict(preset, 4, "KL is over") for preset in verify.PRESETS]
    assert verify.conclusion(every, loaded).startswith("WARNING: no preset is safe")

    unknown = [verdict("k4v4", 4, lacks="one window"), found[2]]
    assert verify.outcome(unknown) == verify.NOT_ENOUGH
    said = verify.conclusion(unknown, loaded)
    assert said == "Not enough evidence that a preset is safe. k4v4: one window."
    assert verify.outcome([*unknown, found[0]]) == verify.SAFE


def test_verify_recommends_a_line_that_runs(capsys, model, sampled) -> None:
    main(
        ["verify", "--model", str(MODEL), "--max-tokens", "1200", "--window", "600",
         "--presets", "k8v8", "k3v2"]
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "| k8v8 |" in output
    assert "The text is this project's samples" in output
    lines = [line.strip() for line in output.splitlines() if line.startswith("    ")]
    namespace = {"model": model, "inputs": {"input_ids": sampled[:, :20], "max_new_tokens": 3}}
    for line in lines:
        exec(line, namespace)
    assert "model.generate(**inputs, past_key_values=RotorQuantCache(" in lines[-1]


def test_verify_goes_on_behind_a_preset_that_fails(capsys, monkeypatch) -> None:
    from evals.measurements.perplexity import PerplexityMeasurement

    run = PerplexityMeasurement.run

    def failing(self, spec):
        if spec.label == "k4v4":
            raise torch.cuda.OutOfMemoryError("no room")
        return run(self, spec)

    monkeypatch.setattr(PerplexityMeasurement, "run", failing)
    main(["verify", "--model", str(MODEL), "--max-tokens", "1200", "--window", "600",
          "--presets", "k4v4", "k8v8"])  # fmt: skip
    output = capsys.readouterr().out
    assert "| not measured: OutOfMemoryError: no room |" in output
    assert "Recommended: k8v8" in output


def test_verify_says_that_the_one_preset_measured_is_not_safe(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            ["verify", "--model", str(MODEL), "--text", TEXT, "--max-tokens", "600",
             "--window", "600", "--presets", "k2v2", "--key-bias", "100"]
        )  # fmt: skip
    output = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "WARNING: k2v2 is not safe on this model with this text: top-1 96." in output
    assert "The text is this project's samples" not in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (20, "Not enough evidence: the text is shorter than a chunk: its longest document has"),
        (100, "Not enough evidence that a preset is safe. k8v8: nothing was read quantised"),
    ],
)
def test_verify_of_a_text_too_short_says_how_much_it_takes(capsys, tmp_path, words, says) -> None:
    (tmp_path / "short.txt").write_text("The sea was calm and grey. " * (words // 6))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--model", str(MODEL), "--text", str(tmp_path / "short.txt"),
              "--presets", "k8v8"])  # fmt: skip
    output = capsys.readouterr().out
    assert stopped.value.code == 3
    assert says in output
    assert "740 tokens" in output


def test_limits_under_their_old_names(capsys) -> None:
    args = parser().parse_args(["verify", "--most-kl", "0.1", "--least-top1=0.5"])
    assert (args.max_kl, args.min_top1) == (0.1, 0.5)
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    shown = capsys.readouterr().out
    assert "--max-kl-p99" in shown
    assert "--most" not in shown
    assert "--least" not in shown
    with pytest.raises(SystemExit):
        main(["verify", "--text", "absent.txt", "--most-kl", "0.1", "--model", str(MODEL)])
    assert "DeprecationWarning: --most-kl is now --max-kl" in capsys.readouterr().err


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
