"""The verdicts of `verify`: intervals beside limits, window after window, and what is said."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
import torch
from transformers import QuantizedCache

from evals import verify
from evals.__main__ import main, parser
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from evals.failures import Failure
from evals.measurements.intervals import mean_interval, share_interval
from evals.measurements.perplexity import PerplexityMeasurement, PerplexityRun
from evals.requirements import install
from evals.subjects.models import LoadedModel, ModelOptions
from evals.verify.run import order
from rotorquant_hf import PRESETS, RotorQuantCache
from rotorquant_hf.passing import CACHE_NAME
from tests.conftest import MODEL, ROOT
from tests.evals.test_intervals import texts

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")


@pytest.fixture(scope="module")
def loaded(model, tokenizer) -> LoadedModel:
    return LoadedModel(model, tokenizer, ModelOptions(model=str(MODEL)))


FIGURES = {
    "kl_mean": 1e-4,
    "kl_mean_ci95": (5e-5, 2e-4),
    "kl_p99": 1e-3,
    "kl_p99_ci95": (5e-4, 2e-3),
    "top1_agreement": 0.995,
    "top1_agreement_ci95": (0.99, 0.998),
    "delta": 0.01,
    "delta_ci95": (-0.01, 0.03),
    "baseline_perplexity": 10.0,
    "bits_per_number_16bit": 4.0,
    "long_bits_per_number_16bit": 3.5,
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


def kl(found: float, low: float, high: float) -> dict:
    return {"kl_mean": found, "kl_mean_ci95": (low, high)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "safe"),
        (kl(0.006, 0.0055, 0.0065), "not safe: mean KL 0.006 is over 0.005 (95%: 0.0055 to"),
        ({"kl_p99": 0.06, "kl_p99_ci95": (0.051, 0.07)}, "not safe: KL p99 0.06 is over 0.05"),
        (
            {"top1_agreement": 0.975, "top1_agreement_ci95": (0.97, 0.979)},
            "not safe: top-1 97.50% is under 98.00% (95%: 97.00% to 97.90%)",
        ),
        ({"delta": 0.5, "delta_ci95": (0.4, 0.6)}, "perplexity rises by 5.00%, over 1.00% (95%: 4"),
        ({"warnings": ["the stored codes are not read"]}, "not safe: the stored codes are not"),
        ({"kl_mean": float("nan")}, "not safe: its figures are not finite"),
        ({"delta_ci95": (0.0, float("inf"))}, "not safe: its figures are not finite"),
        ({"kl_mean_ci95": (0.0, float("nan"))}, "not safe: its figures are not finite"),
    ],
)
def test_verdicts(change, says) -> None:
    verdict = verdict_of(change)
    assert says in f"{verdict.outcome}: {verdict.why}"


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (kl(0.004, 0.003, 0.005), verify.SAFE),  # up to the limit
        (kl(0.004, 0.003, 0.00501), verify.NOT_ENOUGH),
        (kl(0.006, 0.005, 0.007), verify.NOT_ENOUGH),  # not beyond it
        (kl(0.006, 0.00501, 0.007), verify.NOT_SAFE),
        ({"kl_p99_ci95": (1e-3, 0.05)}, verify.SAFE),
        ({"kl_p99_ci95": (1e-3, math.inf)}, verify.NOT_ENOUGH),  # too few tokens, but no fault
        ({"kl_p99_ci95": (1e-3, None)}, verify.NOT_ENOUGH),  # as JSON has it
        ({"kl_p99": 0.2, "kl_p99_ci95": (0.0501, math.inf)}, verify.NOT_SAFE),
        ({"top1_agreement_ci95": (0.98, 1.0)}, verify.SAFE),
        ({"top1_agreement_ci95": (0.979, 1.0)}, verify.NOT_ENOUGH),
        ({"top1_agreement": 0.97, "top1_agreement_ci95": (0.96, 0.98)}, verify.NOT_ENOUGH),
        ({"top1_agreement": 0.97, "top1_agreement_ci95": (0.96, 0.979)}, verify.NOT_SAFE),
        ({"delta_ci95": (-0.1, 0.1)}, verify.SAFE),
        ({"delta_ci95": (-0.1, 0.101)}, verify.NOT_ENOUGH),
        ({"delta": 0.2, "delta_ci95": (0.1, 0.3)}, verify.NOT_ENOUGH),
        ({"delta": 0.2, "delta_ci95": (0.101, 0.3)}, verify.NOT_SAFE),
        # One figure beyond its limit decides, whatever the others lack.
        (kl(0.006, 0.00501, 0.007) | {"delta_ci95": (-9.0, 9.0)}, verify.NOT_SAFE),
    ],
)
def test_ends_of_intervals_decide_not_figures(change, outcome) -> None:
    assert verdict_of(change).outcome == outcome


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
            "of at least 580 tokens",
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
            "perplexity could rise by 4.00% (limit 1%); about 59,000 tokens of text would decide",
        ),
        # The figure that takes longest: the same again, and KL at (0.012 * 0.616 / 0.0049)^2.
        (
            {"delta_ci95": (-0.38, 0.4), "kl_mean_ci95": (5e-5, 0.0121)},
            "mean KL could be as high as 0.0121 (limit 0.005); perplexity could rise by 4.00% "
            "(limit 1%); about 59,000 tokens of text would decide",
        ),
        # Above its limit: what would show that is enough, (0.004 * 0.616 / 0.001)^2 as much.
        (
            kl(0.006, 0.002, 0.018) | {"delta_ci95": (-0.38, 0.4)},
            "mean KL could be as high as 0.018 (limit 0.005); perplexity could rise by 4.00% "
            "(limit 1%); about 50,000 tokens of text would decide",
        ),
        (
            {"delta_ci95": (-0.38, 0.4), "interval_over": "documents", "documents": [*"abcd"]},
            "about 59,000 tokens from at least 29 documents would decide",
        ),
        ({"kl_p99_ci95": (1e-3, math.inf)}, "KL p99: too few tokens for an upper bound; about"),
        (kl(0.00501, 0.002, 0.01), "; so near to the limit that no text would decide"),
        ({"code_readers": None}, "no token reads mostly codes: give texts, and a --window, of"),
    ],
)
def test_too_little_evidence_is_no_verdict(change, says) -> None:
    """Neither safe nor unsafe, with the text that would decide; a broken limit is unsafe still."""
    verdict = verdict_of(change)
    assert verdict.outcome == verify.NOT_ENOUGH
    assert says in f"{verdict.outcome}: {verdict.why}"
    if change.get("compressed_share") != 0.0 and change.get("delta_ci95", ()) is not None:
        assert verdict_of(change | kl(1.0, 0.9, 1.1)).outcome == verify.NOT_SAFE


def test_one_window_is_no_evidence_either_way() -> None:
    """There is no interval that could lie beyond a limit."""
    figures = {"kl_mean": 1.0, "delta": 5.0}
    for name in ("kl_mean", "kl_p99", "top1_agreement", "delta"):
        figures[f"{name}_ci95"] = None
    assert verdict_of(figures).outcome == verify.NOT_ENOUGH


def test_the_figures_of_tokens_that_read_mostly_codes_decide() -> None:
    """Those of all tokens flatter: many of them read full precision."""
    inner = {name: FIGURES[name] for name in FIGURES if "16bit" not in name}
    assert verdict_of({"code_readers": inner}).outcome == verify.SAFE
    worse = inner | kl(0.006, 0.0051, 0.007)
    assert verdict_of({"code_readers": worse}).outcome == verify.NOT_SAFE
    assert verdict_of(kl(0.006, 0.0051, 0.007) | {"code_readers": inner}).outcome == verify.SAFE
    # One window of several has such tokens: that is no interval.
    lone = inner | {"delta_ci95": None, "kl_mean_ci95": None}
    assert verdict_of({"code_readers": lone}).outcome == verify.NOT_ENOUGH


def test_rows_recorded_without_intervals_are_never_shown_to_be_safe() -> None:
    old = {name: x for name, x in FIGURES.items() if name == "delta_ci95" or "ci95" not in name}
    assert verify.reasons(old, LIMITS) == []
    assert "recorded without intervals: measure again" in "; ".join(verify.missing(old, LIMITS))
    assert "mean KL 0.006 is over" in verify.reasons(old | {"kl_mean": 0.006}, LIMITS)[0]
    assert "top-1 90.00% is under" in verify.reasons(old | {"top1_agreement": 0.9}, LIMITS)[0]


def test_what_nothing_was_read_of_is_not_safe() -> None:
    """Not even where no share is asked for."""
    nothing = FIGURES | {"compressed_share": 0.0, "window": 120, "warnings": ["nothing packed"]}
    asked = verify.VerifyOptions(min_packed=0.0)
    assert "nothing was read quantised" in "; ".join(verify.missing(nothing, asked))


def test_the_fewest_bits_among_the_safe_are_recommended(loaded) -> None:
    def verdict(preset: str, bits: float, *reasons: str, lacks: str = "") -> verify.Verdict:
        figures = FIGURES | {"bits_per_number_16bit": bits, "long_bits_per_number_16bit": bits}
        return verify.Verdict(preset, figures, list(reasons), [lacks] if lacks else [])

    found = [verdict("k8v8", 8), verdict("k4v4", 4), verdict("k2v2", 2, "KL is over")]
    assert verify.recommended(found).label == "k4v4"
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
    assert said == (
        "Not enough evidence that a preset is safe. k4v4: one window.\n\n"
        "k2v2 is not safe: KL is over."
    )
    assert verify.outcome([*unknown, found[0]]) == verify.SAFE
    open_ = verify.conclusion([found[0], unknown[0]], loaded)
    assert "Recommended: k8v8" in open_
    unread = verify.Verdict(
        "k2v2", FIGURES | {"long_bits_per_number_16bit": None}, [], ["nothing was read quantised"]
    )
    said = verify.conclusion([found[0], unread], loaded)
    assert "k2v2: not enough evidence: nothing was read quantised." in said
    fewer = "k4v4 uses fewer bits, but there is not enough evidence: one window."
    assert fewer in open_.splitlines()
    assert "over 2,048 tokens were not measured." in open_


def test_what_fails_is_neither_unsafe_nor_undecided(loaded) -> None:
    """It changes no other verdict, and nobody says that no preset is safe."""
    failed = verify.Verdict(
        "k8v8", {}, [], [], None, Failure("failed", "OutOfMemoryError: no room")
    )
    absent = verify.Verdict("hqq", {}, [], [], None, Failure("not run", "hqq is not installed"))
    assert (failed.outcome, failed.why) == ("failed", "OutOfMemoryError: no room")
    assert (absent.outcome, absent.why) == ("not measured", "hqq is not installed")
    safe = verify.Verdict("k4v4", FIGURES, [], [])
    unsafe = [verify.Verdict(x, FIGURES, ["KL is over"], []) for x in verify.PRESETS[1:]]
    undecided = verify.Verdict("k3v3", FIGURES, [], ["one window"])
    assert verify.outcome([failed, absent, safe, undecided]) == verify.SAFE
    assert verify.outcome([failed, undecided]) == verify.FAILED
    assert verify.outcome([absent, *unsafe]) == verify.NOT_MEASURED
    assert verify.STATUS[verify.FAILED] == verify.STATUS[verify.NOT_MEASURED] == 4
    said = verify.conclusion([failed, *unsafe], loaded)
    assert said.startswith("WARNING: none of k4v4, k4v3, k3v3, k3v2, k2v2 is safe")
    assert "no preset" not in said
    assert "k8v8 failed: OutOfMemoryError: no room" in said
    assert "hqq was not measured: hqq is not" in verify.conclusion([safe, absent], loaded)
    assert "enough evidence" not in verify.conclusion([failed], loaded)
    (line,) = verify.table([failed]).splitlines()[2:]
    assert line.startswith("| k8v8 | – |")
    assert line.endswith("| failed |")


def test_all_looks_together_miss_as_often_as_one_would() -> None:
    """Whenever one stops: of 400 synthetic texts, an end misses at any look in at most 6%."""
    levels = verify.looks(16)
    assert list(levels) == [16, 8, 4]
    assert sum(1 - level for level in levels.values()) == pytest.approx(0.05)
    assert 1 - levels[16] == pytest.approx(2 * (1 - levels[8]))
    missed = {"mean": 0, "share": 0, "mean, uncorrected": 0}
    for seed in range(400):
        divergence, changed, _, mean, share = texts(10_000 + seed, 16)

        def misses(make, found, truth, level=None) -> bool:
            ends = [make(found[:n], level or levels[n]) for n in levels]
            return any(not low <= truth <= high for low, high in ends)

        missed["mean"] += misses(mean_interval, divergence, mean)
        missed["share"] += misses(share_interval, changed, share)
        missed["mean, uncorrected"] += misses(mean_interval, divergence, mean, 0.95)
    assert missed["mean"] <= 0.06 * 400
    assert missed["share"] <= 0.06 * 400
    assert missed["mean, uncorrected"] > 0.08 * 400  # looking often does inflate the error


@pytest.mark.parametrize(
    ("windows", "counts"),
    [(1, [1]), (7, [7]), (8, [8, 4]), (9, [9, 4]), (40, [40, 20, 10, 5])],
)
def test_looks(windows, counts) -> None:
    assert list(verify.looks(windows)) == counts


SAMPLES = str(ROOT / "examples" / "sampled")


def measured(loaded, **options) -> tuple[list[verify.Verdict], dict[str, list[int]]]:
    """Verdicts in the order in which they come, and the windows that every cache read."""
    read: dict[str, list[int]] = {}
    plain = PerplexityRun.read

    def noting(self, index, probed):
        read.setdefault(self.spec.label, []).append(index)
        return plain(self, index, probed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerplexityRun, "read", noting)
        return list(verify.verdicts(loaded, verify.VerifyOptions(text=(SAMPLES,), **options))), read


def test_windows_are_read_until_the_verdict_is_clear(loaded) -> None:
    """k8v8 is as good as exact; k2v2 with a limit in the midst of its figures is not clear."""
    options = {"window": 800, "max_tokens": 6400, "presets": ("k8v8", "k2v2")}
    easy, read = measured(loaded, **options)
    assert len(read["k8v8"]) == 4
    assert easy[0].label == "k8v8"
    assert easy[0].outcome == verify.SAFE
    assert easy[0].figures["windows"] == 4
    assert easy[0].figures["interval_level"] == pytest.approx(1 - 0.05 / 3)
    middle = easy[-1].figures["code_readers"]["kl_mean"]
    found, read = measured(loaded, max_kl=middle, min_top1=0.0, max_kl_p99=9.0, **options)
    by_label = {verdict.label: verdict for verdict in found}
    assert by_label["k2v2"].outcome == verify.NOT_ENOUGH
    assert "would decide" in by_label["k2v2"].why
    assert len(read["k2v2"]) == 8
    assert read["k2v2"][:4] == read["k8v8"]
    assert by_label["k2v2"].figures["interval_level"] == pytest.approx(1 - 0.05 * 2 / 3)


def test_windows_too_short_are_not_read_to_the_end(loaded) -> None:
    """A quarter is read quantised in each: another window would not change that."""
    (found,), read = measured(loaded, window=300, max_tokens=4800, presets=("k8v8",))
    assert found.outcome == verify.NOT_ENOUGH
    assert "give texts, and a --window, of at least" in found.why
    assert len(read["k8v8"]) == 4


def test_the_uncompressed_cache_reads_every_window_once(loaded, monkeypatch) -> None:
    """For all presets together; and the logits of one window are kept, not of all."""
    from evals.measurements import reference

    reads, kept, plain = [], [], reference.read

    def counting(model, ids, cache):
        reads.append(ids.shape[1])
        return plain(model, ids, cache)

    forget = reference.Reference.forget

    def noting(self, window):
        kept.append({key[0] for key in self.kept})
        forget(self, window)
        assert not self.kept

    monkeypatch.setattr(reference, "read", counting)
    monkeypatch.setattr(reference.Reference, "forget", noting)
    options = verify.VerifyOptions(text=(TEXT,), window=300, max_tokens=900)
    found = list(verify.verdicts(loaded, options))
    assert len(found) == len(verify.PRESETS)
    assert sum(reads) == 900
    assert [len(windows) for windows in kept] == [1, 1, 1]


def test_documents_take_turns_in_an_order_that_is_always_the_same(loaded) -> None:
    options = verify.VerifyOptions(text=(SAMPLES,), window=300, max_tokens=3600)
    measurement = PerplexityMeasurement(loaded, options)
    found = order(measurement)
    names = [measurement.windows[i].name for i in found]
    assert sorted(found) == list(range(12))
    assert len(set(names[:4])) == len(set(names[4:8])) == 4
    assert found == order(measurement)
    assert found != sorted(found)
    measurement.ids[found[7]] = torch.zeros(1, 400)
    assert order(measurement)[0] == found[7]  # the longest, in which caches are probed


def test_settings_of_ones_own(loaded, capsys) -> None:
    options = verify.VerifyOptions(
        cache=("k3v3:residual_length=32,statistics_length=0,exact_layers=[0, -1]", "haar")
    )
    specs = options.caches()
    assert [spec.label for spec in specs] == [
        "k3v3, statistics 0, window 32, exact layers (0, -1)", "haar k3v3",
    ]  # fmt: skip
    both = verify.VerifyOptions(presets=("k3v2", "k8v8"), cache=("k8v8:num_sink_tokens=4",))
    assert [spec.label for spec in both.caches()] == ["k8v8", "k3v2"]
    assert [spec.label for spec in LIMITS.caches()] == list(verify.PRESETS)
    for bad, says in (
        ("k3v3:residual_length", "is not NAME:OPTION=VALUE"),
        ("k3v3:", "is not NAME:OPTION=VALUE"),
        ("k3v3:window=32", "unknown option window"),
        ("k3v9", "unknown cache"),
        ("dynamic", "is what the others are compared with"),
    ):
        with pytest.raises(InputError, match=says):
            verify.VerifyOptions(cache=(bad,)).caches()


@pytest.mark.parametrize(
    "text",
    [
        "k4v4",
        "k3v3:residual_length=32,statistics_length=0,exact_layers=[0, -1]",
        "haar:key_bits=2",
        "hqq:nbits=2",
    ],
)
def test_the_line_of_code_makes_the_cache(loaded, text) -> None:
    spec = CacheSpec.named(text)
    source, call = spec.code
    namespace = {"model": loaded.model}
    exec(source, namespace)
    made = eval(call, namespace)
    if spec.kind == "hqq":
        assert isinstance(made, QuantizedCache)
        assert made.layers[0].nbits == 2
    else:
        assert isinstance(made, RotorQuantCache)
        assert made.settings == spec.options
    if text == "k4v4":
        assert call == 'RotorQuantCache("k4v4", config=model.config)'
    assert all(f'RotorQuantCache("{x}", config' in CacheSpec.of(x).code[1] for x in PRESETS)


def test_verify_recommends_a_line_that_runs(capsys, model, sampled) -> None:
    main(
        ["verify", "--model", str(MODEL), "--max-tokens", "4000", "--window", "1000",
         "--presets", "k8v8", "--cache", "k3v2:residual_length=64,statistics_length=0"]
    )  # fmt: skip
    captured = capsys.readouterr()
    output = captured.out
    assert "| k8v8 |" in output
    assert "| k3v2, statistics 0, window 64 |" in output
    assert output.splitlines()[0] == (
        f"A demonstration on the model {MODEL} and the shipped samples (examples/sampled); for "
        "your own give --text FILE."
    )
    assert re.search(r"k8v8: safe \([\d,]+ tokens, which read \d\d% of their", captured.err)
    lines = [line.strip() for line in output.splitlines() if line.startswith("    ")]
    namespace = {"model": model, "inputs": {"input_ids": sampled[:, :20], "max_new_tokens": 3}}
    for line in lines:
        exec(line, namespace)
    assert f"model.generate(**inputs, {CACHE_NAME}=RotorQuantCache(" in lines[-1]


def test_verify_goes_on_behind_a_preset_that_fails(capsys, monkeypatch) -> None:
    """In its second window; and a package that is missing has its own word."""
    read = PerplexityRun.read

    def failing(self, index, probed):
        if self.spec.label == "k4v4" and not probed:
            raise torch.cuda.OutOfMemoryError("no room")
        return read(self, index, probed)

    monkeypatch.setattr(PerplexityRun, "read", failing)
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    monkeypatch.setitem(sys.modules, "hqq", None)
    main(["verify", "--model", str(MODEL), "--max-tokens", "4000", "--window", "1000",
          "--presets", "k4v4", "k8v8", "--cache", "hqq"])  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("| failed |") == output.count("| not measured |") == 1
    assert output.count(f"was not measured: hqq is not installed: {install(['hqq'])}\n") == 1
    assert "Recommended: k8v8" in output
    assert "k4v4 failed: OutOfMemoryError: no room" in output
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--model", str(MODEL), "--max-tokens", "1200", "--window", "300",
              "--presets", "k4v4"])  # fmt: skip
    assert stopped.value.code == 4
    output = capsys.readouterr().out
    assert "enough evidence" not in output
    assert "is safe" not in output


def test_verify_says_that_the_one_preset_measured_is_not_safe(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            ["verify", "--model", str(MODEL), "--text", TEXT, "--max-tokens", "1600",
             "--window", "400", "--presets", "k2v2", "--key-bias", "100", "--max-kl", "0.0001"]
        )  # fmt: skip
    output = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "WARNING: k2v2 is not safe on this model with this text: mean KL 0.00" in output
    assert "demonstration" not in output
    assert output.count("mean KL 0.00") == 1  # the reason is said once
    assert "| not safe |" in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (20, "Not enough evidence: the text has 25 tokens; give at least 1,160"),
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
    assert "1,160" in output


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


@pytest.mark.parametrize(
    ("options", "least"), [(("--max-tokens", "10"), "1,160"), (("--window", "10"), "580")]
)
def test_options_that_leave_too_few_tokens_are_named(capsys, options, least) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--model", str(MODEL), "--text", TEXT, *options])
    assert stopped.value.code == 3
    said = f"Not enough evidence: {options[0]} is 10; set it to at least {least}\n"
    assert capsys.readouterr().out == said


def test_a_preset_that_there_is_not_is_named_as_typed(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--presets", "k3v3", "foo"])
    assert stopped.value.code == 2
    said = "error: --presets: 'foo' is unknown; choose from k8v8, k4v4, k4v3, k3v3, k3v2, k2v2\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            (False, False),
            "A demonstration on the shipped 7M model (m) and the shipped samples "
            "(examples/sampled); for your own give --model NAME_OR_PATH --text FILE.",
        ),
        ((False, True), "A demonstration on the shipped 7M model (m) and your text; for your own"),
        ((True, False), "A demonstration on the model m and the shipped samples"),
        ((True, True), ""),
    ],
)
def test_what_is_a_demonstration_says_so(own, says) -> None:
    assert verify.demonstration("m", *own).startswith(says)
    assert bool(verify.demonstration("m", *own)) == bool(says)


def test_verdicts_as_json(capsys) -> None:
    """One line a cache; that it is a demonstration is no part of it."""
    main(["verify", "--model", str(MODEL), "--max-tokens", "2400", "--window", "600",
          "--presets", "k8v8", "k2v2", "--max-kl", "1e-4", "--json"])  # fmt: skip
    captured = capsys.readouterr()
    assert captured.err.startswith("A demonstration on ")
    safe, other = map(json.loads, captured.out.splitlines())
    assert (safe["cache"], safe["verdict"], safe["recommended"]) == ("k8v8", "safe", True)
    assert (safe["model"], safe["dtype"], safe["why"]) == (str(MODEL), "float32", "")
    assert (other["cache"], other["recommended"]) == ("k2v2", False)
    assert other["verdict"] != "safe"
    assert other["why"]
    assert 0 < safe["kl_mean"] < other["kl_mean"]
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--model", str(MODEL), "--text", TEXT, "--max-tokens", "10", "--json"])
    assert stopped.value.code == 3
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "not enough evidence"
    assert found["why"] == "--max-tokens is 10; set it to at least 1,160"
