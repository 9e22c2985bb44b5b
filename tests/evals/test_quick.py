"""The quick sweep and its report, as a user runs them: what they say is checked."""

from __future__ import annotations

import csv
import re

import pytest

from evals.__main__ import main
from evals.sweep.rows import read_results
from tests.conftest import ROOT


def test_what_the_quick_sweep_says(tmp_path, monkeypatch) -> None:
    """One test, because it takes minutes: workers of pytest-xdist would each run their own."""
    monkeypatch.chdir(ROOT)
    main(["sweep", "configs/quick.yaml", "--out", str(tmp_path)])
    main(["report", str(tmp_path)])
    results = results_in(tmp_path)
    quality_follows_bits(results)
    long_texts_take_the_bits_of_their_codes(results)
    the_cache_is_read_by_every_measurement(results)
    memory_and_speed_have_every_point(results)
    the_report_shows_the_figures(tmp_path, results)


def results_in(out) -> dict[tuple[str, str], dict]:
    """Results by measurement and cache."""
    _, rows = read_results([out])
    found = {}
    for row in rows:
        assert row["status"] in ("ok", "not run"), row["error"]
        assert not (row["result"] or {}).get("warnings"), row["result"]["warnings"]
        if row["status"] == "not run":  # fp8 came with a later Transformers
            assert row["cache"]["kind"] == "fp8"
            continue
        found[row["measurement"], row["cache"]["label"]] = row["result"]
    return found


def quality_follows_bits(results) -> None:
    quality = {label: r for (measure, label), r in results.items() if measure == "perplexity"}
    kl = [quality[label]["kl_mean"] for label in ("dynamic", "k8v8", "k4v4", "k3v3", "k2v2")]
    assert kl == sorted(kl)
    assert kl[0] < 1e-10 < 1e-8 < kl[1]
    assert 3e-4 < kl[4] < 3e-3
    bits = [quality[label]["bits_per_number"] for label in ("dynamic", "k8v8", "k4v4", "k2v2")]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 32
    assert quality["k3v3"]["kl_mean"] < quality["haar k3v3"]["kl_mean"]
    for label, result in quality.items():
        assert result["warnings"] == [], label
        assert abs(result["baseline_perplexity"] - quality["dynamic"]["perplexity"]) < 1e-3
        if label != "dynamic":
            assert result["compressed_share"] > 0.5
            low, high = result["delta_ci95"]
            assert low < result["delta"] < high


def long_texts_take_the_bits_of_their_codes(results) -> None:
    """A 16-bit scale for 64 elements. Statistics, tables and spare room are spread over the tokens
    there are, the 608 quantised ones of a window."""
    for label, bits in (("k8v8", 8), ("k4v4", 4), ("k3v3", 3), ("k2v2", 2)):
        found = results["perplexity", label]
        assert found["long_bits_per_number"] == pytest.approx(bits + 0.25, abs=1e-6), label
        assert bits + 0.25 < found["packed_bits_per_number"] < bits + 1, label


def the_cache_is_read_by_every_measurement(results) -> None:
    assert results["agreement", "dynamic"]["mean_length"] == 96
    assert results["agreement", "k2v2"]["mean_length"] < 96
    scores, plain = (
        results["lm_eval", label]["scores"]["rotorquant_rhymes"]
        for label in ("k2v2, statistics 64, window 32", "dynamic")
    )
    assert scores["word_perplexity"] != plain["word_perplexity"]
    assert results["lm_eval", "k2v2, statistics 64, window 32"]["compressed_share"] > 0.5
    needle = results["needle", "k2v2, window 32"]
    assert needle["baseline_accuracy"] > 0.8
    assert needle["quantised"] > 12


def memory_and_speed_have_every_point(results) -> None:
    for label in ("dynamic", "k4v4", "k2v2"):
        memory, speed = (results[measure, label]["points"] for measure in ("memory", "speed"))
        assert [p["context"] for p in memory] == [p["context"] for p in speed] == [512, 1024]
        assert all(p["prefill_tokens_per_s"] > 0 < p["decode_tokens_per_s"] for p in speed)
    plain, packed = (results["memory", label]["points"][1] for label in ("dynamic", "k2v2"))
    assert plain["cache_bytes"] > 4 * packed["cache_bytes"]
    assert plain["peak_prefill_bytes"] > packed["peak_prefill_bytes"]


def the_report_shows_the_figures(out, results) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    markdown = (out / "report.md").read_text(encoding="utf-8")
    with (out / "rows.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for (measure, label), result in results.items():
        assert label in page
        assert label in markdown
        lines = [r for r in table if (r["measurement"], r["cache"]) == (measure, label)]
        assert lines, (measure, label)
        if measure == "perplexity":
            assert float(lines[0]["result.kl_mean"]) == result["kl_mean"]
            assert f"{result['bits_per_number_16bit']:.2f}" in markdown
    assert not re.search(r"""(?:src|href)=["']https?:""", page)
    assert page.count("<svg") >= 6
